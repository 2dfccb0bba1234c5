"""What a runtime can execute and how it wants it stored: data, no code paths. docs/runtime.md is the evidence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.core import LAYER_OPS
from onnxq_plugins.spec import Block, Plan, QuantSpec

Granularity = Literal["tensor", "channel", "block", "tile"]
Storage = Literal["int8", "int4", "blocked", "float"]


@dataclass(frozen=True)
class Rule:
    """One form of a layer that the runtime executes in a quantized kernel.

    op            Conv, Gemm, MatMul ...
    kernel        the operator that then runs
    activations   bits of the unsigned input; 0: the input stays float (weight-only)
    weights       widths of weight codes
    granularity   of the weight's scale: ``tensor``, output ``channel``, ``block`` of inputs within a channel, or ``tile``
                  of several channels
    storage       ``int8``: int8 -> DequantizeLinear; ``int4``: INT4 -> Cast(INT8) -> DequantizeLinear, folded at load;
                  ``blocked``: DequantizeLinear with a block size; ``float``: codes -> Cast -> Mul(scale), folded into a
                  float weight at load
    blocks        block sizes along the inputs that `granularity` ``block`` allows; empty: any
    multipliers   integer multipliers per sub-block may refine a scale per tensor or channel
    narrow        beside ``int8``: channels whose codes fit 4 bits are stored as INT4 -> Cast(INT8), and a Concat with the
                  others is folded at load
    """

    op: str
    kernel: str
    activations: int
    weights: tuple[int, ...]
    granularity: tuple[Granularity, ...]
    storage: Storage
    blocks: tuple[int, ...] = ()
    multipliers: bool = False
    narrow: bool = False


@dataclass(frozen=True)
class Target:
    """A runtime.

    rules         forms of layers it runs quantized
    integer_ops   other operators with an integer kernel, which keep a chain of layers integer
    output_scale  layers that must write quantized outputs to run as integer (the others may write float)
    max_code      largest |code| of a weight beside 8-bit activations
    attention     multiply-adds from which one product of two activation matrices pays as integer; 0 for never
                  (`python -m benchmarks.kernels` times some)
    flatten       MatMul + Add(bias) on tokens runs faster as a two-dimensional Gemm (onnxruntime has an integer Gemm
                  with bias); OpenVINO 2026.4 fails to load the Reshapes that this needs behind a LayerNormalization
    opset         lowest opset of the exported model
    """

    name: str
    doc: str
    rules: tuple[Rule, ...]
    integer_ops: frozenset[str] = field(default_factory=frozenset)
    output_scale: frozenset[str] = frozenset({"Conv"})
    max_code: int = 127
    attention: int = 0
    flatten: bool = True
    opset: int = 21

    @property
    def here(self) -> bool:
        """True if it stands for onnxruntime on a CPU, so that its models run here as they will there."""
        return self.name.startswith("ort-")

    @property
    def code_bits(self) -> int:
        """Widest symmetric code that stays within `max_code`."""
        return (self.max_code + 1).bit_length()

    @property
    def activation_bits(self) -> list[int]:
        """Widths of the activations that some rule reads, ascending."""
        return sorted({rule.activations for rule in self.rules} - {0})

    def rule(self, layer: Layer, weight: QuantSpec, activations: int) -> Rule | None:
        """The rule a layer falls under, or None if the target has no quantized kernel for it."""
        shape = granularity(layer, weight)
        for rule in self.rules:
            fits = (
                rule.op == layer.op
                and rule.activations == activations
                and weight.bits in rule.weights
                and shape in rule.granularity
                and weight.symmetric
            )
            if weight.sub_block is not None and not channel_multipliers(layer, weight):
                fits = fits and rule.multipliers and shape in ("tensor", "channel")
            if fits and shape == "block" and weight.block is not None and rule.blocks:
                fits = weight.block[layer.in_axis] in rule.blocks
            if fits:
                return rule
        return None

    def problems(self, graph: Graph, plan: Plan, inputs: dict[str, str]) -> list[str]:
        """Every layer of the plan that the target cannot express, each with the valid choices.

        inputs   planned layers by name -> the planned activation they read, "" for float (`planning.layer_input`)
        """
        found = []
        refused: dict[str, list[str]] = {}  # what is said of some layers -> their names
        for layer in graph.layers:
            weight = plan.get(layer.weight)
            if weight is None:
                continue
            key = inputs[layer.name]
            bits = plan[key].bits if key else 0
            rule = self.rule(layer, weight, bits)
            if rule is None:
                refused.setdefault(self.refusal(layer, weight, bits), []).append(layer.name)
            elif bits and rule.storage != "float" and weight.sub_block and not channel_multipliers(layer, weight):
                largest = weight.multipliers[-1] if weight.multiplier is None else np.max(weight.multiplier)
                if largest * weight.grid[1] > self.max_code:
                    found.append(
                        f"{layer.op} '{layer.name}': {weight.bits}-bit codes times multipliers up to {largest} "
                        f"reach {largest * weight.grid[1]}, target '{self.name}' runs codes up to {self.max_code}; "
                        f"set max_multiplier = {self.max_code // weight.grid[1]}."
                    )
            elif bits == 8 and rule.storage != "float" and (reach := _reach(weight)) > self.max_code:
                found.append(
                    f"{layer.op} '{layer.name}' is planned with {weight.bits}-bit codes up to {reach}, target "
                    f"'{self.name}' runs codes up to {self.max_code} beside 8-bit activations; plan "
                    f"{self.code_bits} bits."
                )
            if weight.shift is not None and not layer.takes_bias:
                found.append(
                    f"{layer.op} '{layer.name}' has no bias that its planned shift could be added to; leave the "
                    "shift of its weight out."
                )
        found = [text.format(_names(names)) for text, names in refused.items()] + found
        activations = {name: spec for name, spec in plan.items() if not graph.is_constant(name)}
        widths = self.activation_bits
        for name, spec in activations.items():
            if spec.bits not in widths or spec.symmetric or spec.block is not None:
                runs = (
                    [
                        f"{' or '.join(f'uint{n}' for n in widths)} per tensor (activations.bits = "
                        f"{' or '.join(map(str, widths))})"
                    ]
                    if widths
                    else []
                )
                found.append(
                    f"target '{self.name}' cannot run activation '{name}' as {spec.describe()}; it runs "
                    f"{', or '.join([*runs, 'float (activations.bits = 32)'])}."
                )
        if graph.opset < self.opset:
            kinds = ["4-bit tensors"] if any(spec.bits <= 4 for spec in plan.values()) else []
            kinds += ["16-bit activations"] if any(spec.bits > 8 for spec in activations.values()) else []
            found += [f"{kind} need opset {self.opset}, the model has {graph.opset}; export it again." for kind in kinds]
        return found

    def refusal(self, layer: Layer, weight: QuantSpec, activations: int) -> str:
        """Why a layer cannot run as asked, and how it can; with a place {} for names of layers."""
        way = f"{activations}-bit activations" if activations else "float activations (weight-only)"
        asked = weight.describe((layer.out_axis, layer.in_axis))
        return (
            f"target '{self.name}' cannot run {layer.op} {{}} with {asked} weights and {way}; it "
            f"runs {self.choices(layer.op) or 'no quantized ' + layer.op}." + self._help(layer, weight, activations)
        )

    def _help(self, layer: Layer, weight: QuantSpec, activations: int) -> str:
        """The setting nearest to a refused one."""
        shape = granularity(layer, weight)
        if 0 < activations < min(self.activation_bits, default=0):
            return f" Target 'npu4' reads {activations}-bit activations." if activations in NPU4.activation_bits else ""
        if not weight.symmetric:
            return " Set weights.symmetric = true."
        if shape == "channel" and "channel" not in granularities(self, layer.op):
            return " Set weights.block = \"tensor\"; pass 'shift-equalize' then serves channels of unequal ranges."
        if weight.sub_block is not None and shape in ("block", "tile"):
            return ' Multipliers refine one scale per tensor or channel: set weights.block to "channel" or "tensor".'
        if weight.sub_block is not None:
            sizes = sorted({b for r in self.rules if r.op == layer.op and r.activations == activations for b in r.blocks})
            free = f", for float scales {_blocks(tuple(sizes))} set weights.block" if sizes else ""
            return (
                f" Integer multipliers need 8-bit activations: leave weights.sub_block out{free}; target 'storage' "
                "takes them and runs in float."
            )
        if shape in ("block", "tile") and activations and any(r.op == layer.op and r.multipliers for r in self.rules):
            assert weight.block is not None
            tile = [weight.block[layer.out_axis], weight.block[layer.in_axis]]
            coarse = "channel" if tile[0] == 1 else "tensor"
            return (
                f" Integer multipliers run at integer speed: set weights.sub_block = {tile} and weights.block = "
                f"\"{coarse}\"; target 'storage', with activations.bits = 32, stores float scales and runs in float."
            )
        return ""

    def choices(self, op: str) -> str:
        """The forms of one operator in words."""
        forms: dict[tuple[str, str], set[int]] = {}  # where scales lie, and what runs -> widths
        for rule in (r for r in self.rules if r.op == op):
            where = " or ".join(
                _blocks(rule.blocks) if g == "block" and rule.blocks else f"per {g}" for g in rule.granularity
            )
            where += " (and integer multipliers per sub_block)" if rule.multipliers else ""
            beside = f"{rule.activations}-bit" if rule.activations else "float"
            forms.setdefault((where, f"{beside} activations ({rule.kernel})"), set()).update(rule.weights)
        return "; ".join(f"{_widths(widths)}-bit weights {where} with {runs}" for (where, runs), widths in forms.items())


def _blocks(sizes: tuple[int, ...]) -> str:
    *first, last = map(str, sizes)
    return f"per {', '.join(first)}{' or ' * bool(first)}{last} inputs"


def _reach(weight: QuantSpec) -> int:
    """Largest |code| that a weight has or, while it is open, may get."""
    return int(np.abs(weight.codes).max(initial=0)) if weight.codes is not None else weight.grid[1]


def _widths(widths: set[int]) -> str:
    run = len(widths) == max(widths) - min(widths) + 1 > 2
    return f"{min(widths)} to {max(widths)}" if run else " or ".join(str(n) for n in sorted(widths))


def _names(names: list[str]) -> str:
    """Some names in a sentence."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 4 else ", ".join(f"'{name}'" for name in names)


