"""The exact rewrites that carry every graph algorithm: permute, rescale, replace a layer by a sum of layers, split a layer
by its output channels, or by parts of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.elements import ChannelGroup
from onnxq_plugins.graph.layer import BatchNorm, Layer
from onnxq_plugins.spec import Array


def permute(graph: Graph, group: ChannelGroup, order: Sequence[int] | Array) -> None:
    """New channel c of the group is old channel order[c]. The float function stays; ValueError if `order` is not a
    permutation or the group is of kind ``rescale``."""
    order = np.asarray(order)
    if group.kind != "permute" or not np.array_equal(np.sort(order), np.arange(group.size)):
        raise ValueError(f"order must be a permutation of {group.size} channels of a group of kind 'permute'")
    for member in group.weights:
        values = graph.constant(member.tensor).copy()
        part = values[slice(*member.rows)] if member.rows else values
        moved = np.moveaxis(part, member.axis, 0)
        moved[member.index.ravel()] = moved[member.index[order].ravel()].copy()
        graph.set_constant(member.tensor, values)
    for member in group.members:
        if not member.constant and member.tensor in graph.batchnorms:  # such statistics are per channel too
            source = np.arange(len(graph.batchnorms[member.tensor].gamma))
            source[member.index.ravel()] = member.index[order].ravel()
            graph.batchnorms[member.tensor] = _statistics(graph.batchnorms[member.tensor], source)
    graph.touched.update(group.tensors)


def rescale(graph: Graph, group: ChannelGroup, factors: Sequence[float] | Array) -> None:
    """Multiply channel c of the group's activations by factors[c] > 0, and undo it in their consumers."""
    factors = np.asarray(factors, np.float64)
    if group.kind != "rescale" or factors.shape != (group.size,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise ValueError(f"factors must be {group.size} positive finite numbers for a group of kind 'rescale'")
    for member in group.weights:
        if member.role == "fixed":
            continue
        f = factors if member.role == "output" else 1 / factors
        values = graph.constant(member.tensor).copy()
        part = values[slice(*member.rows)] if member.rows else values
        moved = np.moveaxis(part, member.axis, 0)
        at = member.index.ravel()
        spread = np.repeat(f, member.index.shape[1]).reshape(-1, *(1,) * (moved.ndim - 1))
        moved[at] = (moved[at].astype(np.float64) * spread).astype(np.float32)
        graph.set_constant(member.tensor, values)
    for member in group.members:
        norm = graph.batchnorms.get(member.tensor)
        if norm is not None and not member.constant:  # gamma and beta are the activation's deviation and mean
            spread = np.ones(len(norm.gamma))
            spread[member.index.ravel()] = np.repeat(factors, member.index.shape[1])
            graph.batchnorms[member.tensor] = replace(norm, gamma=norm.gamma * spread, beta=norm.beta * spread)
    graph.touched.update(group.tensors)


def replace_with_sum(graph: Graph, layer: Layer, parts: Sequence[Array]) -> list[Layer]:
    """Layer W x + b becomes W_1 x + b + W_2 x + ... with sum(W_k) = W; returns the new layers.

    parts   arrays in the weight's shape or, for a convolution with odd kernel sizes, the centre taps alone
            [OC, IC/groups, 1, ...]: such a part becomes a pointwise convolution. ValueError if their sum differs from the
            weight by more than 1e-5 relative, or if a pointwise convolution cannot replace the taps (`centre_pads`)

    The first part has the bias. Sums run from the last part to the first, so that partial sums of ever smaller parts are
    small. Statistics of a folded BatchNormalization stay with the sum, which has the layer's output name.
    """
    weight, parts = graph.constant(layer.weight), [np.asarray(part, np.float32) for part in parts]
    total = _total(layer, parts)
    if total is None or not np.allclose(total, weight, rtol=0, atol=1e-5 * (np.abs(weight).max() or 1.0)):
        raise ValueError(f"layer '{layer.name}': the parts do not add up to its weight")
    pads = centre_pads(graph, layer) if any(part.shape != layer.shape for part in parts) else []
    node = graph.producer(layer.output)
    assert node is not None
    output, names, written = node.outputs[0], [], []
    node.outputs.clear()
    for k, part in enumerate(parts):
        name, attrs = f"{layer.name}_part{k + 1}", dict(node.attrs)
        if part.shape != layer.shape:
            attrs = {
                "group": layer.groups,
                "strides": attrs.get("strides") or [1] * (part.ndim - 2),
                "pads": pads,
                "kernel_shape": [1] * (part.ndim - 2),
            }
        inputs = [node.inputs[0], graph.add_constant(f"{layer.weight}_part{k + 1}", part)]
        if k == 0 and layer.bias is not None:
            inputs.append(node.inputs[2])
        y = graph.add_variable(f"{name}_out", like=output)
        graph.add_node(layer.op, name, inputs, [y], before=node, **attrs)
        names.append(name)
        written.append(y)
    total = written[-1]
    for k in reversed(range(len(parts) - 1)):
        joined = graph.add_variable(f"{names[k]}_sum", like=output) if k else output
        graph.add_node("Add", f"{layer.name}_sum{k + 1}", [written[k], total], [joined], before=node)
        total = joined
    if len(parts) == 1:
        graph.add_node("Identity", f"{layer.name}_sum", [total], [output], before=node)
    graph.tidy()
    graph.touched.update([layer.weight, output.name])
    return [graph.layer(name) for name in names]


def centre_pads(graph: Graph, layer: Layer) -> list[int]:
    """Pads, as ONNX lists them, of the pointwise convolution that equals the centre taps of a convolution: its own pads
    minus dilation * (kernel - 1) / 2 on each side, which is 0 if the output is as large as the input. Raises ValueError
    where `centre_problem` has something to say."""
    if problem := centre_problem(graph, layer):
        raise ValueError(f"layer '{layer.name}': {problem}")
    return [ends[side] for side in (0, 1) for ends in _centre_ends(graph, layer)]


def centre_problem(graph: Graph, layer: Layer) -> str:
    """Why the centre taps of a layer cannot be a pointwise convolution, "" if they can: another operator, even kernel sizes,
    a pad that would be negative, pads by ``auto_pad`` that depend on an unknown input size."""
    if layer.op != "Conv" or any(k % 2 == 0 for k in layer.shape[2:]):
        return "only a Conv with odd kernel sizes has a centre"
    sizes, strides = _spatial(graph, layer), layer.attrs.get("strides") or [1] * (len(layer.shape) - 2)
    same = str(layer.attrs.get("auto_pad", "")).startswith("SAME")
    if same and any(not isinstance(n, int) and s > 1 for n, s in zip(sizes, strides, strict=True)):
        return "with auto_pad and a stride, its pads depend on a size that is unknown"
    if any(pad < 0 for ends in _centre_ends(graph, layer) for pad in ends):
        return "its padding is smaller than half its kernel, so that its centre taps alone would need negative pads"
    return ""


def _spatial(graph: Graph, layer: Layer) -> tuple[int | str | None, ...]:
    """Spatial sizes of a layer's input, as far as they are known."""
    return (graph.shape(layer.input) or (None,) * len(layer.shape))[2:]


def _centre_ends(graph: Graph, layer: Layer) -> list[list[int]]:
    """Pads before and after along each spatial axis."""
    sizes = [n if isinstance(n, int) else 1 for n in _spatial(graph, layer)]
    kernel, _, dilations, pads = layer.geometry(sizes)
    return [[pad - d * (k - 1) // 2 for pad in ends] for k, d, ends in zip(kernel, dilations, pads, strict=True)]


def centre_of(shape: Sequence[int]) -> tuple[slice, ...]:
    """Index of the centre taps of a convolution weight [OC, IC/groups, *kernel] with odd kernel sizes; it keeps all axes."""
    return (slice(None), slice(None), *(slice(k // 2, k // 2 + 1) for k in shape[2:]))


def _total(layer: Layer, parts: Sequence[Array]) -> Array | None:
    """The sum, in float64, of parts in the shape of the weight or of its centre; None for other shapes and for no part."""
    total, odd = np.zeros(layer.shape), layer.op == "Conv" and all(k % 2 for k in layer.shape[2:])
    for part in parts:
        if part.shape == layer.shape:
            total += part
        elif odd and part.shape == (*layer.shape[:2], *[1] * (len(layer.shape) - 2)):
            total[centre_of(layer.shape)] += part
        else:
            return None
    return total if len(parts) else None


def split_values(graph: Graph, name: str, step: float, shift: float, low: int, high: int) -> tuple[str, str]:
    """Split a tensor x into the sum of x1 on a coarse grid and the rest x2; returns their names.

        x1 = step * clip(floor(x / step + shift), low, high),   x2 = x - x1

    With shift 1/2 x1 is the nearest multiple of the step. Where nothing is clipped x2 is in [-shift, 1 - shift) steps.
    ValueError if the step is not positive and finite.
    """
    if not (np.isfinite(step) and step > 0):
        raise ValueError(f"step = {step} must be positive and finite")
    x = graph.tensor(name)
    before = graph.consumers(name)[0] if graph.consumers(name) else None

    def constant(what: str, value: float) -> gs.Tensor:
        return graph.add_constant(f"{name}_{what}", np.array(value, np.float32))

    coarse, rest = graph.add_variable(f"{name}_coarse", like=x), graph.add_variable(f"{name}_rest", like=x)
    size, y = constant("step", step), x
    for op, *others in (
        ("Div", size),
        ("Add", constant("shift", shift)),
        ("Floor",),
        ("Clip", constant("low", low), constant("high", high)),
        ("Mul", size),
    ):
        inputs = [y, *others]
        y = coarse if op == "Mul" else graph.add_variable(f"{name}_{op.lower()}", like=x)
        graph.add_node(op, f"{coarse.name}_{op.lower()}", inputs, [y], before=before)
    graph.add_node("Sub", f"{rest.name}_sub", [x, coarse], [rest], before=before)
    return str(coarse.name), str(rest.name)


def split_input(graph: Graph, layer: Layer, parts: Sequence[str]) -> list[Layer]:
    """Layer W x + b becomes W x_1 + W x_2 + ... + b, each with its own weight; returns the new layers. The last one has the
    bias: its int32 codes are finest where the input's step is.

    parts   names of tensors of the input's shape that add up to the layer's input, which is not checked. ValueError for
            none, or for another shape

    Statistics of a folded BatchNormalization stay with the sum, which has the layer's output name.
    """
    node = graph.producer(layer.output)
    assert node is not None
    if not parts or any(graph.shape(name) != graph.shape(layer.input) for name in parts):
        raise ValueError(f"layer '{layer.name}': its input must be the sum of parts of its own shape")
    output, weight, names = node.outputs[0], graph.constant(layer.weight), []
    node.outputs.clear()
    total: gs.Tensor | None = None
    for k, part in enumerate(parts):
        name = f"{layer.name}_input{k + 1}"
        inputs = [graph.tensor(part), graph.add_constant(f"{layer.weight}_input{k + 1}", weight.copy())]
        if k == len(parts) - 1 and layer.bias is not None:
            inputs.append(node.inputs[2])
        y = graph.add_variable(f"{name}_out", like=output)
        graph.add_node(layer.op, name, inputs, [y], before=node, **dict(node.attrs))
        names.append(name)
        if total is not None:
            joined = output if k == len(parts) - 1 else graph.add_variable(f"{name}_sum", like=output)
            graph.add_node("Add", f"{layer.name}_inputs{k}", [total, y], [joined], before=node)
            y = joined
        total = y
    if len(parts) == 1:
        graph.add_node("Identity", f"{layer.name}_inputs", [total], [output], before=node)
    graph.tidy()
    graph.touched.update([layer.weight, output.name])
    return [graph.layer(name) for name in names]


def split_off_inputs(graph: Graph, layers: Sequence[Layer], channels: Array) -> list[Layer]:
    """Layers W x + b that read the same tensor become W' x + b + V x[channels], W' with 0 where V takes over; returns the
    new layers, with the weights V, one for each.

    channels   numbers of the input channels that the new layers read, through one Gather

    The old layers keep their names, weights and biases, and write tensors of their own; their outputs have the names of the
    sums, which are made behind the constant that is added to a MatMul, if that is its only reader. ValueError for grouped
    layers, a ConvTranspose, or layers of several inputs.
    """
    channels = np.sort(np.asarray(channels))
    if any(layer.groups > 1 or layer.op == "ConvTranspose" for layer in layers) or len({y.input for y in layers}) > 1:
        raise ValueError("only dense layers that read the same tensor can be split by its channels")
    x, names = graph.tensor(layers[0].input), []
    axis = 1 if layers[0].op == "Conv" else -1 if x.shape is None else len(x.shape) - 1
    part = graph.add_variable(f"{x.name}_outliers", like=x, shape=_resized(x.shape, axis, len(channels)))
    numbers = graph.add_constant(f"{part.name}_channels", channels.astype(np.int64))
    readers = {layer.name for layer in layers}
    first = next(node for node in graph.nodes if node.name in readers)
    graph.add_node("Gather", part.name, [x, numbers], [part], before=first, axis=axis)
    for layer in layers:
        weight, node = graph.constant(layer.weight), graph.producer(layer.output)
        assert node is not None
        mine, rest = np.take(weight, channels, axis=layer.in_axis), weight.copy()
        np.moveaxis(rest, layer.in_axis, 0)[channels] = 0.0
        graph.set_constant(layer.weight, rest)
        name, output = f"{layer.name}_outliers", _behind_bias(graph, layer)
        y, others = graph.add_variable(f"{name}_out", like=output), graph.add_variable(f"{output.name}_others", like=output)
        inputs = [part, graph.add_constant(f"{layer.weight}_outliers", mine)]
        graph.add_node(layer.op, name, inputs, [y], before=node, **dict(node.attrs))
        end, nodes = output.inputs[0], iter(graph.nodes)
        end.outputs[0] = others
        behind = next((next(nodes, None) for n in nodes if n is end), None)
        graph.add_node("Add", f"{name}_sum", [others, y], [output], before=behind)
        names.append(name)
        graph.touched.add(output.name)
    return [graph.layer(name) for name in names]


def _behind_bias(graph: Graph, layer: Layer) -> gs.Tensor:
    """The output of a layer, or of the Add of a constant vector that alone reads it where a MatMul has no bias."""
    output = graph.tensor(layer.output)
    if layer.op != "MatMul" or len(output.outputs) != 1 or layer.output in graph.outputs or output.outputs[0].op != "Add":
        return output
    add = output.outputs[0]
    other = next((t for t in add.inputs if t is not output), output)
    return add.outputs[0] if isinstance(other, gs.Constant) and other.shape == (layer.channels,) else output


def split_outputs(graph: Graph, layer: Layer, parts: Sequence[Array]) -> list[Layer]:
    """Layer becomes one layer for each part of its output channels, joined by a Concat; returns the new layers.

    parts   channel numbers of each part; together every channel once. If they are not ascending, a Gather behind the Concat
            restores the order

    The Relu or Clip behind the layer (`Layer.result`) moves into the parts, so that each writes the range that consumers
    see. Parts read the layer's input; those of a depthwise convolution only their channels of it, by Slice if these are
    consecutive, else by Gather. Raises ValueError for a ConvTranspose, another grouped convolution, or parts that are not a
    partition.
    """
    parts = [np.asarray(part) for part in parts]
    joined = _partition(layer, parts)
    node, after = graph.producer(layer.output), graph.elided_activation(layer.output)
    assert node is not None
    output, result = node.outputs[0], graph.tensor(layer.result)
    weight, bias = graph.constant(layer.weight), graph.constant(layer.bias) if layer.bias is not None else None
    statistics = graph.batchnorms.get(layer.output)
    axis = 1 if layer.op != "MatMul" else -1 if output.shape is None else len(output.shape) - 1
    weights, written = [], []
    for k, part in enumerate(parts):
        name, attrs = f"{layer.name}_part{k + 1}", dict(node.attrs)
        x = node.inputs[0]
        if layer.groups > 1:
            attrs["group"] = len(part)
            x = _select(graph, x, part // (layer.channels // layer.groups), f"{name}_in", node)
        weights.append(graph.add_constant(f"{layer.weight}_part{k + 1}", np.take(weight, part, axis=layer.out_axis)))
        inputs = [x, weights[-1]]
        if bias is not None:  # that of a Gemm may be broadcast
            own = np.take(bias, part, axis=-1) if bias.ndim and bias.shape[-1] == layer.channels else bias
            inputs.append(graph.add_constant(f"{layer.bias}_part{k + 1}", own))
        shape = _resized(output.shape, axis, len(part))
        y = graph.add_variable(f"{name}_out", like=output, shape=shape)
        graph.add_node(layer.op, name, inputs, [y], before=node, **attrs)
        if statistics is not None:
            graph.batchnorms[y.name] = _statistics(statistics, part)
        if after is not None:
            z = graph.add_variable(f"{name}_result", like=output, shape=shape)
            inputs = [y, *after.inputs[1:]]
            graph.add_node(after.op, f"{after.name}_part{k + 1}", inputs, [z], before=node, **dict(after.attrs))
            y = z
        written.append(y)
    for old in (node, after):
        if old is not None:
            old.outputs.clear()
    ordered = bool((np.diff(joined) > 0).all())
    whole = result if ordered else graph.add_variable(f"{layer.name}_parts", like=output)
    graph.add_node("Concat", f"{layer.name}_concat", written, [whole], before=node, axis=axis)
    if not ordered:
        order = graph.add_constant(f"{layer.name}_order", np.argsort(joined).astype(np.int32))
        graph.add_node("Gather", f"{layer.name}_gather", [whole, order], [result], before=node, axis=axis)
    graph.tidy()
    if after is not None:
        graph.batchnorms.pop(layer.output, None)
    graph.touched.update([layer.weight, *([layer.bias] if layer.bias else [])])
    layers = {y.weight: y for y in graph.layers}
    return [layers[constant.name] for constant in weights]


def _partition(layer: Layer, parts: Sequence[Array]) -> Array:
    """The channel numbers of all parts [channels]. Raises ValueError if the layer cannot be split like that."""
    if not splittable(layer):
        raise ValueError(f"layer '{layer.name}': a {layer.kind} {layer.op} cannot be split by output channels")
    joined = np.concatenate([part.ravel() for part in parts]) if parts else np.arange(0)
    if any(part.ndim != 1 or not len(part) for part in parts) or not np.array_equal(
        np.sort(joined), np.arange(layer.channels)
    ):
        raise ValueError(f"layer '{layer.name}': the parts must hold each of its {layer.channels} output channels once")
    return joined


def splittable(layer: Layer) -> bool:
    """True if `split_outputs` accepts a layer: dense, or a depthwise convolution."""
    return layer.op != "ConvTranspose" and layer.kind != "grouped"


def _select(graph: Graph, x: gs.Tensor, channels: Array, name: str, before: gs.Node) -> gs.Tensor:
    """Some channels (axis 1) of a tensor: itself, a Slice or a Gather."""
    shape = _resized(x.shape, 1, len(channels))
    run = bool((np.diff(channels) == 1).all())
    if run and x.shape is not None and x.shape[1] == len(channels):
        return x
    y = graph.add_variable(name, like=x, shape=shape)
    if run:
        ends = [
            graph.add_constant(f"{name}_{what}", np.array([value], np.int64))
            for what, value in (("start", channels[0]), ("end", channels[-1] + 1), ("axis", 1))
        ]
        graph.add_node("Slice", f"{name}_slice", [x, *ends], [y], before=before)
    else:
        numbers = graph.add_constant(f"{name}_channels", channels.astype(np.int32))
        graph.add_node("Gather", f"{name}_gather", [x, numbers], [y], before=before, axis=1)
    return y


def _resized(shape: Sequence[int | str | None] | None, axis: int, size: int) -> list[int | str | None] | None:
    """A shape with another size along one axis."""
    return None if shape is None else [size if a == axis % len(shape) else n for a, n in enumerate(shape)]


def _statistics(norm: BatchNorm, channels: Array) -> BatchNorm:
    """The statistics of some channels, in that order."""
    return BatchNorm(*(getattr(norm, f.name)[channels] for f in fields(norm)))
