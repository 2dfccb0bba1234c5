"""Which kernel runs every form of a layer that a target allows: docs/targets.md, and the evidence for it.

    python -m benchmarks.targets > docs/targets.md

Each rule of each target becomes small networks of two layers and a last one, at its narrowest and its widest weights.
These are quantized and loaded in onnxruntime (and in OpenVINO, if it is installed, for targets that it represents), and
their kernels are read from the optimized graph. tests/targets/test_targets.py makes the same tables and checks them against
the rules and the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.runtimes.audit import Audit
from onnxq_plugins.runtimes.openvino import audit_openvino
from onnxq_plugins.targets import Rule, Target
from onnxq_plugins.testing.models import Net, feeds

IN_OPENVINO = ("openvino", "per-tensor")
INTRO = """# Targets

Which forms of a layer each target allows, and which kernels they run in: every form was exported at its narrowest and its
widest weights and loaded, and the kernels were read from the runtime's optimized graph. [runtime.md](runtime.md) has further
findings. `python -m benchmarks.targets` generates this page; the tests repeat it and compare.
"""


@dataclass(frozen=True)
class Row:
    """Forms of a rule that ran in the same kernels: granularity, with or without multipliers; OpenVINO's if available."""

    rule: Rule
    plain: tuple[str, ...]
    multiplied: tuple[str, ...]
    onnxruntime: frozenset[str]
    openvino: frozenset[str] | None

    def cells(self) -> list[str]:
        """Table cells of a row."""
        bits = self.rule.weights
        return [
            self.rule.op,
            f"{self.rule.activations} bits" if self.rule.activations else "float",
            str(bits[0]) if len(bits) == 1 else f"{bits[0]}-{bits[-1]}",
            self.scales(),
            self.rule.storage,
            self.rule.kernel,
            ", ".join(sorted(self.onnxruntime)),
            *([", ".join(sorted(self.openvino))] if self.openvino is not None else []),
        ]

    def scales(self) -> str:
        """Granularity of the scales, in words."""
        plain, multiplied = " or ".join(self.plain), " or ".join(self.multiplied)
        sizes = f" of {', '.join(map(str, self.rule.blocks))} inputs" if self.rule.blocks else ""
        parts = [f"per {plain}{sizes}"] * bool(plain) + [f"per {multiplied} with multipliers"] * bool(multiplied)
        return "; ".join(parts)


@cache
def network(op: str) -> onnx.ModelProto:
    """Two layers of an operator, each followed by a Relu, and a layer that writes the output."""
    if op in ("Conv", "ConvTranspose"):
        net = Net(["N", 8, 8, 8])
        x = "x"
        for _ in range(2):
            x = net.conv(x, 8, 8) if op == "Conv" else net.op(op, x, net.weight(8, 8, 3, 3, fan_in=72), pads=[1] * 4)
            x = net.op("Relu", x)
        return net.model(net.head(x, 8))
    net = Net(["N", 256])
    x = "x"
    for _ in range(3):
        x = net.op("Relu", net.gemm(x, 256, 256) if op == "Gemm" else net.linear(x, 256, 256, bias=False))
    return net.model(x)


def settings(rule: Rule, granularity: str, multipliers: bool) -> Iterator[dict[str, Any]]:
    """The weights to request: the narrowest and the widest of a form, and every size of its blocks."""
    finest = 16 if rule.op in ("Gemm", "MatMul") else 4
    blocks: list[Any] = [[4, 4]] if granularity == "tile" else [granularity]
    if granularity == "block":
        blocks = list(rule.blocks) or [finest]
    for bits in sorted({rule.weights[0], rule.weights[-1]}):
        for block in blocks:
            # 8-bit codes leave no room for multipliers within int8, so layers with 8-bit codes omit them
            yield {"bits": bits, "block": block, **({"sub_block": finest} if multipliers else {})}


@cache
def rows(target: Target) -> tuple[Row, ...]:
    """Every form that a target allows, as it ran here; forms of a rule that ran in the same kernels share a row."""
    forms = []
    for rule in target.rules:
        alike: dict[tuple[frozenset[str], frozenset[str] | None], tuple[list[str], list[str]]] = {}
        for granularity in rule.granularity:
            for multipliers in (False, True)[: 1 + (rule.multipliers and granularity in ("tensor", "channel"))]:
                runs = [
                    run(rule.op, target.name, rule.activations or 32, weights)
                    for weights in settings(rule, granularity, multipliers)
                ]
                here = frozenset().union(*(ran for ran, _ in runs))
                there = frozenset().union(*(ran for _, ran in runs if ran)) if runs[0][1] else None
                alike.setdefault((here, there), ([], []))[multipliers].append(granularity)
        forms += [Row(rule, tuple(plain), tuple(multiplied), *ran) for ran, (plain, multiplied) in alike.items()]
    return tuple(forms)


def run(op: str, target: str, activations: int, weights: Mapping[str, Any]) -> tuple[set[str], set[str] | None]:
    """The kernels that layers of an operator run in, in onnxruntime, and in OpenVINO if the target is for it."""
    model = network(op)
    recipe = {"target": target, "weights": dict(weights), "activations": {"bits": activations}, "pass": [{"use": "ranges"}]}
    if find_plugins().target(target).only_stores(op):  # whatever the other layers get
        recipe |= {"weights": {}, "activations": {}, "layer": [{"op": op, "weights": dict(weights)}]}
    result = onnxq.quantize(model, recipe, feeds(model, 4), workers=1)
    here = kernels(onnxq.audit_model(result.model), op)
    if target not in IN_OPENVINO or not openvino_installed():
        return here, None
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        result.save(file)
        return here, kernels(audit_openvino(file), op)


def kernels(audit: Audit, op: str) -> set[str]:
    """The kernels of an operator's layers (a Gemm with float inputs and blocks of its weight is exported as a MatMul)."""
    alike = ("Gemm", "MatMul") if op in ("Gemm", "MatMul") else (op,)
    return {layer.kernel for layer in audit.layers if layer.op in alike}


@cache
def openvino_installed() -> bool:
    """True if OpenVINO can be used."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        return False
    return True


def section(target: Target) -> str:
    """A target's section of the page."""
    forms = rows(target)
    openvino = any(row.openvino is not None for row in forms)
    head = ["layer", "input", "weight bits", "scales", "stored as", "runs as", "in onnxruntime", *["in OpenVINO"] * openvino]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *(row.cells() for row in forms)])
    others = ", ".join(sorted(target.integer_ops)) or "none"
    about = target.doc[0].upper() * (not target.doc.startswith("onnx")) or target.doc[0]
    plain = f", but not those of {', '.join(sorted(target.plain))}" if target.plain else ""
    stored = f"stored in 8 bits and decoded at load{plain}" if target.decodes else "float"
    lines = f"Other operators that stay integer: {others}.\n\nWeights outside layers: {stored}.\n"
    return f"## {target.name}\n\n{about}{target.doc[1:]}.\n\n{table}\n\n{lines}"


def main() -> None:
    if not openvino_installed():
        sys.exit("the page has a column for OpenVINO; pip install '.[openvino]' and run this again.")
    import openvino

    print(INTRO)
    print(
        f"Made with onnxruntime {onnxruntime.__version__} and OpenVINO {openvino.__version__.partition('-')[0]}, "
        f"{machine().partition(',')[0]}.\n"
    )
    print("\n".join(section(target) for target in find_plugins().targets.values()), end="")


if __name__ == "__main__":
    main()