def granularity(layer: Layer, spec: QuantSpec) -> Granularity:
    """What a block means for a layer's weight."""
    if spec.block is None:
        return "tensor"
    rest = [b for axis, b in enumerate(spec.block) if axis not in (layer.out_axis, layer.in_axis)]
    outputs, inputs = spec.block[layer.out_axis], spec.block[layer.in_axis]
    if outputs == 1 and inputs == 0 and not any(rest):
        return "channel"
    return "block" if outputs == 1 and inputs > 1 and not rest else "tile"


def granularities(target: Target, op: str) -> set[Granularity]:
    """The granularities of weights that a target knows for an operator."""
    return {g for rule in target.rules if rule.op == op for g in rule.granularity}


def channel_block(layer: Layer) -> Block:
    """The block of one scale per output channel."""
    return tuple(1 if axis == layer.out_axis else 0 for axis in range(len(layer.shape)))


def channel_multipliers(layer: Layer, spec: QuantSpec) -> bool:
    """True if one scale of a layer is refined by a multiplier per output channel. Such a multiplier is no part of the codes:
    it joins the scale where a target takes a scale per channel, and becomes a factor behind the layer elsewhere."""
    return spec.block is None and spec.sub_block == channel_block(layer)


def _dense(op: str, kernel: str, activations: int = 8) -> tuple[Rule, ...]:
    return (
        Rule(op, kernel, activations, (5, 6, 7, 8), ("tensor", "channel"), "int8", multipliers=True, narrow=True),
        Rule(op, kernel, activations, (2, 3, 4), ("tensor", "channel"), "int4", multipliers=True),
    )


