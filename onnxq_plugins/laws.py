"""What passes are held to, where they run: the float function stays (L1), plans are plans (L3), no solution is stale
(L5), and whatever fails has an owner.

Whatever a pass leaves is checked where it ran: a NaN in a scale would otherwise be found by whoever wonders about accuracy.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from onnxq_plugins import measure, runtimes
from onnxq_plugins.data import Data, graph_inputs
from onnxq_plugins.errors import OnnxqError, raised
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.soundness import Structure, mend, newest_named, same_structure, structure
from onnxq_plugins.job import Job, Pass, parameters
from onnxq_plugins.plan.entries import entry_problem
from onnxq_plugins.plan.missing import idle, missing
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plugins import Plugins
from onnxq_plugins.report.causes import Cause
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.targets.misfits import misfits
from onnxq_plugins.targets.refusals import missing_operators

DRIFT = 1e-4  # law L1, relative


class LawBroken(OnnxqError):
    """A pass fails, or does what its declaration or the rules for passes rule out: a bug of the pass, not of the input."""


def run_pass(job: Job, step: Pass, plugins: Plugins, verify: bool) -> dict[str, Any]:
    """Run one pass through the hook and hold it to the laws; its entry in `Report.steps`.

    verify   run the float model before and behind it (law L1)
    """
    data = job.calibration.data  # the pass may bring its own
    plan, weights, shape = job.plan, _weights(job.graph), structure(job.graph)
    read = Planned.of(job).read if step.stage == "rewrite" else set()
    reference = _probe(job.graph, data) if verify and step.exact else None
    job.graph.touched.clear()
    start = time.perf_counter()
    result = _guarded(step, lambda: plugins.manager.hook.onnxq_run_pass(step=step, job=job), plugins)
    entry = {"pass": step.name, "seconds": round(time.perf_counter() - start, 3), "exact": step.exact}
    if changes := parameters(step):
        entry["parameters"] = changes
    entry |= {"result": result, "told": result}  # the old name, for one more release
    if not same_structure(shape, job.graph):
        _check_structure(job, step, plugins, shape)
    if reference is not None:
        entry["drift"] = _drift(step, reference, _probe(job.graph, data))
    if not isinstance(job.plan, Plan):
        raise LawBroken(
            f"pass '{step.name}' leaves a {type(job.plan).__name__} in job.plan; write job.plan |= "
            "{name: spec}, which makes a new Plan."
        )
    if (dropped := _drop_stale(job, plan, weights)) and step.stage != "rewrite":
        job.note(
            f"pass '{step.name}' changed {len(dropped)} weight{'s' * (len(dropped) > 1)} ('{dropped[0]}') without its entry "
            "in the plan: what earlier passes solved for it is dropped"
        )
    if not same_structure(shape, job.graph):
        job.plan |= missing(job)
        job.plan = job.plan.without(*idle(job, read))
    for name, spec in job.plan.items():
        if spec is not plan.get(name) and (problem := entry_problem(job.graph, name, spec)):
            raise LawBroken(
                f"the planned entry of '{name}' that pass '{step.name}' leaves {problem}; this is a bug of the pass."
            )
    return entry


def _drift(step: Pass, before: list[Any], after: list[Any]) -> float:
    """By how much an exact pass moved the float function. Raises LawBroken beyond the limit."""
    drift = measure.drift(before, after)
    if drift > DRIFT:
        raise LawBroken(
            f"pass '{step.name}' changed the float function by {drift:.1e} (limit {DRIFT:.0e}) though "
            "it declares exact = True; this is a bug of the pass: fix it, or declare exact = False."
        )
    return drift


def _check_structure(job: Job, step: Pass, plugins: Plugins, before: Structure) -> None:
    """Mend what a pass made of the graph. Raises LawBroken if no file can hold it, or onnxruntime does not load it.

    before   the structure that the pass found
    """
    problem = mend(job.graph, before)
    if not problem:
        try:
            weights: dict[str, Array] = {}
            runtimes.session(job.graph.model(weights), optimize=False, weights=weights)
        except OnnxqError as error:
            text = str(error).rstrip(".")
            named = newest_named(job.graph, before, text)
            problem = f"cannot be loaded ({text})" + (f"; this is about {named}" if named else "")
    if problem:
        raise LawBroken(
            f"the graph that pass '{step.name}'{_by(step, plugins)} leaves {problem}; this is a bug of the pass."
        )


def _by(step: Pass, plugins: Plugins) -> str:
    """The package of a pass, in brackets, and its version; the file and line of the pass where no package is known."""
    source = plugins.sources.get(f"pass {step.name}", "")
    if source in plugins.versions:
        return f" ({source} {plugins.versions[source]})"
    code = type(step).apply.__code__ if hasattr(type(step).apply, "__code__") else None
    return f" ({'/'.join(Path(code.co_filename).parts[-2:])}, line {code.co_firstlineno})" if code is not None else ""


def _drop_stale(job: Job, before: Plan, weights: dict[str, bytes]) -> list[str]:
    """Drop solutions of what a pass changed without planning it anew, and entries of tensors that are gone. Returns the
    weights of layers whose solutions are dropped."""
    changed = {n for n, w in _weights(job.graph).items() if n in weights and w != weights[n]} | job.graph.touched
    stale = [n for n in changed if n in job.plan and job.plan[n].solved and job.plan[n] is before.get(n)]
    job.plan |= {n: job.plan[n].request() for n in stale}
    if gone := [n for n in job.plan if n not in job.graph and n in before]:
        job.plan = job.plan.without(*gone)
    return sorted(weights.keys() & set(stale))


def _guarded(step: Pass, run: Callable[[], Any], plugins: Plugins) -> dict[str, Any]:
    """What a pass returns. Raises LawBroken where it fails by anything but an OnnxqError, and for what reports cannot
    hold."""
    try:
        result = run()
    except OnnxqError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        source = plugins.sources.get(f"pass {step.name}", "")
        by = f" ({source} {plugins.versions[source]})" if source in plugins.versions else ""
        file = getattr(sys.modules.get(type(step).__module__), "__file__", None)
        home = None if file is None else Path(file).parent if Path(file).name == "__init__.py" else Path(file)
        raise LawBroken(
            f"pass '{step.name}'{by} fails with {raised(error, home)}; this is a bug of the pass, or "
            "of what it was given to call."
        ) from error
    try:
        if result is None:  # an `apply` without one leaves {}
            raise LawBroken(f"{_wrappers(plugins)} returns nothing around pass '{step.name}'; end it with: return result.")
        if not isinstance(result, dict):
            raise TypeError(f"it is a {type(result).__name__}")
        json.dumps(result, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LawBroken(
            f"pass '{step.name}' returns what a report cannot hold ({error}); return a dict of plain numbers, "
            "text, lists and dicts, such as int(n) for a numpy number."
        ) from error
    return result


def _wrappers(plugins: Plugins) -> str:
    """Those that run around passes, for a sentence."""
    around = [h for h in plugins.manager.hook.onnxq_run_pass.get_hookimpls() if h.wrapper or h.hookwrapper]
    return "onnxq_run_pass of " + " or ".join(f"plugin '{h.plugin_name}'" for h in around)


def _weights(graph: Graph) -> dict[str, bytes]:
    """A fingerprint of each layer's weight."""
    return {layer.weight: graph.content(layer.weight) for layer in graph.layers}


