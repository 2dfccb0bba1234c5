"""One streaming sweep through the float and the quantized network side by side, layer by layer.

Learned rounding does better when a layer knows the inputs it will really get: those of the quantized layers before it.
Running the whole network for each layer would cost layers x samples runs. Instead every sample's live activations are kept
at the current layer; a step runs only the operators between one layer and the next, float and quantized, so that the whole
sweep costs one run of each network. The quantized operators come from the exporter: what is measured is what ships."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.shapes import shapes_of
from onnxq_plugins.data import Data
from onnxq_plugins.data.samples import spread
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.qdq import Writer
from onnxq_plugins.graph import Graph, Layer
from onnxq_plugins.graph.bodies import outer_reads
from onnxq_plugins.graph.opsets import NARROW_OPSET, raise_opset
from onnxq_plugins.graph.patches import gram, output_columns, patches, split
from onnxq_plugins.job import Job
from onnxq_plugins.parallel import map_threads
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers.gram import precision
from onnxq_plugins.spec import Array


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What one layer reads in the quantized network, over `count` patches x, and what it should answer, y (the float layer's
    output without its bias). float64, h and left in the precision of `solvers.gram`. Each patch counts as much as `trust`
    says.

    h       E[x x^T] [groups, D, D]; block-diagonal, as more groups, where D is above the limit (see `Gram`)
    mean    E[x] [groups, D]
    left    E[(y - W x) x^T] [layer's groups, O, D], what the weights leave of the outputs
    output  E[y] [layer's groups, O]
    judged  the same over those of the patches that solutions are judged by (float32); None where there are none
    """

    h: Array
    mean: Array
    left: Array
    output: Array
    count: int
    judged: LayerStatistics | None = None

    def others(self) -> LayerStatistics:
        """Of the patches that are not judged by."""
        own = self.judged
        if own is None:
            return self
        share = own.count / self.count
        h, mean, left, output = (
            _rest(whole, part, share)
            for whole, part in ((self.h, own.h), (self.mean, own.mean), (self.left, own.left), (self.output, own.output))
        )
        return LayerStatistics(h, mean, left, output, self.count - own.count)


def _rest(whole: Array, part: Array, share: float) -> Array:
    """The mean over all but a part that is a share of the whole: (whole - share * part) / (1 - share), in one array."""
    rest: Array = part * part.dtype.type(-share)
    rest += whole
    rest /= 1 - share
    return rest


@dataclass
class _Network:
    """One of the two networks: its constants, and the live activations of every sample."""

    proto: onnx.ModelProto
    floats: Mapping[str, Array]  # large constants by name
    live: dict[str, list[Array]]  # tensor -> one array per sample
    samples: int
    dequantizers: dict[str, onnx.NodeProto] = field(default_factory=dict)  # output -> node: copied to where it is read
    sizes: Mapping[str, int] = field(default_factory=dict)  # bytes of a tensor per sample, where they are known
    passing: list[_Step] = field(default_factory=list)  # the last steps, if their outputs are not held but computed again
    kinds: dict[str, set[tuple[Any, tuple[int, ...]]]] = field(default_factory=dict)  # types and shapes of their outputs

    def step(self, nodes: list[onnx.NodeProto], constants: Iterable[TensorProto], keep: set[str]) -> _Step:
        """The operators as a model of their own that yields what is to be kept."""
        small = {t.name: t for t in (*self.proto.graph.initializer, *constants)}
        produced = {o for n in nodes for o in n.output}
        outputs = [name for name in dict.fromkeys(o for n in nodes for o in n.output) if name in keep]
        if not outputs:
            return _Step(self, keep, passing=bool(self.passing))
        nodes = _needed(nodes, set(outputs))
        copied: dict[str, onnx.NodeProto] = {}
        for node in nodes:
            for name in reads(node):
                if name in self.dequantizers and name not in produced:
                    copied[name] = self.dequantizers[name]
        nodes = [*copied.values(), *nodes]
        produced = {o for n in nodes for o in n.output}
        needed = dict.fromkeys(name for n in nodes for name in reads(n) if name not in produced)
        inputs = [name for name in needed if name in self.live]
        graph = helper.make_graph(
            nodes,
            "step",
            [_describe(name, self.kinds.get(name) or {(v.dtype, v.shape) for v in self.live[name]}) for name in inputs],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [small[name] for name in needed if name in small],
        )
        model = helper.make_model(graph, opset_imports=self.proto.opset_import)
        model.ir_version = self.proto.ir_version
        weights = {name: self.floats[name] for name in needed if name in self.floats}
        session = runtimes.session(model, weights=weights, lean=True, arena=False, written=True)
        passing = self._passing([name for name in (*self.live, *outputs) if name in keep])
        self.live |= {name: [_GONE] * self.samples for name in outputs}
        return _Step(self, keep, session, inputs, outputs, passing)

    def _passing(self, names: Sequence[str]) -> bool:
        """True if these tensors are not to be held for all samples: they are large, and what is held now is smaller."""
        held = {name: values[0].nbytes for name, values in self.live.items()}
        now, then = sum(held.values()), sum(held.get(name) or self.sizes.get(name, 0) for name in names)
        return len(self.passing) < _AGAIN and then * self.samples > _HELD and now < then