_NBITS = tuple(
    Rule(op, "MatMulNBits", 0, (bits,), ("block",), "blocked", (16, 32, 64, 128, 256))
    for op in ("MatMul", "Gemm")
    for bits in (4, 8)
)
_CHAIN = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Where"})

ORT_CPU = Target(
    "ort-cpu",
    "onnxruntime on x86-64 with VNNI, or on arm64",
    (*_dense("Conv", "QLinearConv"), *_dense("Gemm", "QGemm"), *_dense("MatMul", "QLinearMatMul"), *_NBITS),
    _CHAIN,
    attention=1_000_000,
)
ORT_CPU_AVX2 = replace(
    ORT_CPU,
    name="ort-cpu-avx2",
    max_code=64,
    doc="onnxruntime on x86-64 without VNNI: weight codes within [-64, 64], since AVX2 adds two "
    "products in 16 bits and would saturate",
)
OPENVINO = Target(
    "openvino",
    "OpenVINO on x86-64",
    (*_dense("Conv", "Convolution int8"), *_dense("Gemm", "FullyConnected int8"), *_dense("MatMul", "FullyConnected int8")),
    _CHAIN,
    attention=1_000_000,
    flatten=False,
)
STORAGE = Target(
    "storage",
    "any runtime, for size on disk: every granularity is allowed, weights are decoded at load, and layers run in float",
    tuple(
        Rule(op, op, activations, tuple(range(2, 9)), ("tensor", "channel", "block", "tile"), "float", multipliers=True)
        for op in LAYER_OPS
        for activations in (8, 0)
    ),
    _CHAIN,
    flatten=False,
)
PER_TENSOR = Target(
    "per-tensor",
    "runtimes and NPUs that know one scale per weight tensor; shifts of single channels "
    "become a power-of-two Mul behind the layer, and are listed in the model's metadata",
    tuple(Rule(op, "int8", 8, tuple(range(2, 9)), ("tensor",), "int8") for op in ("Conv", "Gemm", "MatMul")),
    _CHAIN,
    flatten=False,
)
NPU = Target(
    "npu",
    "NPUs with 8- and 16-bit activations; in onnxruntime layers with 16-bit activations run in float",
    tuple(
        rule
        for op in ("Conv", "Gemm", "MatMul")
        for rule in (*_dense(op, "int8"), *_dense(op, "W2..8A16, float in onnxruntime", 16))
    ),
    _CHAIN,
    flatten=False,
)
NPU4 = Target(
    "npu4",
    "hardware whose products have 4 bits: layers read activations of 4 bits, with weights of up to 4, or "
    "of 8; what they write is wider; in onnxruntime codes are uint8, and convolutions run in float",
    tuple(
        rule
        for op in ("Conv", "Gemm", "MatMul")
        for rule in (*_dense(op, "int8"), Rule(op, "4-bit products", 4, (2, 3, 4), ("tensor", "channel"), "int4"))
    ),
    output_scale=frozenset(),
    flatten=False,
)
BUILTIN = (ORT_CPU, ORT_CPU_AVX2, OPENVINO, PER_TENSOR, NPU, NPU4, STORAGE)
