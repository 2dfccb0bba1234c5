"""What fills blocks of channels and runs in float where that is faster is worth, on networks of the kinds that phones run.

    python -m benchmarks.mobile [NETWORK ...] [--seconds 2]

Networks with random weights (seeded): MobileNetV3 and EfficientNet (squeeze and excite, HardSwish or Swish), MobileNetV2,
ShuffleNet's and pruned channel counts, which are no multiples of 4. Milliseconds of a run in turn, one thread, as float,
with all integer that can be, with pass `align`, with pass `placement` by its table alone, with both, and as recipe int8
makes it, which times what it chooses; then kB. Prints Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.int8 import machine
from onnxq_plugins import quantize, runtimes
from onnxq_plugins.runtimes.profiles import interleaved, typical

Row = tuple[int, int, int, int, bool]  # taps, channels inside, channels out, stride, squeeze and excite
PLACED = {"use": "placement", "check": False}
RECIPES = {
    "integer": [],
    "align": [{"use": "align"}],
    "placement": [PLACED],
    "both": [{"use": "align"}, PLACED],
}
_SIZE, _SAMPLES = 160, 4


class Builder:
    """A network, operator by operator."""

    def __init__(self, act: str) -> None:
        self.act, self.rng = act, np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, op: str, *inputs: str, **attrs: object) -> str:
        y = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [y], f"n{len(self.nodes)}", **attrs))
        return y

    def conv(self, x: str, inputs: int, outputs: int, taps: int = 1, stride: int = 1, groups: int = 1) -> str:
        fan, name = inputs // groups * taps * taps, f"w{len(self.constants)}"
        values = self.rng.standard_normal((outputs, inputs // groups, taps, taps)) * np.sqrt(2 / fan)
        bias = 0.1 * self.rng.standard_normal(outputs)
        for n, v in ((name, values), (f"{name}b", bias)):
            self.constants.append(numpy_helper.from_array(v.astype(np.float32), n))
        pads = [taps // 2] * 4
        return self.op("Conv", x, name, f"{name}b", group=groups, pads=pads, strides=[stride] * 2, kernel_shape=[taps] * 2)

    def activation(self, x: str, act: str = "") -> str:
        act = act or self.act
        if act == "Swish":  # as it is exported
            return self.op("Mul", x, self.op("Sigmoid", x))
        return self.op(act, x)

    def block(self, x: str, channels: int, row: Row) -> str:
        """An inverted residual block."""
        taps, inside, outputs, stride, gate = row
        y = self.activation(self.conv(x, channels, inside))
        y = self.activation(self.conv(y, inside, inside, taps, stride, inside))
        if gate:
            s = self.activation(self.conv(self.op("GlobalAveragePool", y), inside, max(inside // 4, 8)), "Relu")
            s = self.conv(s, max(inside // 4, 8), inside)
            y = self.op("Mul", y, self.op("Sigmoid" if self.act == "Swish" else "HardSigmoid", s))
        y = self.conv(y, inside, outputs)
        return self.op("Add", x, y) if stride == 1 and outputs == channels else y

    def model(self, rows: list[Row]) -> onnx.ModelProto:
        x, channels = self.activation(self.conv("x", 3, rows[0][2], 3, 2)), rows[0][2]
        for row in rows:
            x, channels = self.block(x, channels, row), row[2]
        y = self.op("Flatten", self.op("GlobalAveragePool", x))
        ends = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, shape)
            for n, shape in (("x", [1, 3, _SIZE, _SIZE]), (y, [1, channels]))
        ]
        graph = helper.make_graph(self.nodes, "mobile", ends[:1], ends[1:], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _rows(channels: list[int], inside: Callable[[int], int], gate: bool) -> list[Row]:
    """Two blocks for each number of channels, the first with stride 2 but at the start."""
    rows = []
    for k, outputs in enumerate(channels):
        for n in range(2):
            before, stride = (channels[max(k - 1, 0)], 1 + (k > 0)) if n == 0 else (outputs, 1)
            rows.append((5 if k % 2 else 3, inside(before), outputs, stride, gate))
    return rows


NETWORKS: dict[str, tuple[str, list[Row]]] = {
    "mobilenet-v3": ("HardSwish", _rows([16, 24, 40, 80, 112], lambda n: 3 * n, True)),
    "mobilenet-v3-relu": ("Relu", _rows([16, 24, 40, 80, 112], lambda n: 3 * n, True)),
    "efficientnet": ("Swish", _rows([16, 24, 40, 80, 112], lambda n: 6 * n, True)),
    "mobilenet-v2": ("Relu", _rows([16, 24, 32, 64, 96], lambda n: 6 * n, False)),
    "shufflenet-like": ("Relu", _rows([58, 58, 116, 232], lambda n: n, False)),
    "pruned": ("Relu", _rows([13, 26, 52, 103], lambda n: 2 * n + 1, False)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing a network")
    args = parser.parse_args()
    heads = ["float", *RECIPES, "int8"]
    print(f"{machine()}\n\n| network | {' | '.join(f'{h} ms' for h in heads)} | kB integer | both | int8 |\n|{'---|' * 10}")
    for name in args.networks or NETWORKS:
        act, rows = NETWORKS[name]
        model = Builder(act).model(rows)
        rng = np.random.default_rng(1)
        feeds = [{"x": rng.standard_normal((1, 3, _SIZE, _SIZE)).astype(np.float32)} for _ in range(_SAMPLES)]
        recipes = {key: {"pass": [*steps, {"use": "ranges"}]} for key, steps in RECIPES.items()} | {"int8": "int8"}
        made = {key: quantize(model, recipe, feeds, workers=1, check=False).model for key, recipe in recipes.items()}
        runners = [runtimes.session(one) for one in (model, *made.values())]
        times = [typical(own) for own in interleaved(runners, feeds[0], args.seconds)]
        sizes = [made[key].ByteSize() / 1e3 for key in ("integer", "both", "int8")]
        print(f"| {name} | {' | '.join(f'{t:.3f}' for t in times)} | {' | '.join(f'{s:.0f}' for s in sizes)} |", flush=True)


if __name__ == "__main__":
    main()
