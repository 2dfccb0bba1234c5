"""Exact float rewrites done once, at import, so that every later pass and the exporter meet one form.

Constants are folded, each layer gets a weight of its own, BatchNorm and constant additions move into layers, and
chains that exporters wrote out (GELU, HardSwish, LayerNormalization, MatMul + Add) become the one operator that
runtimes know. Each function is one rewrite; `canonicalize` is their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.core import BatchNorm, Graph
from onnxq_plugins.spec import Array


def canonicalize(graph: Graph, flatten: bool = True) -> None:
    """Bring a freshly imported graph into canonical form, in place; `flatten` includes `flatten_matmul`."""
    try:
        graph._graph.fold_constants(error_ok=True, size_threshold=2**31).cleanup()
    except Exception as error:  # graphsurgeon looks into control flow without asking what is there
        raise OnnxqError(
            f"the constants of the model cannot be folded ({' '.join(str(error).split())[:200]}); check it "
            "with onnx.checker.check_model."
        ) from error
    graph.tidy()
    split_shared_weights(graph)
    normalize_gemm(graph)
    fold_batchnorm(graph)
    fold_bias(graph)
    fuse_scalar_functions(graph)
    fuse_layernorm(graph)
    if flatten:
        flatten_matmul(graph)
    graph.tidy()
    graph.touched.clear()


def split_shared_weights(graph: Graph) -> None:
    """Law L7: each layer owns its weight and bias. The exporter merges equal codes again."""
    for layer in graph.layers:
        node = graph.producer(layer.output)
        assert node is not None
        for i, tensor in enumerate(node.inputs[1:], start=1):
            if isinstance(tensor, gs.Constant) and len(tensor.outputs) > 1:
                node.inputs[i] = graph.add_constant(f"{tensor.name}_{layer.name}", tensor.values.copy())
    graph.changed()


def normalize_gemm(graph: Graph) -> None:
    """alpha and beta of a Gemm move into its weight and bias; a bias is one vector [N], any other an Add behind."""
    for layer in [layer for layer in graph.layers if layer.op == "Gemm"]:
        node = graph.producer(layer.output)
        assert node is not None
        alpha, beta = node.attrs.pop("alpha", 1.0), node.attrs.pop("beta", 1.0)
        if alpha != 1.0:
            graph.set_constant(layer.weight, graph.constant(layer.weight) * np.float32(alpha))
        if layer.bias is not None:
            bias, n = graph.constant(layer.bias) * np.float32(beta), layer.shape[layer.out_axis]
            if bias.size == 1 or bias.shape in ((n,), (1, n)):
                graph.set_constant(layer.bias, np.broadcast_to(bias.ravel(), (n,)))
            else:  # one per sample
                graph.set_constant(layer.bias, bias)
                output, product = node.outputs[0], graph.add_variable(f"{layer.name}_product", like=node.outputs[0])
                addend = node.inputs.pop()
                node.outputs[0] = product
                graph.add_node("Add", f"{layer.name}_bias", [product, addend], [output], before=node)
    graph.tidy()


def fold_batchnorm(graph: Graph) -> None:
    """y = gamma (Wx + b - mean) / sqrt(var + eps) + beta becomes one layer; the statistics are kept by the graph."""
    for node in graph.nodes:
        if node.op != "BatchNormalization" or node.attrs.get("training_mode", 0):
            continue
        if not all(isinstance(t, gs.Constant) for t in node.inputs[1:5]):
            continue
        layer = next((y for y in graph.layers if y.output == node.inputs[0].name), None)
        if layer is None or len(graph.consumers(layer.output)) > 1 or layer.output in graph.outputs:
            continue
        if layer.op == "MatMul":  # on tokens BatchNormalization is over axis 1, not over the outputs, and MatMul has no bias
            continue
        gamma, beta, mean, variance = (graph.constant(t.name).astype(np.float64) for t in node.inputs[1:5])
        if any(v.shape != (layer.channels,) for v in (gamma, beta, mean, variance)):
            continue  # it cannot run; onnxruntime tells why
        factor = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        scale_outputs(graph, layer.name, factor)
        add_bias(graph, layer.name, beta - mean * factor)
        owner = node.inputs[0]
        graph.batchnorms[layer.output] = BatchNorm(gamma, beta, mean, variance)
        last = node.outputs[0]
        graph.bypass(node, owner)
        if last.name in graph.outputs:  # the layer took over the output's name
            graph.batchnorms[last.name] = graph.batchnorms.pop(layer.output)


def fold_bias(graph: Graph) -> None:
    """A constant per output channel, added behind a Conv, ConvTranspose or Gemm, joins the bias."""
    for node in graph.nodes:
        if node.op != "Add":
            continue
        x, constant = _variable_and_constant(node)
        layer = next((y for y in graph.layers if x is not None and y.output == x.name), None)
        if layer is None or constant is None or layer.op == "MatMul" or len(graph.consumers(layer.output)) > 1:
            continue
        channels = _channels(layer.op, layer.shape, layer.out_axis, layer.groups)
        rank = len(layer.shape)
        values = constant.values
        at = 1 if layer.op != "Gemm" else rank - 1  # axis of the channels in the output
        shape = (1,) * (rank - values.ndim) + tuple(values.shape)
        if len(shape) != rank or any(n != (channels if axis == at else 1) for axis, n in enumerate(shape)):
            continue
        if layer.output not in graph.outputs:
            add_bias(graph, layer.name, values.reshape(-1).astype(np.float64))
            if (norm := graph.batchnorms.get(layer.output)) is not None:  # its beta is the output's mean
                graph.batchnorms[layer.output] = replace(norm, beta=norm.beta + values.reshape(-1))
            graph.bypass(node, graph.tensor(layer.output))


def scale_outputs(graph: Graph, name: str, factor: Array) -> None:
    """Multiply the outputs of a layer, weight and bias, by one factor per channel; computed in float64."""
    layer = graph.layer(name)
    weight = graph.constant(layer.weight).astype(np.float64)
    if layer.op == "ConvTranspose":  # [IC, OC / groups, ...]: the factor depends on the group too
        per_group = factor.reshape(layer.groups, -1)
        rows = weight.reshape(layer.groups, -1, *weight.shape[1:])
        weight = (rows * per_group.reshape(layer.groups, 1, -1, *(1,) * (weight.ndim - 2))).reshape(weight.shape)
    else:
        weight = weight * factor.reshape([-1 if a == layer.out_axis else 1 for a in range(weight.ndim)])
    graph.set_constant(layer.weight, weight.astype(np.float32))
    if layer.bias is not None:
        graph.set_constant(layer.bias, (graph.constant(layer.bias).astype(np.float64) * factor).astype(np.float32))


def add_bias(graph: Graph, name: str, values: Array) -> None:
    """Add one value per output channel to a layer's bias, made if there is none. MatMul has no place for one."""
    layer = graph.layer(name)
    if layer.bias is not None:
        graph.set_constant(layer.bias, (graph.constant(layer.bias) + values).astype(np.float32))
        return
    node = graph.producer(layer.output)
    assert node is not None
    bias = graph.add_constant(f"{layer.name}_bias", values.astype(np.float32))
    while len(node.inputs) > 2:  # an empty, optional input
        node.inputs.pop()
    node.inputs.append(bias)
    graph.touched.add(bias.name)
    graph.changed()


