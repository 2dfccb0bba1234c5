"""The result of an audit: for every layer of a model the kernel that runs it, and why if that is a float kernel. One file
per runtime fills it in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import onnx

from onnxq_plugins.errors import Reason, counted
from onnxq_plugins.graph.layer import LAYER_OPS
from onnxq_plugins.runtimes.accumulators import Need
from onnxq_plugins.runtimes.constants import Held, describe_held, held_constants
from onnxq_plugins.runtimes.runtime import Proof
from onnxq_plugins.runtimes.speed import Speed
from onnxq_plugins.runtimes.spending import Spending

KEPT_KEY = "onnxq.float"  # metadata: layer -> why a pass keeps it in float


@dataclass(frozen=True)
class LayerAudit:
    """One layer: its operator, whether its weight is constant, the kernel that runs it, and the reason if it is float.

    product       it multiplies two activations, as attention does: not a layer, but multiply-adds all the same
    accumulator   bits of the smallest signed accumulator that no input overflows (without the bias); None where the model
                  does not have the layer's weight as integer codes beside an 8-bit input
    saturates     sums of two products can exceed the 16 bits that AVX2 has for them
    """

    name: str
    op: str
    constant_weight: bool
    kernel: str
    quantized: bool
    reason: Reason | None = None
    accumulator: int | None = None
    saturates: bool = False
    product: bool = False

    @property
    def why(self) -> str:
        """The reason in words; "" if the layer runs quantized."""
        return str(self.reason or "")

    @property
    def kept(self) -> bool:
        """True if a pass keeps it in float on purpose, so that nothing is wrong with it."""
        return self.reason is not None and self.reason.kind == "pass"

    @property
    def computes(self) -> bool:
        """True for what should be computed in integers: a layer, or a product of two activations."""
        return self.constant_weight or self.quantized or self.product

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "reason": self.reason and self.reason.kind, "why": self.why}


@dataclass(frozen=True)
class Audit:
    """The layers of a model as a runtime runs them.

    speedup        time of the float model / time of this one, if measured
    milliseconds   of the float model, where there is one, and of this one
    speed          the same with what is sure about it
    spending       where the time goes, of the same models
    timed          the shapes that all times are for, in words
    untimed        why there are none although they were wanted: a sentence
    constants      operators that hold weights outside integer kernels
    total          bytes that float ones are told as a part of
    nodes          layers -> their nodes in `Spending.nodes`
    placed         whether operators were placed by what they cost: no, or None where nobody knows
    proof          what the runtime itself told, where it was asked by running samples
    """

    layers: tuple[LayerAudit, ...]
    other: dict[str, int]
    speedup: float | None = None
    milliseconds: tuple[float, ...] | None = None
    timed: str = ""
    untimed: str = ""
    constants: tuple[Held, ...] = ()
    total: int = 0
    speed: Speed | None = None
    spending: tuple[Spending, ...] = ()
    nodes: Mapping[str, str] = field(default_factory=dict)
    placed: bool | None = None
    proof: Proof | None = None

    def counts(self) -> dict[str, int]:
        """Kernel -> number of layers, without those that a pass keeps in float."""
        return dict(Counter(layer.kernel for layer in self.layers if not layer.kept))

    def products(self) -> list[str]:
        """Names of the products of two activations that run in float."""
        return [layer.name for layer in self.layers if layer.product and not layer.quantized]

    @property
    def summary(self) -> str:
        """One line: how many layers of each operator run quantized, in which kernels, and how many products of two
        activations do not. Layers that a pass keeps in float on purpose do not count."""
        parts = []
        for op in LAYER_OPS:
            rows = [layer for layer in self.layers if layer.op == op and layer.constant_weight and not layer.kept]
            if rows:
                kernels = Counter(layer.kernel for layer in rows if layer.quantized)
                names = ", ".join(f"{n} {k}" if len(kernels) > 1 else k for k, n in kernels.most_common())
                count = sum(layer.quantized for layer in rows)
                parts.append(f"{count}/{len(rows)} {op}" + (f" as {names}" if names else " in integer kernels"))
        parts = parts or ([] if self.constants else ["no layer with a constant weight"])
        if n := len(self.products()):
            parts.append(f"{n} product{'s' * (n > 1)} of two activations stay{'s' * (n == 1)} float")
        return "; ".join([*parts, *self.outside()])

    def __repr__(self) -> str:
        """The summary, and times if there are any."""
        if self.proof is not None:
            return f"<Audit in {self.proof.runtime}: {self.proof.text}>"
        times = "" if self.milliseconds is None else f" | {' -> '.join(f'{ms:.3f}' for ms in self.milliseconds)} ms"
        speed = "" if self.speedup is None else f", {self.speedup:.2f}x the speed of float"
        return f"<Audit: {self.summary}{times}{speed}>"

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "summary": self.summary,
            "layers": [layer.to_dict() for layer in self.layers],
            "constants": [{**asdict(held), "why": held.why} for held in self.constants],
            "other": dict(self.other),
            "milliseconds": list(self.milliseconds or ()),
            "speed": self.speedup,
            "timed": self.timed,
            "untimed": self.untimed,
            "spending": [spending.to_dict() for spending in self.spending],
            "proof": None if self.proof is None else self.proof.to_dict(),
        }

    def outside(self) -> list[str]:
        """The weights outside integer kernels in clauses: how many operators store them in codes, and how many in float."""
        return describe_held(self.constants, self.total)

    def accumulators(self) -> str:
        """One line: the accumulators that the quantized layers need, and how many layers need VNNI; "" if none is known."""
        rows = [layer for layer in self.layers if layer.quantized and layer.accumulator is not None]
        if not rows:
            return ""
        bits = sorted({layer.accumulator for layer in rows if layer.accumulator is not None})
        over = sum(layer.saturates for layer in rows)
        pairs = (
            "never saturate" if not over else (f"can saturate in {counted(over, 'layer')} (target ort-cpu-avx2 avoids that)")
        )
        span = f"{bits[0]}..{bits[-1]}" if len(bits) > 1 else f"{bits[0]}"
        return f"accumulators: {span} bits; on AVX2 without VNNI 16-bit pair sums {pairs}"


def outside_kernels(graph: onnx.GraphProto, layers: Iterable[LayerAudit]) -> tuple[Held, ...]:
    """The constants of operators that no integer kernel reads. Layers whose codes a runtime might read as integers, though
    this one does not, tell so in their own rows."""
    rows = {layer.name: layer for layer in layers}

    def outside(entry: Held) -> bool:
        row = rows.get(entry.name)
        if row is not None and row.kept:
            return False
        decoded = row is None or (row.reason is not None and row.reason.kind in ("decoded", "unsupported"))
        return row is None or (not row.quantized and (decoded or bool(entry.floats)))

    return tuple(entry for entry in held_constants(graph) if outside(entry))


def audited(
    node: onnx.NodeProto, constants: set[str], kernel: str, quantized: bool, reason: Reason | None, need: Need | None
) -> LayerAudit:
    """The entry of one layer.

    constants   names of constants, and of tensors computed from them alone
    need        of its accumulator, None if not known
    """
    bits, saturates = (None, False) if need is None else (need.bits, need.saturates)
    constant, product = node.input[1] in constants, is_product(node, constants)
    return LayerAudit(node.name, node.op_type, constant, kernel, quantized, reason, bits, saturates, product)


def kept_in_float(model: onnx.ModelProto) -> dict[str, Reason]:
    """The layers that a pass keeps in float (`Job.keep_float`), as the metadata of a model say."""
    text = next((entry.value for entry in model.metadata_props if entry.key == KEPT_KEY), "{}")
    try:
        return {str(name): Reason("pass", str(why)) for name, why in json.loads(text).items()}
    except (ValueError, AttributeError):  # whoever wrote it meant something else
        return {}


def is_product(node: onnx.NodeProto, constants: set[str]) -> bool:
    """True for a product of two activations."""
    return node.op_type == "MatMul" and not any(name in constants for name in node.input)


def chain(node: onnx.NodeProto, readers: dict[str, list[onnx.NodeProto]]) -> Iterator[onnx.NodeProto]:
    """A node, its only reader, the only reader of that, and so on for three steps, as far as they can be one kernel: nothing
    that decodes codes, no other layer."""
    yield node
    for _ in range(3):
        after = readers.get(node.output[0], [])
        if len(after) != 1 or after[0].op_type in ("DequantizeLinear", *LAYER_OPS):
            return
        node = after[0]
        yield node


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """Tensor -> the nodes that read it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def constants_of(graph: onnx.GraphProto) -> set[str]:
    """Initializers and tensors computed from constants alone, such as dequantized weights."""
    known = {t.name for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" or (node.input and all(i in known or not i for i in node.input)):
            known |= set(node.output)
    return known