@dataclass(frozen=True)
class _Step:
    """From one layer to the next in one of the two networks; without a session there is nothing to run."""

    network: _Network
    keep: set[str]
    session: Any = None
    inputs: Sequence[str] = ()
    outputs: Sequence[str] = ()
    passing: bool = False

    def run(self, sample: int) -> None:
        """Advance one sample."""
        live = self.network.live
        for step in (*self.network.passing, self):
            if step.session is not None:
                values = runtimes.run(step.session, {name: live[name][sample] for name in step.inputs})
                for name, value in zip(step.outputs, values, strict=True):
                    live[name][sample] = value
        if self.passing:
            for name in self.outputs:
                self.network.kinds.setdefault(name, set()).add((live[name][sample].dtype, live[name][sample].shape))

    def leave(self, sample: int) -> None:
        """Drop a sample's activations that no later operator reads, and those that are computed again."""
        again = {name for step in (*self.network.passing, self) for name in step.outputs} if self.passing else set[str]()
        for name, values in self.network.live.items():
            if name in again if self.passing else name not in self.keep:
                values[sample] = _GONE

    def finish(self) -> None:
        """Forget the tensors that no later operator reads."""
        network = self.network
        if not self.passing:
            network.passing.clear()
            network.live = {name: values for name, values in network.live.items() if name in self.keep}
        elif self.session is not None:
            network.passing.append(self)


_GONE = np.empty(0)
_HELD = 2**26  # bytes of one network's activations, of all samples, beyond which they are rather computed again,
_AGAIN = 3  # for so many layers: from an inverted residual's input, say, which is several times smaller than what is inside