def is_random(graph: Graph, data: Data | None) -> bool:
    """True if the float model gives other outputs for the same input, so that nothing can be said about its function."""
    weights: dict[str, Array] = {}
    return runtimes.is_random(runtimes.session(graph.model(weights), weights=weights), _feeds(graph, data)[0])


def _probe(graph: Graph, data: Data | None) -> list[Any]:
    """Outputs of the float model on some feeds."""
    weights: dict[str, Array] = {}
    return runtimes.per_feed(runtimes.session(graph.model(weights), weights=weights), _feeds(graph, data))


def _feeds(graph: Graph, data: Data | None) -> list[dict[str, Array]]:
    """A few samples, or noise where there are none (whole numbers: 1, so that they are rows
    of a table, and nothing is masked; images of dynamic size: 128)."""
    if data is not None:
        return list(islice(data, 4))
    rng = np.random.default_rng(0)
    shapes = {
        i.name: [n if isinstance(n, int) else 128 if len(shape) == 4 and a > 1 else 1 for a, n in enumerate(shape)]
        for i in graph_inputs(graph)
        for shape in [i.shape or ()]
    }
    return [
        {
            i.name: (rng.standard_normal(shapes[i.name]) if i.dtype.kind == "f" else np.ones(shapes[i.name])).astype(i.dtype)
            for i in graph_inputs(graph)
        }
    ]