# ---- functions of one variable that exporters write out --------------------------------------------------------------

erf = np.vectorize(math.erf, otypes=[np.float64])
_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Tanh": np.tanh,
    "Erf": erf,
    "Relu": lambda x: np.maximum(x, 0),
    "Sqrt": np.sqrt,
    "Min": np.minimum,
    "Max": np.maximum,
    "Clip": lambda x, lo=-np.inf, hi=np.inf: np.clip(x, lo, hi),
}
_ANCHORS = ("Tanh", "Erf", "HardSigmoid", "Clip")
_KNOWN: tuple[tuple[str, dict[str, str], int, Callable[[Array], Array]], ...] = (
    ("Gelu", {"approximate": "tanh"}, 20, lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    ("Gelu", {"approximate": "none"}, 20, lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2)))),
    ("HardSwish", {}, 14, lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
)


def fuse_scalar_functions(graph: Graph) -> None:
    """GELU and HardSwish written out in elementary operators become one operator.

    Recognised by value, not by pattern: any closed region of scalar operators around a Tanh, Erf, HardSigmoid or Clip
    is evaluated on a grid and compared, so every algebraic way of writing the function is found.
    """
    grid = np.concatenate([np.linspace(-9, 9, 301), np.logspace(-6, 1, 40), -np.logspace(-6, 1, 40)])
    for anchor in graph.nodes:
        if anchor.op not in _ANCHORS or not anchor.outputs:
            continue
        for x, end in _regions(graph, anchor):
            known = next((k for k in _KNOWN if k[2] <= graph.opset and _matches(end, x, grid, k[3])), None)
            if known is not None:
                op, attrs = known[:2]
                output = end.outputs[0]
                end.outputs.clear()
                graph.add_node(op, end.name, [x], [output], before=end, **attrs)
                break
    graph.tidy()