def sweep(
    job: Job, layers: Iterable[Layer], positions: int = 256, limit: int = 4608, samples: int = 256
) -> Iterator[tuple[Layer, LayerStatistics]]:
    """Yield each of the planned `layers` with its statistics, in topological order; solve it in `job.plan` before asking for
    the next. All other entries of the plan must be solved.

    positions   patches per sample at most
    limit       largest D with a full Gram matrix
    samples     of the data at most, evenly spaced; if there are more, a note in the report says so

    Holds one layer's Gram matrix and, for each sample, the activations alive at that layer, or those of the float network at
    one shortly before, if they are smaller.
    """
    pending = {layer.name for layer in layers}
    if job.calibration.data is None:
        raise OnnxqError("rounding by what layers see needs sample inputs, and there are none; give data (--data PATH).")
    feeds, held = _select(job, job.calibration.data, samples)
    floats: dict[str, Array] = {}
    proto = job.graph.model(floats)
    nodes = list(proto.graph.node)
    place = {node.name: i for i, node in enumerate(nodes)}
    inputs = {name: [feed[name] for feed in feeds] for name in job.graph.inputs}
    exact = _Network(proto, floats, {name: list(values) for name, values in inputs.items()}, len(feeds))
    exact.sizes = _sizes(job.graph, feeds[0])
    writer = Writer(job.graph, job.plan, job.target)
    raise_opset(writer.model, NARROW_OPSET)  # a step of it is a model of its own, whatever it holds
    rounded = _Network(writer.model, writer.floats, inputs, len(feeds))
    start, written = 0, 0
    for layer in writer.layer_by_layer():
        if layer.name not in pending:
            writer.plan = job.plan
            continue
        end = place[layer.name] + 1
        new = writer.builder.nodes[written:]
        quantizers = {n.output[0] for n in new if n.op_type == "QuantizeLinear"}
        rounded.dequantizers |= {n.output[0]: n for n in new if n.op_type == "DequantizeLinear" and n.input[0] in quantizers}
        steps = (
            exact.step(nodes[start:end], (), _pending(nodes, end) | {layer.output}),
            rounded.step(new, writer.builder.constants, _sources(writer, nodes, end - 1, rounded.dequantizers)),
        )
        expected = exact.sizes.get(layer.output, 0) // 4  # float32
        sums = _Sums(job, writer, layer, rounded, positions, limit, held, expected)
        with runtimes.blas(1):  # the workers are threads with a product each
            for parts in map_threads(partial(_advance, steps, sums, exact), sums.parts(len(feeds)), job.workers):
                sums.add(parts)
        for step in steps:
            step.finish()
        runtimes.trim()
        start, written = end, len(writer.builder.nodes)
        del parts
        found = sums.result()
        del sums  # large matrices
        yield layer, found
        del found
        runtimes.trim()
        writer.plan = job.plan
        pending.discard(layer.name)
        if not pending:
            return


def _advance(steps: Sequence[_Step], sums: _Sums, exact: _Network, numbers: Sequence[int]) -> list[list[Array]]:
    """Take some samples through the steps; the products of a layer that follow."""
    columns = []
    for sample in numbers:
        for step in steps:
            step.run(sample)
        columns.append(sums.columns(sample, exact.live))
        for step in steps:
            step.leave(sample)
    return sums.products(numbers, columns)