# ---- other hooks of guests ------------------------------------------------------------------------------------------------


def proposed(plugins: Plugins, job: Job, cause: Cause, layer: Layer | None) -> tuple[Remedy, ...]:
    """What all plugins propose against a cause, built-ins first. Raises LawBroken for what is no list of remedies."""
    found: list[Remedy] = []
    for label, propose in plugins.each("onnxq_remedies"):
        given = propose(cause=cause, layer=layer, job=job)
        wrong = [one for one in given if not isinstance(one, Remedy)] if isinstance(given, (list, tuple)) else [given]
        if wrong:
            what = "nothing" if wrong[0] is None else f"a {type(wrong[0]).__name__}"
            raise LawBroken(
                f"onnxq_remedies of plugin {plugins.owner(label)} returns {what} where a list of Remedy values is wanted; "
                "return [] for none."
            )
        found += given
    return tuple({one.typed: one for one in found}.values())


def exporting(plugins: Plugins, job: Job, model: ModelProto, beside: bool = False) -> ModelProto:
    """The model that all plugins make of an exported one. Raises LawBroken where one leaves no valid file, or one that the
    target does not take; OnnxqError for operators that the target has not.

    beside   its constants are beside it, and not written yet: plugins are not called, and a note says so
    """
    unfit = misfits(job.target, model)
    for label, change in plugins.each("onnxq_exporting"):
        who, ports = f"onnxq_exporting of plugin {plugins.owner(label)}", _ports(model)
        if beside:
            job.note(f"{who} was not called: the constants of so large a model are written beside it")
            continue
        made = change(job=job, model=model)
        if not isinstance(made, ModelProto):
            what = "nothing" if made is None else f"a {type(made).__name__}"
            raise LawBroken(f"{who} returns {what} instead of a ModelProto; end it with: return model.")
        if _ports(made) != ports:
            raise LawBroken(f"{who} changes the inputs and outputs {ports} to {_ports(made)}; keep their names and order.")
        _check_file(who, job, made)
        if new := [text for text in misfits(job.target, made) if text not in unfit]:
            raise LawBroken(f"what {who} returns is no file for target '{job.target.name}': it {new[0]}.")
        model = made
    OnnxqError.check(missing_operators(job.target, model))
    if job.target.foreign:
        for text in unfit:
            job.note(f"the file {text}, which target '{job.target.name}' does not declare")
    return model


def _check_file(who: str, job: Job, model: ModelProto) -> None:
    """Raise LawBroken for a model that is not valid, or that onnxruntime does not load.

    who   made it
    """
    try:
        onnx.checker.check_model(model)
        runtimes.session(model, optimize=False)
    except OnnxqError as error:
        if not job.target.foreign:
            raise LawBroken(f"what {who} returns cannot be loaded ({str(error).rstrip('.')}).") from error
    except Exception as error:  # onnx raises types of its own
        text = " ".join(str(error).partition("==>")[0].split())[:200].rstrip(".")
        raise LawBroken(f"what {who} returns is no valid model, onnx.checker says: {text}.") from error


def _ports(model: ModelProto) -> list[str]:
    return [port.name for ports in (model.graph.input, model.graph.output) for port in ports]
