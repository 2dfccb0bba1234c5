"""What a runtime can execute, and how it has to be stored: data, no code paths. docs/runtime.md is the evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from onnx import ModelProto

from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.graph import Layer
from onnxq_plugins.runtimes.runtime import Runtime
from onnxq_plugins.spec import Block, QuantSpec

STORED = 16  # bits of weights that are as good as floats: of layers that 8 bits would cost too much
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
    output_scale  layers that have to write quantized outputs to run as integer (the others may write float)
    max_code      largest |code| of a weight beside 8-bit activations
    attention     multiply-adds from which on a product of two activation matrices is faster as integer; 0 for never
                  (`python -m benchmarks.kernels` times some)
    flatten       MatMul + Add(bias) on tokens runs faster as a two-dimensional Gemm (onnxruntime has an integer Gemm
                  with bias); OpenVINO 2026.4 fails to load the Reshapes that this needs behind a LayerNormalization
    decodes       constants outside layers, and weights of layers that run in float, may be codes that are decoded at load,
                  or rows of a table as they are read: codes -> Cast -> Mul(scale)
    plain         operators whose constants it only takes as they are, all the same
    tuned         activations are written in the form that onnxruntime's CPU provider computes fastest (`graph.opsets.tuned`)
    costs         name of the table of what kernels cost there (`runtimes.costs`); "" for none
    here          its models run in onnxruntime on this CPU as they will in use
    signed        activations are stored as signed codes (int8, int16), not unsigned ones
    symmetric     their zero point is the middle of the grid: 0 of signed codes, 128 of uint8. Plans have symmetric entries
                  then, whatever a recipe says. A number: from activations of that many bits on
    either        activations that a recipe makes symmetric are taken, too, as signed codes with zero point 0
    bias          biases of integer layers: ``int32`` codes at the scale of the products, or ``float`` constants
    aligned       input and output channels of an integer layer must be multiples of it (depthwise: the channels); other
                  layers stay float
    operators     ai.onnx operators that it has, beside QuantizeLinear and DequantizeLinear; empty: all. A Gemm becomes
                  MatMul and Add where it is missing; models that need something else that is missing are refused
    opsets        lowest and highest opset of ai.onnx that it reads; 0: any
    whole         everything is quantized that can be: operators in `integer_ops` wherever they stand, the model's inputs and
                  outputs, and what a float operator between integers reads and writes; placement by cost is not asked
    static        shapes must be known: the model is fixed to those of the first sample
    apart         layers that are to stay float are kept from onnxruntime's fusions by a Sum of one operand
    suffix        of its files
    write         makes such a file of the QDQ model, where that is not the file itself: (model, settings) -> bytes
    runtime       what proves it: loads its files, runs them, and tells what ran in integers
    settings      names and defaults of settings of its own, which recipes change: ``[target.acme]`` ``soc = 3``
    configure     makes a target of this one with other `settings`, where these change what it has
    """

    name: str
    doc: str
    rules: tuple[Rule, ...]
    integer_ops: frozenset[str] = field(default_factory=frozenset)
    output_scale: frozenset[str] = frozenset({"Conv"})
    max_code: int = 127
    attention: int = 0
    flatten: bool = True
    decodes: bool = False
    plain: frozenset[str] = frozenset()
    tuned: bool = False
    costs: str = ""
    here: bool = False
    signed: bool = False
    symmetric: int = False
    either: bool = False
    bias: Literal["int32", "float"] = "int32"
    aligned: int = 1
    operators: frozenset[str] = frozenset()
    opsets: tuple[int, int] = (0, 0)
    whole: bool = False
    static: bool = False
    apart: bool = True
    suffix: str = ".onnx"
    write: Callable[[ModelProto, Mapping[str, Any]], bytes] | None = field(default=None, compare=False)
    runtime: Runtime | None = field(default=None, compare=False)
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    configure: Callable[[Target], Target] | None = field(default=None, compare=False)

    def with_settings(self, vendors: Mapping[str, Mapping[str, Any]]) -> Target:
        """This target with what a recipe sets for its vendor, the first part of its name. Raises OnnxqError for a setting
        that it does not have, or a value of another type."""
        vendor = self.name.partition(".")[0]
        given = vendors.get(vendor, {})
        problems = []
        for key, value in given.items():
            if key not in self.settings:
                problems.append(f"target '{self.name}' has no setting '{key}'; {known(key, sorted(self.settings))}.")
                continue
            default = self.settings[key]
            if type(value) is not type(default) and (type(default), type(value)) != (float, int):
                what = f"of type {type(default).__name__}, such as {default!r}"
                problems.append(f"target '{self.name}': {key} = {value!r} must be {what}.")
        OnnxqError.check(problems)
        if not given:
            return self
        changed = replace(self, settings={**self.settings, **given})
        return changed if self.configure is None else self.configure(changed)

    def fits(self, layer: Layer) -> bool:
        """True if the channels of a layer are multiples of what the hardware needs."""
        inputs = layer.channels if layer.kind == "depthwise" else layer.shape[layer.in_axis]
        return layer.channels % self.aligned == 0 and inputs % self.aligned == 0

    def centred(self, bits: int) -> bool:
        """True if activations of that many bits must have symmetric entries."""
        return 0 < self.symmetric <= bits

    def stores_signed(self, spec: QuantSpec) -> bool:
        """True if the codes of an activation are signed in the file."""
        return self.signed or (self.either and spec.symmetric)

    def offset(self, spec: QuantSpec) -> int:
        """What is added to the codes of an activation, and their zero point, in the file."""
        half = 2 ** (spec.bits - 1)
        return 0 if spec.symmetric == self.stores_signed(spec) else half if spec.symmetric else -half

    @property
    def code_bits(self) -> int:
        """Widest symmetric code that stays within `max_code`."""
        return (self.max_code + 1).bit_length()

    @property
    def activation_bits(self) -> list[int]:
        """Widths of the activations that some rule reads, ascending."""
        return sorted({rule.activations for rule in self.rules} - {0})

    @property
    def coded_ports(self) -> bool:
        """True if inputs and outputs of its files have to be codes, as its setting ``io`` says."""
        return bool(self.settings.get("io") == "int8")

    @property
    def foreign(self) -> bool:
        """True if it runs layers in integers, in another runtime or on other hardware."""
        return self.integer and not self.here

    @property
    def own_kernels(self) -> bool:
        """True if its runtime has kernels of its own: those of onnxruntime, and its times, say nothing about it."""
        return self.runtime is not None and not self.tuned

    @property
    def integer(self) -> bool:
        """True if it runs some layer in integers."""
        return any(rule.storage != "float" for rule in self.rules)

    def only_stores(self, op: str) -> bool:
        """True if it runs layers of an operator in float alone, though others as integer: their weights are stored in 8 bits
        whatever the recipe says of layers, unless it names them."""
        rules = [rule for rule in self.rules if rule.op == op]
        return self.integer and bool(rules) and all(r.storage == "float" and not r.activations for r in rules)

    def granularities(self, op: str) -> set[Granularity]:
        """The granularities of weights that it supports for an operator."""
        return {g for rule in self.rules if rule.op == op for g in rule.granularity}

    def rule(self, layer: Layer, weight: QuantSpec, activations: int) -> Rule | None:
        """The rule a layer falls under, or None if the target has no quantized kernel for it. A weight that is to be decoded
        is stored as float tiles are, where a kernel would read its blocks, or codes beside 8-bit inputs; of `STORED` bits,
        too."""
        if weight.decoded and activations:
            return None
        shape = granularity_of(layer, weight)
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
                decoded = weight.decoded and rule.storage == "blocked"
                return replace(rule, kernel=rule.op, storage="float") if decoded else rule
        if weight.decoded and self.decodes:
            beside = self.rule(layer, replace(weight, decoded=False, bits=8 if weight.bits == STORED else weight.bits), 8)
            return beside and replace(beside, kernel=layer.op, activations=0, storage="float", narrow=False)
        return None