def _regions(graph: Graph, anchor: gs.Node) -> Iterator[tuple[gs.Tensor, gs.Node]]:
    """(start tensor, last node) of regions around `anchor` that could be x * f(x): smallest first."""
    ends, node = [], anchor
    for _ in range(6):
        readers = node.outputs[0].outputs
        if len(readers) != 1 or readers[0].op not in _FUNCTIONS or node.outputs[0] in graph._graph.outputs:
            break
        node = readers[0]
        if node.op in ("Mul", "Div"):
            ends.append(node)
    starts: list[gs.Tensor] = []
    frontier = [anchor]
    for _ in range(6):
        above = [t for n in frontier for t in n.inputs if not isinstance(t, gs.Constant) and not t.is_empty()]
        starts += [t for t in above if t not in starts and len(t.outputs) > 1]
        frontier = [t.inputs[0] for t in above if t.inputs]
    for end in ends:
        for start in starts:
            if _closed(graph, start, end):
                yield start, end


def _closed(graph: Graph, start: gs.Tensor, end: gs.Node) -> bool:
    """True if `end` depends on `start` and scalar constants alone and nothing between is read elsewhere."""
    region, todo, names = [end], [end], {end.name}
    while todo:
        for t in todo.pop().inputs:
            if t is start or t.is_empty():
                continue
            if isinstance(t, gs.Constant):
                if t.values.size != 1:
                    return False
                continue
            if not t.inputs or t.inputs[0].op not in (*_FUNCTIONS, "HardSigmoid") or len(region) > 12:
                return False
            if t.inputs[0].name not in names:
                names.add(t.inputs[0].name)
                region.append(t.inputs[0])
                todo.append(t.inputs[0])
    inside = [n.outputs[0] for n in region if n is not end]
    return all(reader.name in names for t in inside for reader in t.outputs) and not any(
        t in graph._graph.outputs for t in inside
    )


def _matches(end: gs.Node, start: gs.Tensor, grid: Array, function: Callable[[Array], Array]) -> bool:
    def value(t: gs.Tensor) -> Array:
        if t is start:
            return grid
        if isinstance(t, gs.Constant):
            return np.asarray(t.values, np.float64).reshape(())
        node = t.inputs[0]
        if node.op == "HardSigmoid":
            alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
            return np.asarray(np.clip(alpha * value(node.inputs[0]) + beta, 0, 1))
        return np.asarray(_FUNCTIONS[node.op](*(value(i) for i in node.inputs if not i.is_empty())))

    with np.errstate(all="ignore"):
        found, wanted = value(end.outputs[0]), function(grid)
    return found.shape == wanted.shape and bool(np.allclose(found, wanted, rtol=1e-5, atol=1e-6))


