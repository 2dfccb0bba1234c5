"""Small float models, each with one difficulty of real ones, and helpers to run them. All weights are seeded.

They are part of the package, since the checks of `onnxq_plugins.testing` run passes on them. `Net` builds others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import runtimes
from onnxq_plugins.spec import Array

Shape = Sequence[int | str]
Feed = dict[str, Array]


class Net:
    """Builds a model node by node: every method appends its operator and returns the name of the new tensor.

    prefix   of all names, to tell the body of an operator from what is around it
    """

    def __init__(self, shape: Shape, seed: int = 0, prefix: str = "") -> None:
        self.prefix = prefix
        self.rng = np.random.default_rng(seed)
        self.input = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, values: object, dtype: type = np.float32) -> str:
        name = f"{self.prefix}c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, *shape: int, fan_in: int = 1) -> str:
        return self.constant(self.rng.normal(size=shape) / np.sqrt(fan_in))

    def op(self, op: str, *inputs: str, outputs: int = 1, **attrs: Any) -> str:
        n = len(self.nodes)
        names = [f"{self.prefix}t{n}"] + [f"{self.prefix}t{n}_{i}" for i in range(1, outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=f"{self.prefix}{op.lower()}{n}", **attrs))
        return names[0]

    def conv(
        self, x: str, cin: int, cout: int, k: int = 3, *, groups: int = 1, bias: bool = True, rank: int = 2, **attrs: Any
    ) -> str:
        if "auto_pad" not in attrs:
            attrs.setdefault("pads", [k // 2] * 2 * rank)
        inputs = [self.weight(cout, cin // groups, *[k] * rank, fan_in=cin // groups * k**rank)]
        return self.op("Conv", x, *inputs, *([self.weight(cout)] if bias else []), group=groups, **attrs)

    def batchnorm(self, x: str, channels: int, **attrs: Any) -> str:
        gamma, variance = self.rng.uniform(0.5, 1.5, (2, channels))
        beta, mean = self.rng.normal(size=(2, channels)) / 4
        return self.op("BatchNormalization", x, *(self.constant(v) for v in (gamma, beta, mean, variance)), **attrs)

    def clip(self, x: str, low: float = 0.0, high: float = 6.0) -> str:
        return self.op("Clip", x, self.constant(low), self.constant(high))

    def gemm(self, x: str, cin: int, cout: int, trans_b: int = 1, **attrs: Any) -> str:
        weight = self.weight(*((cout, cin) if trans_b else (cin, cout)), fan_in=cin)
        return self.op("Gemm", x, weight, self.weight(cout), transB=trans_b, **attrs)

    def linear(self, x: str, cin: int, cout: int, bias: bool = True) -> str:
        y = self.op("MatMul", x, self.weight(cin, cout, fan_in=cin))
        return self.op("Add", y, self.weight(cout)) if bias else y

    def head(self, x: str, channels: int, classes: int = 10) -> str:
        return self.gemm(self.op("Flatten", self.op("GlobalAveragePool", x)), channels, classes)

    def layernorm(self, x: str, size: int) -> str:
        """LayerNormalization written out."""
        centred = self.op("Sub", x, self.op("ReduceMean", x, axes=[-1]))
        variance = self.op("ReduceMean", self.op("Pow", centred, self.constant(2.0)), axes=[-1])
        y = self.op("Div", centred, self.op("Sqrt", self.op("Add", variance, self.constant(1e-5))))
        return self.op("Add", self.op("Mul", y, self.weight(size)), self.weight(size))

    def gelu_tanh(self, x: str, cubic: float = 0.044715) -> str:
        inner = self.op("Add", x, self.op("Mul", self.op("Pow", x, self.constant(3.0)), self.constant(cubic)))
        tanh = self.op("Tanh", self.op("Mul", inner, self.constant(np.sqrt(2 / np.pi))))
        half = self.op("Mul", x, self.constant(0.5))
        return self.op("Mul", half, self.op("Add", tanh, self.constant(1.0)))

    def gelu_erf(self, x: str) -> str:
        erf = self.op("Erf", self.op("Div", x, self.constant(np.sqrt(2))))
        return self.op("Mul", self.op("Mul", x, self.op("Add", erf, self.constant(1.0))), self.constant(0.5))

    def hardswish(self, x: str) -> str:
        return self.op("Div", self.op("Mul", x, self.clip(self.op("Add", x, self.constant(3.0)))), self.constant(6.0))

    def model(self, *outputs: str, opset: int = 17) -> onnx.ModelProto:
        ports = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "zoo", [self.input], ports, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        del model.graph.value_info[:]
        onnx.checker.check_model(model, full_check=True)
        return model


def feeds(model: onnx.ModelProto, n: int, seed: int = 0) -> list[Feed]:
    """`n` random feeds of one sample; dynamic axes have size 1."""
    rng = np.random.default_rng(seed)
    shapes = {i.name: [d.dim_value or 1 for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    return [{name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for _ in range(n)]


def batch(samples: Sequence[Mapping[str, Array]]) -> Feed:
    """Several feeds as one."""
    return {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}


def run(model: Any, feed: Mapping[str, Array], optimize: bool = True) -> list[Array]:
    """Outputs of a ModelProto, or of anything with a `model()` that makes one, such as a Graph."""
    proto = model if isinstance(model, onnx.ModelProto) else model.model()
    return list(runtimes.session(proto, optimize=optimize).run(None, dict(feed)))


# ---- the models -----------------------------------------------------------------------------------------------------


def cnn(opset: int = 17) -> onnx.ModelProto:
    net = Net(["N", 3, 12, 12])
    x = net.op("MaxPool", net.op("Relu", net.conv("x", 3, 8)), kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("MaxPool", net.op("Relu", net.conv(x, 8, 12)), kernel_shape=[2, 2], strides=[2, 2])
    return net.model(net.gemm(net.op("Flatten", x), 12 * 9, 10), opset=opset)


def mobilenet(opset: int = 17) -> onnx.ModelProto:
    """Two inverted residual blocks on a stream of 8 channels."""
    net = Net(["N", 3, 12, 12])
    x = net.clip(net.batchnorm(net.conv("x", 3, 8, strides=[2, 2], bias=False), 8))
    for _ in range(2):
        y = net.clip(net.batchnorm(net.conv(x, 8, 24, 1, bias=False), 24))
        y = net.clip(net.batchnorm(net.conv(y, 24, 24, groups=24, bias=False), 24))
        x = net.op("Add", x, net.batchnorm(net.conv(y, 24, 8, 1, bias=False), 8))
    return net.model(net.head(x, 8), opset=opset)


def grouped() -> onnx.ModelProto:
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    x = net.op("Relu", net.conv(x, 8, 12, groups=2))
    return net.model(net.head(net.conv(x, 12, 9, 1), 9))


def inception() -> onnx.ModelProto:
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    pool = net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1)
    branches = [net.conv(x, 8, 6, 1), net.conv(x, 8, 10), net.conv(pool, 8, 7, 1)]
    x = net.op("Concat", *(net.op("Relu", b) for b in branches), axis=1)
    return net.model(net.head(net.op("Relu", net.conv(x, 23, 9)), 9))


def mlp(opset: int = 17) -> onnx.ModelProto:
    net = Net(["N", 13])
    x = net.op("Relu", net.gemm("x", 13, 24, trans_b=0, alpha=0.5, beta=2.0))
    x = net.op("Relu", net.gemm(x, 24, 20, alpha=2.0, beta=0.5))
    return net.model(net.gemm(x, 20, 7, trans_b=0), opset=opset)


def transformer() -> onnx.ModelProto:
    """One pre-norm block with two heads."""
    net = Net(["N", 6, 16])

    def norm(x: str) -> str:
        return net.op("LayerNormalization", x, net.weight(16), net.weight(16), axis=-1)

    def heads(x: str, perm: list[int]) -> str:
        return net.op("Transpose", net.op("Reshape", x, net.constant([0, 6, 2, 8], np.int64)), perm=perm)

    x = net.linear("x", 16, 16)
    y = norm(x)
    q, k, v = (net.linear(y, 16, 16, bias=False) for _ in range(3))
    score = net.op("MatMul", heads(q, [0, 2, 1, 3]), heads(k, [0, 2, 3, 1]))
    score = net.op("Softmax", net.op("Mul", score, net.constant(8**-0.5)), axis=-1)
    y = net.op("Transpose", net.op("MatMul", score, heads(v, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
    y = net.linear(net.op("Reshape", y, net.constant([0, 6, 16], np.int64)), 16, 16)
    x = net.op("Add", x, y)
    y = net.linear(net.gelu_tanh(net.linear(norm(x), 16, 24)), 24, 16)
    x = norm(net.op("Add", x, y))
    return net.model(net.linear(net.op("ReduceMean", x, axes=[1], keepdims=0), 16, 5))


def written_out() -> onnx.ModelProto:
    """LayerNorm, GELU and HardSwish in elementary operators."""
    net = Net(["N", 5, 12])
    x = net.gelu_erf(net.linear(net.layernorm("x", 12), 12, 16))
    return net.model(net.linear(net.hardswish(net.linear(x, 16, 12)), 12, 6))


def conv_transpose() -> onnx.ModelProto:
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8, strides=[2, 2]))
    x = net.op("ConvTranspose", x, net.weight(8, 6, 2, 2, fan_in=8), net.weight(6), strides=[2, 2])
    x = net.op("Relu", net.batchnorm(x, 6))
    x = net.op("Relu", net.op("ConvTranspose", x, net.weight(6, 5, 3, 3, fan_in=18), group=2))
    return net.model(net.conv(x, 10, 4))


def conv1d() -> onnx.ModelProto:
    net = Net(["N", 5, 20])
    x = net.op("Relu", net.conv("x", 5, 8, rank=1, strides=[2]))
    x = net.op("Relu", net.conv(x, 8, 8, rank=1, groups=8, dilations=[2], pads=[2, 2]))
    return net.model(net.head(net.conv(x, 8, 12, 1, rank=1), 12))


def no_bias() -> onnx.ModelProto:
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8, bias=False))
    return net.model(net.head(net.op("Relu", net.conv(x, 8, 9, bias=False, auto_pad="SAME_UPPER")), 9))


def dead_channels() -> onnx.ModelProto:
    """Rows of zero weights, some with a bias that is not zero."""
    net = Net(["N", 3, 8, 8])
    weight, bias = net.rng.normal(size=(8, 3, 3, 3)) / 5, net.rng.normal(size=8)
    weight[[1, 4, 5]], bias[[4, 7]] = 0, 0
    x = net.op("Relu", net.op("Conv", "x", net.constant(weight), net.constant(bias), pads=[1] * 4))
    weight = net.rng.normal(size=(10, 8, 1, 1)) / 3
    weight[3], weight[:, 2] = 0, 0
    x = net.op("Relu", net.op("Conv", x, net.constant(weight), net.weight(10)))
    return net.model(net.head(x, 10))


def odd_channels() -> onnx.ModelProto:
    net = Net(["N", 3, 7, 9])
    x = net.op("Relu", net.conv("x", 3, 13))
    x = net.op("Relu", net.conv(x, 13, 17, 1))
    x = net.op("Relu", net.conv(x, 17, 17, groups=17, strides=[2, 2]))
    return net.model(net.head(net.op("Relu", net.conv(x, 17, 11)), 11, 5))


def shared_weights() -> onnx.ModelProto:
    """One initializer in two convolutions and one bias in all three."""
    net = Net(["N", 3, 8, 8])
    weight, bias = net.weight(8, 8, 3, 3, fan_in=72), net.weight(8)
    x = net.op("Relu", net.op("Conv", "x", net.weight(8, 3, 1, 1), bias))
    for _ in range(2):
        x = net.op("Relu", net.op("Conv", x, weight, bias, pads=[1] * 4))
    return net.model(net.head(x, 8))


def no_layer() -> onnx.ModelProto:
    net = Net(["N", 8])
    return net.model(net.op("Add", net.op("Relu", "x"), net.weight(8)))


def control_flow() -> onnx.ModelProto:
    """An If whose branches read an activation and a weight of the outer graph."""
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    largest = net.op("ReduceMax", "x", keepdims=0)
    condition = net.op("Greater", largest, net.constant(2.8))
    factor = net.weight(8, 1, 1)
    branches = [
        helper.make_graph(
            [helper.make_node("Mul", [x, factor], [f"{name}_out"])],
            name,
            [],
            [helper.make_empty_tensor_value_info(f"{name}_out")],
        )
        for name in ("yes", "no")
    ]
    branches[1].node[0].op_type = "Add"
    for branch in branches:
        branch.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
        branch.output[0].type.tensor_type.shape.CopyFrom(
            helper.make_tensor_value_info("", TensorProto.FLOAT, ["N", 8, 8, 8]).type.tensor_type.shape
        )
    x = net.op("If", condition, then_branch=branches[0], else_branch=branches[1])
    return net.model(net.head(net.op("Relu", net.conv(x, 8, 9)), 9))


def prelu() -> onnx.ModelProto:
    net = Net(["N", 3, 8, 8])
    x = net.op("PRelu", net.conv("x", 3, 8), net.constant(net.rng.uniform(0, 0.5, (8, 1, 1))))
    x = net.op("PRelu", net.conv(x, 8, 10), net.constant([[[0.25]]]))
    return net.model(net.head(x, 10))


def resnet20(opset: int = 17) -> onnx.ModelProto:
    """CIFAR ResNet's shortcut without weights: every other pixel, channels padded with zeros on both sides."""
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    x = net.op("Relu", net.op("Add", x, net.conv(net.op("Relu", net.conv(x, 8, 8)), 8, 8)))
    y = net.conv(net.op("Relu", net.conv(x, 8, 16, strides=[2, 2])), 16, 16)
    shortcut = net.op("Slice", x, *(net.constant(v, np.int64) for v in ([0, 0], [9, 9], [2, 3], [2, 2])))
    shortcut = net.op("Pad", shortcut, net.constant([0, 4, 0, 0] * 2, np.int64))
    x = net.op("Relu", net.op("Add", y, shortcut))
    return net.model(net.head(x, 16), opset=opset)