class _Sums:
    """Running sums of one layer's patches and outputs: of all, and of those to judge by, which are those of the samples
    `held`, or a quarter of the positions of every sample if none is.

    expected   number of the layer's outputs for a sample; 0 if unknown
    """

    def __init__(
        self,
        job: Job,
        writer: Writer,
        layer: Layer,
        network: _Network,
        positions: int,
        limit: int,
        held: set[int],
        expected: int,
    ) -> None:
        self.layer, self.limit, self.live, self.held = layer, limit, network.live, held
        self.inputs = int(np.prod(layer.shape)) // layer.channels
        self.positions = min(positions, max(64, self.inputs))
        known = expected // layer.channels
        self.expected = min(self.positions, known) if known else self.positions  # of a sample
        key = Planned.of(job).source(layer.input)  # codes, which a layer in float may read, too
        self.spec = job.plan[key] if key else None
        self.offset = job.target.offset(self.spec) if self.spec is not None else 0  # of codes, as they are stored
        self.source = _source(writer, layer.name, layer.input, network.dequantizers)
        self.bias = job.graph.constant(layer.bias).reshape(layer.groups, -1, 1) if layer.bias is not None else None
        self.weight = layer.matrix(job.graph.constant(layer.weight)).astype(np.float32)
        self.sums: list[list[Array]] = [[], []]

    def parts(self, samples: int) -> list[list[int]]:
        """The samples in lists of about a thousand patches, or fewer long ones: few large products rather than many small
        ones. Those that are held out are apart."""
        step = max(1, min(1024, 2**22 // (self.inputs * self.layer.groups)) // self.expected)
        kinds = ([n for n in range(samples) if n not in self.held], sorted(self.held))
        return [numbers[first : first + step] for numbers in kinds for first in range(0, len(numbers), step)]

    def products(self, numbers: Sequence[int], columns: Sequence[tuple[Array, Array]]) -> list[list[Array]]:
        """Sums over the patches of some samples, those that are not judged by and those that are: x x^T, x,
        (y - W x) x^T, y, and their number; [] without patches.

        columns   of each sample
        """
        if self.held:
            kinds = [[], columns] if numbers[0] in self.held else [columns, []]
        else:
            cuts = [x.shape[2] - x.shape[2] // 4 for x, _ in columns]
            kinds = [
                [(x[:, :, :cut], y[:, :, :cut]) for (x, y), cut in zip(columns, cuts, strict=True)],
                [(x[:, :, cut:], y[:, :, cut:]) for (x, y), cut in zip(columns, cuts, strict=True)],
            ]
        return [self._products(kind) for kind in kinds]

    def _products(self, columns: Sequence[tuple[Array, Array]]) -> list[Array]:
        if not columns:
            return []
        x, y = (np.concatenate(part, axis=2) for part in zip(*columns, strict=True))
        count = x.shape[2]
        if not count:
            return []
        left = y - self.weight @ x
        weight = trust(left, y)
        mean, output = (one @ weight.swapaxes(1, 2) for one in (x, y))
        root = np.sqrt(weight)
        x *= root
        left *= root
        return [
            gram(split(x, self.limit)),
            split(mean, self.limit)[:, :, 0],
            left @ x.swapaxes(1, 2),
            output[:, :, 0],
            np.array(float(count)),
        ]

    def columns(self, sample: int, exact: Mapping[str, list[Array]]) -> tuple[Array, Array]:
        """Patches of the quantized input and the float outputs that belong to them, float32."""
        codes = self.live[self.source][sample]
        if self.spec is not None and codes.dtype.kind in "iu":
            zero = int(np.asarray(self.spec.zero_point)) + self.offset
            x = patches(self.layer, codes, self.positions, sample, zero).astype(np.float32)
            x = (x - np.float32(zero)) * np.float32(self.spec.scale)
        else:
            x = patches(self.layer, codes, self.positions, sample)
        y = output_columns(self.layer, exact[self.layer.output][sample], self.positions, sample)
        return x, y if self.bias is None else y - self.bias

    def add(self, parts: list[list[Array]]) -> None:
        """Add the sums over some samples, as `products` returns them."""
        for judged, products in enumerate(parts):
            for number in range(judged + 1) if products else ():
                if self.sums[number]:
                    for into, part in zip(self.sums[number], products, strict=True):
                        into += part
                else:
                    wide = precision(products[0].shape[1])
                    kinds = [np.float32] * 5 if number else [wide, np.float64, wide, np.float64, np.float64]
                    again = number < judged  # what follows needs them, too
                    pairs = zip(products, kinds, strict=True)
                    self.sums[number] = [part.astype(kind, copy=again) for part, kind in pairs]

    def result(self) -> LayerStatistics:
        """The statistics over all samples that were added."""
        whole, judged = (self._means(sums) for sums in self.sums)
        assert whole is not None
        return replace(whole, judged=judged if judged is not None and judged.count < whole.count else None)

    def _means(self, sums: list[Array]) -> LayerStatistics | None:
        if not sums:
            return None
        h, mean, left, output, count = sums
        for part in (h, mean, left, output):
            part /= max(float(count), 1.0)
        if not all(np.isfinite(part).all() for part in (mean, output)):
            raise OnnxqError(
                f"layer '{self.layer.name}' reads or writes values that are not finite (NaN or Inf) on the "
                "given data: the float model itself overflows there."
            )
        return LayerStatistics(h, mean, left, output, int(count))


def trust(left: Array, y: Array) -> Array:
    """How much each patch counts [g, 1, P], 1 on the average: m / (m + e), with e the squared error that the quantized input
    leaves in the outputs y, left = y - W x [g, O, P], and m its median, or 50 dB below the outputs if that is more.

    The errors of patches with clipped inputs are many times those of others, and weights fitted to them extrapolate: in a
    sentence encoder the few tokens with outlier channels made all others worse.

    Source: the weights of Cauchy's M-estimator.
    """
    error = np.einsum("gop,gop->gp", left, left)[:, None]
    power = np.einsum("gop,gop->g", y, y)[:, None, None] / y.shape[2]
    middle = np.maximum(np.median(error, axis=2, keepdims=True), 1e-5 * power)
    weight = np.divide(middle, middle + error, out=np.ones_like(error), where=middle > 0)
    return np.asarray(weight / weight.mean(axis=2, keepdims=True))


def _select(job: Job, data: Data, limit: int) -> tuple[list[dict[str, Array]], set[int]]:
    """At most this many samples, evenly spaced, and which of them are held out to judge by: none of a few."""
    apart = data.numbers(apart=True)
    everything = data.numbers()
    held = apart if len(apart) < len(everything) else []
    others = sorted(set(everything) - set(held))
    if len(everything) > limit:
        held = [held[i] for i in spread(len(held), limit // 4)] if limit >= 4 else []
        others = [others[i] for i in spread(len(others), limit - len(held))]
        job.note(
            f"layers were solved on {limit} of {len(everything)} samples, as many as round.samples allows: their "
            "activations are held"
        )
    used = sorted({*held, *others})
    wanted = set(used)
    feeds = [feed for n, feed in enumerate(itertools.islice(data, used[-1] + 1)) if n in wanted]
    return feeds, {at for at, n in enumerate(used) if n in held}


def reads(node: onnx.NodeProto) -> list[str]:
    """Names an operator reads, those of control-flow bodies included."""
    return [name for name in (*node.input, *outer_reads(node)) if name]


def _pending(nodes: list[onnx.NodeProto], start: int) -> set[str]:
    """What the operators from `start` on read."""
    return {name for node in nodes[start:] for name in reads(node)}


def _sources(
    writer: Writer, nodes: list[onnx.NodeProto], start: int, dequantizers: Mapping[str, onnx.NodeProto]
) -> set[str]:
    """What the quantized forms of the operators from `start` on read of the tensors written so far."""
    return {_source(writer, node.name, name, dequantizers) for node in nodes[start:] for name in reads(node)}


def _source(writer: Writer, node: str, name: str, dequantizers: Mapping[str, onnx.NodeProto]) -> str:
    """The tensor behind what an operator's quantized form reads as `name`: its codes, if it has any."""
    if name in writer.dequantized and writer.reads_codes(node, name):
        name = writer.dequantized[name]
    return str(dequantizers[name].input[0]) if name in dequantizers else name


def _needed(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The operators that contribute to the outputs, in order."""
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if outputs & set(node.output):
            kept.append(node)
            outputs = outputs | set(reads(node))
    return kept[::-1]


def _sizes(graph: Graph, feed: Mapping[str, Array]) -> dict[str, int]:
    """Bytes of the activations of a sample, without those of unknown type."""
    shapes = shapes_of(graph, feed)
    return {name: np.dtype(t.dtype).itemsize * math.prod(shapes[name]) for name in shapes if (t := graph.tensor(name)).dtype}


def _describe(name: str, kinds: Collection[tuple[Any, tuple[int, ...]]]) -> onnx.ValueInfoProto:
    """Type and shape of a live tensor, from those of all samples; dynamic if samples differ in shape."""
    dtype, first = next(iter(kinds))
    shape = list(first) if len({shape for _, shape in kinds}) == 1 else [None] * len(first)
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)
