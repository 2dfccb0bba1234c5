"""From graph, recipe and target to the first Plan: which tensors are quantized, at which bits and granularity.

Layers follow the recipe. Operators between them (Add, Concat, pooling ...) become integer where that keeps a chain integer
from one layer to the next, and stay float elsewhere: conversions on both sides of a single operator cost more than it gains.

Gemm and MatMul get no output entry where float operators read them: their integer kernels write float directly, and an
output Q would cost time and accuracy. Convolutions need one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError, Reason, counted
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.flow import activation_inputs, readers, result_of, source_of
from onnxq_plugins.job import FLOAT, Job, Recipe, TensorRequest
from onnxq_plugins.job.tables import matches
from onnxq_plugins.job.weights import activation_request, narrowed, one_scale, weight_spec
from onnxq_plugins.plan.constants import ConstantRequest, constant_requests
from onnxq_plugins.plan.grids import float_ends, natural_grids
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import Plan, QuantSpec
from onnxq_plugins.targets import Target, channel_block
from onnxq_plugins.targets.reading import joins

FASTER = Reason("slower", "it is faster in float, or as fast, conversions included")


@dataclass(frozen=True)
class Request:
    """A plan of requests (nothing solved), with the reasons for what stays float.

    inputs     planned layers by name -> the planned activation they are to read, "" for weight-only
    constants  those outside layers, each with its entry or why it stays float
    """

    plan: Plan
    inputs: dict[str, str]
    floats: dict[str, Reason]
    constants: tuple[ConstantRequest, ...] = ()


def request(
    graph: Graph, recipe: Recipe, target: Target, unfit: Collection[str] = (), placed: Collection[str] = ()
) -> Request:
    """The first plan. Raises OnnxqError, all problems at once, if a rule matches nothing or a block does not fit.

    unfit    activations that are NaN or infinite: they, and the operators that read or write them, stay float
    placed   operators that run in float because that is faster: weights of layers are stored like those of the others,
             where the target decodes them at load
    """
    unfit = {graph.root(name) for name in unfit if name in graph} | set(unfit)
    problems: list[str] = []
    floats: dict[str, Reason] = {}
    plan: dict[str, QuantSpec] = {}
    integer: dict[str, TensorRequest] = {}  # node name -> the request of its inputs
    unmatched = set(range(len(recipe.layers)))
    for i, layer in enumerate(graph.layers):
        weights, activations, quantize = recipe.settings(layer.name, layer.op, layer.kind, _ends(graph, i), unmatched)
        reason = _why_float(graph, layer, weights, activations, quantize, target, unfit)
        if reason is not None:
            floats[layer.name] = reason
            continue
        if target.only_stores(layer.op):
            plan[layer.weight] = _stored(graph, layer, recipe, weights)
            continue
        weight_only = activations.bits == FLOAT
        if weight_only and not _weight_only(target, layer.op):
            floats[layer.name] = Reason("weight-only", f"target '{target.name}' has no weight-only {layer.op}")
            plan |= _decoded(layer, _stored(graph, layer, recipe, weights), target)
            continue
        bits = weights.bits if weight_only else narrowed(weights.bits, target)
        plan[layer.weight] = weight_spec(layer, replace(weights, bits=bits), target, problems)
        if layer.name in placed and not weight_only:
            floats[layer.name] = FASTER
            plan |= _decoded(layer, plan.pop(layer.weight), target)
        elif not weight_only:
            integer[layer.name] = activations
    products = _products(graph, recipe, target, unfit, unmatched)
    integer |= {name: activations for name, activations in products.items() if name not in placed}
    outside = constant_requests(graph, recipe, target, unmatched)
    OnnxqError.check([*problems, *_idle_rules(graph, recipe, unmatched)])
    stored = {each.constant.name: each.spec for each in outside if each.spec is not None}
    chain = _chain(graph, target, set(integer), unfit, {*placed, *graph.floats}) if recipe.activations.bits != FLOAT else ()
    activation_request = {**integer, **dict.fromkeys(chain, recipe.activations)}
    whole = Plan(plan) | stored | _activations(graph, target, activation_request)
    view = Planned(graph, whole, target)
    inputs = {layer.name: view.source(layer.input) if layer.name in integer else "" for layer in view.layers}
    return Request(whole, inputs, floats, tuple(outside))


def _idle_rules(graph: Graph, recipe: Recipe, unmatched: Collection[int]) -> list[str]:
    """Problems with rules for single layers that there are not."""
    names = ", ".join(layer.name for layer in graph.layers[:6])
    return [
        f"recipe, layer {n + 1}: nothing matches {' or '.join(map(repr, recipe.layers[n].patterns))}; layers are named "
        f"{names} ..."
        for n in sorted(unmatched)
        if not recipe.layers[n].everywhere
    ]


def adapted(job: Job) -> Iterator[str]:
    """Notes on weights that the plan of a job holds in another form than the recipe says, as the target knows no other; and
    on a plan that holds none."""
    target, planned = job.target, [(at, y) for at, y in enumerate(job.graph.layers) if y.weight in job.plan]
    fewer, coarser, decoded = 0, 0, set[str]()
    for at, layer in planned:
        spec = job.plan[layer.weight]
        weights, activations, _ = job.recipe.settings(layer.name, layer.op, layer.kind, _ends(job.graph, at))
        if activations.bits != FLOAT and not target.only_stores(layer.op):
            fewer += spec.bits == narrowed(weights.bits, target) != weights.bits
            coarser += spec.block is None and one_scale(layer, weights, target)
        elif activations.bits == FLOAT and spec.decoded and not _weight_only(target, layer.op):
            decoded.add(layer.op)
    if fewer:
        yield (
            f"weight codes of {target.code_bits} bits in {counted(fewer, 'layer')}, since target '{target.name}' "
            f"allows |code| <= {target.max_code}"
        )
    if coarser:
        yield (
            f"one scale for the weight in {counted(coarser, 'layer')}, since target '{target.name}' knows none per channel; "
            "passes that even out channels, such as shift-equalize, help"
        )
    if decoded:
        yield (
            f"target '{target.name}' has no weight-only {' and '.join(sorted(decoded))}: their weights are stored in 8 "
            "bits per channel and decoded at load"
        )
    if job.graph.layers and not planned:
        yield "no layer is quantized"


def _products(
    graph: Graph, recipe: Recipe, target: Target, unfit: Collection[str], unmatched: set[int]
) -> dict[str, TensorRequest]:
    """Products of two activations that are to be integer, with the requests of their inputs."""
    ops, integer = {rule.op for rule in target.rules}, {}
    for node in graph.nodes:
        if node.op == "MatMul" and not node.domain and not any(graph.is_constant(t.name) for t in node.inputs):
            _, activations, quantize = recipe.settings(node.name, "Attention", "", {}, unmatched)
            pays = "MatMul" in ops and 0 < target.attention <= _multiply_adds(graph, node)
            pays = pays or (target.whole and node.op in target.integer_ops)
            fit = set(unfit).isdisjoint(graph.root(name) for name in activation_inputs(graph, node))
            fit = fit and node.name not in graph.floats and activations.bits != FLOAT
            if fit and (quantize or (quantize is None and pays)):
                integer[str(node.name)] = activations
    return integer


def _decoded(layer: Layer, weight: QuantSpec, target: Target) -> dict[str, QuantSpec]:
    """The entry of the weight of a layer that runs in float: codes that are decoded at load, where the target does that."""
    stored = replace(weight, decoded=True)
    rule = target.rule(layer, stored, 0)
    return {layer.weight: stored} if rule is not None and rule.storage == "float" else {}


def _why_float(
    graph: Graph,
    layer: Layer,
    weights: TensorRequest,
    activations: TensorRequest,
    quantize: bool | None,
    target: Target,
    unfit: Collection[str],
) -> Reason | None:
    """Why a layer stays float; None if it does not."""
    rules = [rule for rule in target.rules if rule.op == layer.op]
    if quantize is False or weights.bits == FLOAT or layer.name in graph.floats:
        return Reason("recipe", "the recipe leaves it float")
    if not rules:
        return Reason("unsupported", f"target '{target.name}' has no quantized {layer.op}")
    if not target.fits(layer) and not target.only_stores(layer.op):
        return Reason("unsupported", f"target '{target.name}' needs channels in multiples of {target.aligned}")
    if not set(unfit).isdisjoint((graph.root(layer.input), layer.input, layer.output, layer.result)):
        return Reason("not-finite", "it reads or writes values that are NaN or infinite in the float model")
    if activations.bits == FLOAT and not _weight_only(target, layer.op) and not target.decodes:
        return Reason("weight-only", f"target '{target.name}' has no weight-only {layer.op}")
    return None


def _weight_only(target: Target, op: str) -> bool:
    """True if a target runs layers of an operator with quantized weights beside float inputs."""
    return any(not rule.activations for rule in target.rules if rule.op == op)


def pinned(graph: Graph, recipe: Recipe) -> set[str]:
    """Names of the layers for which a [[layer]] rule of the recipe sets the bits of the weight."""
    return {name for name, keys in rule_keys(graph, recipe).items() if "weights.bits" in keys}


def rule_keys(graph: Graph, recipe: Recipe) -> dict[str, frozenset[str]]:
    """Layer -> the keys that [[layer]] rules about it set, such as ``quantize`` or ``weights.bits``."""
    keys: dict[str, frozenset[str]] = {}
    for i, layer in enumerate(graph.layers):
        rules = [r for r in recipe.layers if matches(r, layer.name, layer.op, layer.kind, _ends(graph, i))]
        keys[layer.name] = frozenset(
            [
                *(f"{table}.{key}" for r in rules for table in ("weights", "activations") for key in getattr(r, table)),
                *("quantize" for r in rules if r.quantize is not None),
            ]
        )
    return keys


def weight_request(graph: Graph, recipe: Recipe, target: Target, layer: Layer, bits: int) -> QuantSpec:
    """The request that the recipe, with its rules for single layers, would make of a layer's weight at another width:
    granularity and multipliers as far as this width leaves room for them, and no wider than the target's codes may be.
    Whether the target runs it is up to `Target.rule`. Raises OnnxqError if a block does not fit the layer."""
    place = [other.name for other in graph.layers].index(layer.name)
    weights, activations, _ = recipe.settings(layer.name, layer.op, layer.kind, _ends(graph, place), set())
    if activations.bits == FLOAT and target.decodes and not _weight_only(target, layer.op):
        return QuantSpec(bits, True, channel_block(layer), decoded=True)
    problems: list[str] = []
    spec = weight_spec(
        layer, replace(weights, bits=bits if activations.bits == FLOAT else narrowed(bits, target)), target, problems
    )
    OnnxqError.check(problems)
    return spec


def _stored(graph: Graph, layer: Layer, recipe: Recipe, weights: TensorRequest) -> QuantSpec:
    """The request of a weight that the target only stores: 8 bits per channel, or the bits that a rule sets."""
    return QuantSpec(weights.bits if layer.name in pinned(graph, recipe) else 8, True, channel_block(layer))


def _ends(graph: Graph, place: int) -> dict[str, bool]:
    """Whether the layer at a place is the first, or the last, of the network."""
    return {"first": place == 0, "last": place == len(graph.layers) - 1}


def _multiply_adds(graph: Graph, node: Any) -> int:
    """Multiply-adds of one product of two activation matrices; 0 if their shapes are not known."""
    a, b = (graph.shape(t.name) for t in node.inputs)
    sizes = [*a[-2:], b[-1]] if a is not None and b is not None and len(a) > 1 and len(b) > 1 else []
    return int(np.prod([n for n in sizes if isinstance(n, int)])) if sizes and all(isinstance(n, int) for n in sizes) else 0


def _chain(graph: Graph, target: Target, layers: set[str], unfit: Collection[str], placed: Collection[str]) -> set[str]:
    """Operators other than layers that stay integer: every input comes from an integer operator and at least one
    reader is integer. The largest such set without those that are `placed` in float; all there are, where a target quantizes
    as a whole."""
    known = layers | {layer.name for layer in graph.layers} if target.whole else layers
    nodes = {
        node.name: node
        for node in graph.nodes
        if node.name not in {*known, *placed}
        and joins(graph, target, node)
        and (node.op != "MatMul" or len(activation_inputs(graph, node)) == 1)  # products are decided one by one
        and all(graph.tensor(t).dtype == np.float32 and graph.root(t) not in unfit for t in activation_inputs(graph, node))
        and result_of(graph, node) not in unfit
    }
    chain = set(nodes)
    while not target.whole:
        inside = layers | chain
        kept = {
            name
            for name in chain
            if all(source_of(graph, t) in inside for t in activation_inputs(graph, nodes[name]))
            and readers(graph, result_of(graph, nodes[name])) & inside
        }
        if kept == chain:
            break
        chain = kept
    return chain


def _activations(graph: Graph, target: Target, integer: Mapping[str, TensorRequest]) -> Plan:
    """Entries for what integer operators read, and for what they write where the kernel needs an output scale."""
    reads: dict[str, list[tuple[str, TensorRequest]]] = defaultdict(list)  # root -> the tensors of its readers
    layers = {layer.name: layer for layer in graph.layers}
    specs: dict[str, QuantSpec] = {}

    for node in graph.nodes:
        if node.name in integer:
            for name in activation_inputs(graph, node):
                reads[graph.root(name)].append((name, integer[node.name]))
            if node.op in target.output_scale or (node.name not in layers and node.op != "MatMul"):
                specs[result_of(graph, node)] = activation_request(integer[node.name], target)
    for root, pairs in reads.items():
        parts: dict[str, list[TensorRequest]] = defaultdict(list)
        alone = len({name for name, _ in pairs}) == 1
        for name, request in pairs:
            parts[name if alone else _part(graph, name)].append(request)
        # behind a float operator parts that are read get grids of their own, where they are smaller than the whole, and so
        # does what pooling leaves, which is slow on codes that no integer operator wrote
        pooled = any((node := graph.producer(name)) is not None and node.op == "MaxPool" for name in parts)
        apart = (
            source_of(graph, root) not in integer and (alone or pooled or _smaller(graph, parts, root)) and not target.whole
        )
        for name, requests in parts.items() if apart else [(root, [request for _, request in pairs])]:
            specs[name] = activation_request(max(requests, key=lambda request: request.bits), target)
    plan = Plan(specs).without(*float_ends(graph, target))
    return plan | natural_grids(graph, target, plan)


def _part(graph: Graph, name: str) -> str:
    """The tensor that holds the same values as `name`, moved about: followed upwards to where they are a part of another."""
    while (node := graph.producer(name)) is not None and graph.is_shape_only(node):
        if node.op in ("Slice", "Gather", "MaxPool") or len(node.outputs) > 1:
            break
        name = node.inputs[0].name
    return name


def _smaller(graph: Graph, parts: Collection[str], whole: str) -> bool:
    """True if some tensors of known rank have fewer values in all than another; axes of unknown size count as 1."""
    shapes = [graph.shape(name) for name in (*parts, whole)]
    sizes = [math.prod(n for n in shape if isinstance(n, int)) for shape in shapes if shape is not None]
    return len(sizes) == len(shapes) and sum(sizes[:-1]) < sizes[-1]