ZOO: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__: f
    for f in (
        cnn,
        mobilenet,
        grouped,
        inception,
        mlp,
        transformer,
        written_out,
        conv_transpose,
        conv1d,
        no_bias,
        dead_channels,
        odd_channels,
        shared_weights,
        no_layer,
        control_flow,
        prelu,
        resnet20,
    )
}


def fixed_batch() -> onnx.ModelProto:
    """Takes four rows at once, no more and no fewer."""
    net = Net([4, 13])
    return net.model(net.gemm(net.op("Relu", net.gemm("x", 13, 24)), 24, 7))


def outliers() -> onnx.ModelProto:
    """Two blocks of a transformer, attention with one head and feed-forward; two channels behind each GELU are forty times
    as large as the others."""
    net = Net(["N", 6, 32])
    size, x = np.ones(64), "x"
    size[[5, 20]] = 40

    def norm(x: str) -> str:
        return net.op("LayerNormalization", x, net.weight(32), net.weight(32), axis=-1)

    for _ in range(2):
        y = norm(x)
        q, k, v = (net.linear(y, 32, 16) for _ in range(3))
        score = net.op("Mul", net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1])), net.constant(16**-0.5))
        x = net.op("Add", x, net.linear(net.op("MatMul", net.op("Softmax", score, axis=-1), v), 16, 32))
        first, second = net.rng.normal(size=(32, 64)) / 6, net.rng.normal(size=(64, 32)) / 8
        y = net.gelu_tanh(net.op("Add", net.op("MatMul", norm(x), net.constant(first * size)), net.weight(64)))
        x = net.op("Add", x, net.op("MatMul", y, net.constant(second / size[:, None])))
    return net.model(net.linear(net.op("ReduceMean", x, axes=[1], keepdims=0), 32, 5))