def granularity_of(layer: Layer, spec: QuantSpec) -> Granularity:
    """The granularity that a block means for a layer's weight."""
    if spec.block is None:
        return "tensor"
    rest = [b for axis, b in enumerate(spec.block) if axis not in (layer.out_axis, layer.in_axis)]
    outputs, inputs = spec.block[layer.out_axis], spec.block[layer.in_axis]
    if spec.block == channel_block(layer):
        return "channel"
    return "block" if outputs == 1 and inputs > 1 and not rest else "tile"


def channel_block(layer: Layer) -> Block:
    """The block of one scale per output channel; in a grouped ConvTranspose [IC, OC / groups, ...] of each group."""
    if layer.op == "ConvTranspose" and layer.groups > 1:
        return (layer.shape[0] // layer.groups, 1, *(0,) * (len(layer.shape) - 2))
    return tuple(1 if axis == layer.out_axis else 0 for axis in range(len(layer.shape)))


def channel_multipliers(layer: Layer, spec: QuantSpec) -> bool:
    """True if one scale of a layer is refined by a multiplier per output channel. Such a multiplier is not part of the
    codes: it joins the scale where a target takes a scale per channel, and becomes a factor behind the layer elsewhere."""
    return spec.block is None and spec.sub_block == channel_block(layer)


# What several runtimes have in common: operators that keep a chain integer, and layers with codes of 2 to 8 bits.
CHAIN = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Where"})


# A transposed convolution has no integer kernel anywhere: its weight is stored, and decoded at load.
DECODED = Rule("ConvTranspose", "ConvTranspose", 0, tuple(range(2, 9)), ("channel",), "float")


def dense_rules(op: str, kernel: str, activations: int = 8) -> tuple[Rule, ...]:
    """Rules of a layer with int8 codes, or 4-bit codes that are decoded to int8 at load."""
    return (
        Rule(op, kernel, activations, (5, 6, 7, 8), ("tensor", "channel"), "int8", multipliers=True, narrow=True),
        Rule(op, kernel, activations, (2, 3, 4), ("tensor", "channel"), "int4", multipliers=True),
    )
