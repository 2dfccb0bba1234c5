"""What a plan needs beside the weights of integer layers: entries of what they read and write; and what it needs no more."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from onnxq_plugins.graph.flow import activation_inputs, maker_of, result_of
from onnxq_plugins.job import FLOAT, Job
from onnxq_plugins.job.weights import activation_request
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import QuantSpec
from onnxq_plugins.targets.reading import joins, source_in


def missing(job: Job) -> dict[str, QuantSpec]:
    """Requests of activations for planned layers that cannot run without them: a pass has put operators before or behind the
    layers, or has made these. What is there stays."""
    found: dict[str, QuantSpec] = {}
    layers, names = Planned.of(job).layers, [layer.name for layer in job.graph.layers]
    for layer in layers:
        view = Planned(job.graph, job.plan | found, job.target)
        spec, key = job.plan[layer.weight], view.input(layer)
        if not key and job.target.rule(layer, spec, 0) is not None:
            continue  # it reads float
        ends = {"first": layer.name == names[0], "last": layer.name == names[-1]}
        request = job.recipe.settings(layer.name, layer.op, layer.kind, ends, set())[1]
        if request.bits == FLOAT:
            continue
        made = activation_request(request, job.target)
        if not key:
            found[job.graph.root(layer.input)] = made
        if layer.op in job.target.output_scale and layer.result not in job.plan:
            found.setdefault(layer.result, made)
    return found | _between(job, found)


def _between(job: Job, found: Mapping[str, QuantSpec]) -> dict[str, QuantSpec]:
    """Requests of what operators write that a pass has made, where a target quantizes as a whole."""
    graph, made = job.graph, activation_request(job.recipe.activations, job.target)
    entries: dict[str, QuantSpec] = {}
    for node in graph.nodes if job.target.whole and made.bits != FLOAT else ():
        result = result_of(graph, node) if node.name not in graph.imported | graph.floats else ""
        if not result or result in job.plan or result in found or not joins(graph, job.target, node):
            continue
        plan = job.plan | found | entries
        if all(source_in(graph, plan, name) for name in activation_inputs(graph, node)):
            entries[result] = made
    return entries


def idle(job: Job, read: Collection[str]) -> set[str]:
    """Planned activations that integer operators have read, and that none reads now, nor has to write: a pass has put float
    operators there, which codes would only cost.

    read   what integer operators read before the pass (`Planned.read`)
    """
    if job.target.whole:
        return set()
    view, layers = Planned.of(job), {layer.name for layer in job.graph.layers}

    def written(name: str) -> bool:
        maker = maker_of(job.graph, name)
        if maker is None or maker.name not in view.integer:
            return False
        return maker.op in job.target.output_scale or (maker.name not in layers and maker.op != "MatMul")

    return {name for name in ({*read} & {*view.activations}) - view.read if not written(name)}