def fuse_layernorm(graph: Graph) -> None:
    """(x - mean) / sqrt(var + eps) * gamma + beta over the last axis becomes LayerNormalization."""
    for root in graph.nodes:
        if root.op != "Sqrt" or graph.opset < 17:
            continue
        plus = _made_by(root.inputs[0], "Add")
        variance, epsilon = _variable_and_constant(plus) if plus else (None, None)
        square = _mean_of(variance)
        power = _made_by(square, "Pow") or _made_by(square, "Mul")
        if power is None or epsilon is None or epsilon.values.size != 1:
            continue
        two: gs.Tensor = power.inputs[1]
        if power.op == "Pow" and not (isinstance(two, gs.Constant) and two.values.size == 1 and two.values.item() == 2):
            continue
        if power.op == "Mul" and two is not power.inputs[0]:
            continue
        readers = root.outputs[0].outputs
        divide = readers[0] if len(readers) == 1 and readers[0].op == "Div" else None
        if divide is None or divide.inputs[1] is not root.outputs[0]:
            continue
        x = _centred(divide.inputs[0])
        size = list(getattr(x, "shape", None) or [None])[-1]
        if x is None or _centred(power.inputs[0]) is not x or not isinstance(size, int):
            continue
        end: gs.Node = divide
        vectors: list[Array] = []
        for op, neutral in (("Mul", 1.0), ("Add", 0.0)):
            readers = end.outputs[0].outputs
            _, constant = _variable_and_constant(readers[0]) if len(readers) == 1 and readers[0].op == op else (None, None)
            if (
                constant is not None
                and constant.values.size == size
                and constant.values.shape[-1] == size
                and end.outputs[0] not in graph._graph.outputs
            ):
                vectors.append(constant.values.reshape(size).astype(np.float32))
                end = readers[0]
            else:
                vectors.append(np.full(size, neutral, np.float32))
        gamma, beta = (graph.add_constant(f"{end.name}_{n}", v) for n, v in zip(("gamma", "beta"), vectors, strict=True))
        output = end.outputs[0]
        end.outputs.clear()
        graph.add_node(
            "LayerNormalization",
            end.name,
            [x, gamma, beta],
            [output],
            before=end,
            axis=-1,
            epsilon=float(epsilon.values.item()),
        )
    graph.tidy()


def _made_by(tensor: gs.Tensor | None, op: str) -> gs.Node | None:
    return tensor.inputs[0] if tensor is not None and tensor.inputs and tensor.inputs[0].op == op else None


def _mean_of(tensor: gs.Tensor | None) -> gs.Tensor | None:
    """What `tensor` is the mean of, if that is over the last axis alone and keeps it."""
    node = _made_by(tensor, "ReduceMean")
    if node is None or not node.attrs.get("keepdims", 1):
        return None
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        axes = node.inputs[1].values.tolist()
    rank = len(node.inputs[0].shape or ())
    return node.inputs[0] if axes is not None and list(axes) in ([-1], [rank - 1]) else None


def _centred(tensor: gs.Tensor) -> gs.Tensor | None:
    """x, if `tensor` is x - mean(x)."""
    node = _made_by(tensor, "Sub")
    return node.inputs[0] if node is not None and _mean_of(node.inputs[1]) is node.inputs[0] else None


def _variable_and_constant(node: gs.Node) -> tuple[gs.Tensor | None, gs.Constant | None]:
    a, b = (*node.inputs, None, None)[:2]
    if isinstance(a, gs.Constant):
        a, b = b, a
    return (a, b) if isinstance(b, gs.Constant) and not isinstance(a, gs.Constant) else (None, None)


# ---- MatMul + Add on more than two axes -------------------------------------------------------------------------------

_POINTWISE = {"Relu", "LeakyRelu", "Gelu", "Erf", "Tanh", "Sigmoid", "HardSwish", "HardSigmoid", "Clip", "Elu", "Selu"}


def flatten_matmul(graph: Graph) -> None:
    """MatMul + Add(bias) becomes Gemm, in two dimensions: [batch * tokens, channels].

    onnxruntime has an integer Gemm with bias, but its integer MatMul has none, so the bias (and what follows it) would
    run apart. Pointwise operators, residual adds and LayerNormalization behind such a Gemm stay in two dimensions as
    well, which leaves few Reshapes. With more than one dynamic axis besides the channels the
    shape back could not be written down: those MatMuls are left alone.
    """
    flat: dict[str, gs.Tensor] = {}  # tensor name -> the same values in two dimensions
    for node in graph.nodes:
        if node.op == "MatMul":
            _matmul_to_gemm(graph, node, flat)
        elif flat and node.outputs and node.outputs[0].name not in flat:
            _stay_flat(graph, node, flat)
    graph.tidy()