def recurrent() -> onnx.ModelProto:
    """A bidirectional LSTM and a GRU between layers, on sequences [N, steps, features] of any length."""
    net = Net(["N", "T", 8])
    x = net.op("Transpose", net.op("Relu", net.linear("x", 8, 12)), perm=[1, 0, 2])
    lstm = (net.weight(2, 40, 12, fan_in=12), net.weight(2, 40, 10, fan_in=10), net.weight(2, 80))
    x = net.op("LSTM", x, *lstm, hidden_size=10, direction="bidirectional")
    x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1, 3]), net.constant([0, 0, 20], np.int64))
    gru = (net.weight(1, 27, 20, fan_in=20), net.weight(1, 27, 9, fan_in=9), net.weight(1, 54))
    x = net.op("Squeeze", net.op("GRU", x, *gru, hidden_size=9, linear_before_reset=1), net.constant([1], np.int64))
    return net.model(net.linear(net.op("Transpose", x, perm=[1, 0, 2]), 9, 6))


def branches() -> onnx.ModelProto:
    """An If whose branches have a layer each, and a Loop that reads a weight of the outer graph."""
    net, state = Net(["N", 12]), helper.make_tensor_value_info("state", TensorProto.FLOAT, ["N", 16])
    x = net.op("Relu", net.gemm("x", 12, 16))

    def body(inner: Net, inputs: Sequence[onnx.ValueInfoProto], *outputs: onnx.ValueInfoProto) -> onnx.GraphProto:
        return helper.make_graph(inner.nodes, inner.prefix, inputs, outputs, inner.constants)

    def port(name: str, kind: int = TensorProto.BOOL, shape: Shape = ()) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    def branch(op: str) -> onnx.GraphProto:
        inner = Net([], prefix=f"{op}_")
        return body(inner, [], port(inner.op(op, inner.gemm(x, 16, 16)), TensorProto.FLOAT, ["N", 16]))

    large = net.op("Greater", net.op("ReduceMax", "x", keepdims=0), net.constant(1.6))
    x = net.op("If", large, then_branch=branch("Relu"), else_branch=branch("Tanh"))
    inner = Net([], prefix="again_")
    y = inner.op("Tanh", inner.op("Add", inner.op("MatMul", "state", net.weight(16, 16, fan_in=16)), "state"))
    ports = [port("at", TensorProto.INT64), port("go"), state]
    loop = body(inner, ports, port(inner.op("Identity", "go")), port(y, TensorProto.FLOAT, ["N", 16]))
    x = net.op("Loop", net.constant(3, np.int64), net.constant(True, np.bool_), x, body=loop)
    return net.model(net.gemm(net.op("Relu", x), 16, 5))


MORE: dict[str, Callable[[], onnx.ModelProto]] = {f.__name__: f for f in (fixed_batch, outliers, recurrent, branches)}


def harsh(name: str) -> tuple[str, list[Feed]]:
    """Calibration data that mislead: the name of the model they are for, and its feeds. Others are as `feeds` gives them.

    few       four samples
    clipped   a few values of one sample are 30 times as large as all others
    padded    the second half of each sequence is the same everywhere
    """
    model = {"few": "mobilenet", "clipped": "cnn", "padded": "transformer"}[name]
    samples = feeds(make(model), 4 if name == "few" else 16)
    if name == "clipped":
        samples[5]["x"][:, :, :2, :2] *= 30
    elif name == "padded":
        for sample in samples:
            sample["x"][:, 3:] = 0.5
    return model, samples


HARSH = ("few", "clipped", "padded")


@cache
def make(name: str) -> onnx.ModelProto:
    """A model by its name, made once. Leave it alone."""
    return {**ZOO, **MORE}[name]()
