"""What a target cannot express, in sentences that name the valid choices and the setting nearest to the refused one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.bodies import all_graphs
from onnxq_plugins.graph.lowering import lower_opset
from onnxq_plugins.graph.opsets import NARROW_OPSET, NEWEST_OPSET, expand_all, raise_opset
from onnxq_plugins.spec import Plan, QuantSpec
from onnxq_plugins.targets import BUILTIN
from onnxq_plugins.targets.target import Rule, Target, channel_multipliers, granularity_of


def problems(target: Target, graph: Graph, plan: Plan, inputs: Mapping[str, str]) -> list[str]:
    """Everything in a plan that the target cannot express, each with the valid choices.

    inputs   planned layers by name -> the planned activation they read, "" for float (`Planned.input`)
    """
    refused: dict[tuple[str, str, str], dict[str, list[str]]] = {}  # form, inputs, advice -> names of layers by operator
    others: dict[str, list[str]] = {}  # sentence with a placeholder -> names of layers
    for layer in (layer for layer in graph.layers if layer.weight in plan):
        weight, key = plan[layer.weight], inputs[layer.name]
        bits = plan[key].bits if key else 0
        rule = target.rule(layer, weight, bits)
        if rule is None:
            form = weight.describe((layer.out_axis, layer.in_axis))
            beside = f"{bits}-bit activations" if bits else "float activations (weight-only)"
            by_op = refused.setdefault((form, beside, _advice(target, layer, weight, bits)), {})
            by_op.setdefault(layer.op, []).append(layer.name)
        elif text := too_wide(target, rule, layer, weight):
            others.setdefault(text, []).append(layer.name)
        if weight.shift is not None and not layer.takes_bias:
            text = (
                f"{layer.op} {{}} has no bias that its planned shift could be added to; leave out the shift of its weight."
            )
            others.setdefault(text, []).append(layer.name)
    activations = {name: spec for name, spec in plan.items() if not graph.is_constant(name)}
    return [
        *(_refusal(target, *form, by_op) for form, by_op in refused.items()),
        *(text.format(_names(names)) for text, names in others.items()),
        *_narrow_problems(target, plan),
        *_activation_problems(target, activations),
    ]


def _refusal(target: Target, form: str, beside: str, advice: str, by_op: Mapping[str, list[str]]) -> str:
    """Why layers cannot run as requested, and how they can, in one sentence for all of them."""
    runs: dict[str, list[str]] = {}
    for op in by_op:
        runs.setdefault(choices(target, op) or f"no quantized {op}", []).append(op)
    valid = "; ".join(text if len(runs) == 1 else f"{' and '.join(ops)}: {text}" for text, ops in runs.items())
    layers = " and ".join(f"{op} {_names(names)}" for op, names in by_op.items())
    return f"target '{target.name}' cannot run {layers} with {form} weights and {beside}; it runs {valid}." + advice


def missing_operators(target: Target, model: onnx.ModelProto) -> list[str]:
    """What a model has that the runtime has not, in one sentence with counts; [] if nothing."""
    have = target.operators | {"QuantizeLinear", "DequantizeLinear"}
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node]
    left = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes if n.domain or n.op_type not in have)
    if not left or not target.operators:
        return []
    names = ", ".join(f"{op} ({n})" for op, n in left.most_common())
    return [f"target '{target.name}' has no {names}; replace them in the model, or give the target what it has."]


def unheld(target: Target, graph: Graph) -> list[str]:
    """Operators of the float model that a target has not, as far as they are known before anything is quantized."""
    lowest, highest = target.opsets
    if not target.operators and not highest:
        return []
    model = graph.model({}, expand=False)
    raise_opset(model, lowest)
    try:
        lower_opset(model, highest or NEWEST_OPSET, target.name)
    except OnnxqError as error:
        return [*error.problems]
    expand_all(model)
    return missing_operators(target, model)


def _narrow_problems(target: Target, plan: Plan) -> Iterator[str]:
    """Codes that need a newer opset than the runtime reads."""
    highest = target.opsets[1]
    if 0 < highest < NARROW_OPSET and needs_narrow(target, plan):
        yield (
            f"target '{target.name}' reads opset {highest} at most, and codes of 4 or 16 bits, multipliers and scales per "
            f"block need {NARROW_OPSET}; plan weights of 5 to 8 bits, and activations of 8."
        )


def needs_narrow(target: Target, plan: Plan) -> bool:
    """True if a plan asks for codes of 4 or 16 bits, for multipliers, which have 4 bits where they fit, or for scales per
    block: these came with `NARROW_OPSET`. Where all weights are int8 in the file, only for codes of 16 bits."""
    if all(rule.storage == "int8" for rule in target.rules):
        return any(spec.bits > 8 for spec in plan.values())
    return any(
        spec.bits <= 4
        or spec.bits > 8
        or max(spec.sub_block or (0,)) > 1
        or (spec.block is not None and len(spec.block) == 2 and max(spec.block) > 1)
        for spec in plan.values()
    )


def choices(target: Target, op: str) -> str:
    """The supported forms of one operator in words."""
    forms: dict[tuple[str, str], set[int]] = {}  # (granularity of scales, what runs) -> widths
    for rule in (r for r in target.rules if r.op == op):
        where = " or ".join(_blocks(rule.blocks) if g == "block" and rule.blocks else f"per {g}" for g in rule.granularity)
        where += " (and integer multipliers per sub_block)" if rule.multipliers else ""
        beside = f"{rule.activations}-bit" if rule.activations else "float"
        forms.setdefault((where, f"{beside} activations ({rule.kernel})"), set()).update(rule.weights)
    return "; ".join(f"{_widths(widths)}-bit weights {where} with {runs}" for (where, runs), widths in forms.items())


def too_wide(target: Target, rule: Rule, layer: Layer, weight: QuantSpec) -> str:
    """Why the codes of a weight do not fit the target's kernels; "" if they do."""
    if rule.storage == "float" or not rule.activations:
        return ""
    if weight.sub_block and not channel_multipliers(layer, weight):
        largest = weight.multipliers[-1] if weight.multiplier is None else np.max(weight.multiplier)
        if largest * weight.top <= target.max_code:
            return ""
        return (
            f"{layer.op} {{}}: {weight.bits}-bit codes times multipliers up to {largest} "
            f"reach {largest * weight.top}, target '{target.name}' runs codes up to {target.max_code}; "
            f"set max_multiplier = {target.max_code // weight.top}."
        )
    if rule.activations == 8 and (reach := _reach(weight)) > target.max_code:
        return (
            f"{layer.op} '{layer.name}' is planned with {weight.bits}-bit codes up to {reach}, target "
            f"'{target.name}' runs codes up to {target.max_code} beside 8-bit activations; plan {target.code_bits} bits."
        )
    return ""