def _matmul_to_gemm(graph: Graph, node: gs.Node, flat: dict[str, gs.Tensor]) -> None:
    x, weight = node.inputs
    if isinstance(x, gs.Constant) or not isinstance(weight, gs.Constant) or weight.values.ndim != 2:
        return
    readers = node.outputs[0].outputs
    if len(readers) != 1 or readers[0].op != "Add" or node.outputs[0] in graph._graph.outputs:
        return
    add, n = readers[0], weight.values.shape[1]
    _, bias = _variable_and_constant(add)
    if bias is None or bias.values.size != n or bias.values.shape[-1] != n:
        return
    if x.shape is None or bias.values.ndim > len(x.shape):  # the sum has more axes than the product
        return
    output = add.outputs[0]
    bias = graph.add_constant(f"{bias.name}_vector", bias.values.reshape(n)) if bias.values.ndim > 1 else bias
    if x.shape is not None and len(x.shape) == 2:
        add.outputs.clear()
        graph.add_node("Gemm", node.name, [x, weight, bias], [output], before=add)
    elif _unflat_shape(output) is not None:
        add.outputs.clear()
        two_d = graph.add_variable(f"{output.name}_2d", shape=[None, n])
        graph.add_node("Gemm", node.name, [_flat(graph, x, flat, node), weight, bias], [two_d], before=node)
        _unflatten(graph, two_d, output, flat, node)
    node.name = f"{node.name}_was_matmul" if not add.outputs else node.name


def _stay_flat(graph: Graph, node: gs.Node, flat: dict[str, gs.Tensor]) -> None:
    """Run a node that does not look across tokens on the two-dimensional form of its inputs."""
    if not any(t.name in flat for t in node.inputs) or _unflat_shape(node.outputs[0]) is None:
        return
    x, output = node.inputs[0], node.outputs[0]
    if node.op in ("Add", "Sub", "Mul", "Div"):
        operands = []
        for t in node.inputs:
            if isinstance(t, gs.Constant):
                if t.values.size not in (1, output.shape[-1]) or (t.values.ndim and t.values.shape[-1] != t.values.size):
                    return
                operands.append(t if t.values.ndim < 2 else graph.add_constant(f"{t.name}_vector", t.values.reshape(-1)))
            elif list(t.shape or ()) != list(output.shape):
                return
            else:
                operands.append(t)
    elif node.op in _POINTWISE or (
        node.op == "LayerNormalization"
        and len(node.outputs) == 1
        and node.attrs.get("axis", -1) in (-1, len(output.shape) - 1)
    ):
        operands = list(node.inputs)
    else:
        return
    attrs = dict(node.attrs) | ({"axis": -1} if node.op == "LayerNormalization" else {})
    operands = [_flat(graph, t, flat, node) if t is x or node.op in ("Add", "Sub", "Mul", "Div") else t for t in operands]
    node.outputs.clear()
    two_d = graph.add_variable(f"{output.name}_2d", shape=[None, output.shape[-1]])
    graph.add_node(node.op, node.name, operands, [two_d], before=node, **attrs)
    _unflatten(graph, two_d, output, flat, node)


def _flat(graph: Graph, tensor: gs.Tensor, flat: dict[str, gs.Tensor], before: gs.Node) -> gs.Tensor:
    if isinstance(tensor, gs.Constant):
        return tensor
    if tensor.name not in flat:
        channels = tensor.shape[-1]
        shape = graph.add_constant(f"{tensor.name}_2d_shape", np.array([-1, channels], np.int64))
        flat[tensor.name] = graph.add_variable(f"{tensor.name}_2d", shape=[None, channels])
        graph.add_node("Reshape", f"{tensor.name}_flatten", [tensor, shape], [flat[tensor.name]], before=before)
    return flat[tensor.name]


def _unflatten(graph: Graph, two_d: gs.Tensor, output: gs.Tensor, flat: dict[str, gs.Tensor], before: gs.Node) -> None:
    shape = graph.add_constant(f"{output.name}_shape", np.array(_unflat_shape(output), np.int64))
    graph.add_node("Reshape", f"{output.name}_unflatten", [two_d, shape], [output], before=before)
    flat[output.name] = two_d


def _unflat_shape(tensor: gs.Tensor) -> list[int] | None:
    """The target of a Reshape to the tensor's shape; None if more than one axis is dynamic."""
    if tensor.shape is None or len(tensor.shape) < 3 or not isinstance(tensor.shape[-1], int):
        return None
    shape = [n if isinstance(n, int) else -1 for n in tensor.shape]
    return shape if shape.count(-1) <= 1 and 0 not in shape else None


def _channels(op: str, shape: tuple[int, ...], out_axis: int, groups: int) -> int:
    return shape[1] * groups if op == "ConvTranspose" else shape[out_axis]