def _activation_problems(target: Target, activations: Mapping[str, QuantSpec]) -> Iterator[str]:
    widths = target.activation_bits
    types = " or ".join(f"{'int' if target.centred(n) else 'uint'}{n}" for n in widths)
    bits = " or ".join(map(str, widths))
    runs = [f"{types} per tensor (activations.bits = {bits})"] if widths else []
    refused: dict[str, list[str]] = {}
    for name, spec in activations.items():
        if spec.bits not in widths or _mirrored(target, spec) or spec.block is not None:
            refused.setdefault(spec.describe(), []).append(name)
    for form, names in refused.items():
        other = all(_mirrored(target, activations[name]) for name in names) and runs
        hint = f": set activations.symmetric = {str(not activations[names[0]].symmetric).lower()}" if other else ""
        yield (
            f"target '{target.name}' cannot run activation{'s' * (len(names) > 1)} {_names(names)} as {form}; it runs "
            f"{', or '.join([*runs, 'float (activations.bits = 32)'])}{hint}."
        )


def _mirrored(target: Target, spec: QuantSpec) -> bool:
    """True if an activation is symmetric where the target has no such grid, or the other way round."""
    centred = target.centred(spec.bits)
    return spec.symmetric != centred and not (target.either and spec.symmetric)


def _advice(target: Target, layer: Layer, weight: QuantSpec, activations: int) -> str:
    """The setting nearest to a refused one."""
    shape = granularity_of(layer, weight)
    if 0 < activations < min(target.activation_bits, default=0):
        other = next((t.name for t in BUILTIN if activations in t.activation_bits), "")
        return f" Target '{other}' reads {activations}-bit activations." if other else ""
    if not weight.symmetric:
        return " Set weights.symmetric = true."
    if shape == "channel" and "channel" not in target.granularities(layer.op):
        return " Set weights.block = \"tensor\"; pass 'shift-equalize' then serves channels of unequal ranges."
    if weight.sub_block is not None and shape in ("block", "tile"):
        return ' Multipliers refine one scale per tensor or channel: set weights.block to "channel" or "tensor".'
    anything = next(t.name for t in BUILTIN if not t.integer)  # a target that stores every granularity
    if weight.sub_block is not None:
        sizes = sorted({b for r in target.rules if r.op == layer.op and r.activations == activations for b in r.blocks})
        free = f", for float scales {_blocks(tuple(sizes))} set weights.block" if sizes else ""
        return (
            f" Integer multipliers need 8-bit activations: leave weights.sub_block out{free}; target '{anything}' "
            "takes them and runs in float."
        )
    if shape in ("block", "tile") and activations and any(r.op == layer.op and r.multipliers for r in target.rules):
        assert weight.block is not None
        tile = [weight.block[layer.out_axis], weight.block[layer.in_axis]]
        coarse = "channel" if tile[0] == 1 else "tensor"
        return (
            f" Integer multipliers run at integer speed: set weights.sub_block = {tile} and weights.block = "
            f"\"{coarse}\"; target '{anything}', with activations.bits = 32, stores float scales and runs in float."
        )
    return ""


def _blocks(sizes: tuple[int, ...]) -> str:
    *first, last = map(str, sizes)
    return f"per {', '.join(first)}{' or ' * bool(first)}{last} inputs"


def _reach(weight: QuantSpec) -> int:
    """Largest |code| of a weight, or the largest possible while it is open."""
    return int(np.abs(weight.codes).max(initial=0)) if weight.codes is not None else weight.top


def _widths(widths: set[int]) -> str:
    run = len(widths) == max(widths) - min(widths) + 1 > 2
    return f"{min(widths)} to {max(widths)}" if run else " or ".join(str(n) for n in sorted(widths))


def _names(names: list[str]) -> str:
    """Up to four names, or three and the number of the others."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 4 else ", ".join(f"'{name}'" for name in names)
