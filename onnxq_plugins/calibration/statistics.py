"""Statistics of activations, computed on demand in as few runs over the data as possible.

Ranges and moments are reduced inside the graph; histograms and Gram matrices fetch activations, one sample at a time.
Nothing holds more than a few samples' activations (batch 1 is fastest and leanest). Every statistic is a
fold over samples with minimum, maximum or sum, taken in sample order, so results do not depend on the number of
workers, and an interrupted fold resumes from its last checkpoint in the cache.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
from onnx import helper

from onnxq_plugins import runtimes
from onnxq_plugins.calibration.reductions import add_reduction, add_slice, alike, beside_makers, merge_of
from onnxq_plugins.calibration.values import Gram, Histogram, InputRounding, Moments, NotFinite
from onnxq_plugins.data import Data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import load_arrays, save_arrays
from onnxq_plugins.graph import Graph, Layer, channel_axis
from onnxq_plugins.graph.bodies import prune
from onnxq_plugins.graph.patches import gram_shape, patches, split
from onnxq_plugins.parallel import Track, map_threads, silent
from onnxq_plugins.spec import Array, QuantSpec, fake, solve_minmax

Reader = Callable[[list[Array], int], "State"]  # (outputs of one sample, its number) -> state
Run = tuple[onnx.ModelProto, dict[str, Array], Reader]  # model, its large weights, how its outputs become a state
State = dict[str, Array]  # "tensor|field" -> array; the field's first letters say how two states merge
_SUMMARY = {"low": "ReduceMin", "high": "ReduceMax", "sum": "ReduceSum", "sum2": "ReduceSumSquare"}
_SHARED = 12  # statistics that the samples keep for other runs, of one graph each
_WATCHED = 8  # tensors at the start of a network, in which a sample unlike all others shows
T = TypeVar("T")


class Calibration:
    """Statistics of the current float graph over the data.

    graph     the graph passes are rewriting: statistics always describe its present state
    data      the samples, or None if the user gave none: statistics then raise OnnxqError
    cache     folder for results, keyed by the digests of model and data; shared by runs and processes
    workers   samples computed at the same time, one thread each
    """

    checkpoint = 32  # samples between two checkpoints of a running fold

    def __init__(
        self, graph: Graph, data: Data | None, *, cache: Path | None = None, workers: int = 1, track: Track = silent
    ) -> None:
        self.graph, self.data, self.cache, self.workers, self.track = graph, data, cache, workers, track
        self._known: dict[tuple[str, str], State] = {}  # (graph digest, statistic) -> state

    def of(self, graph: Graph) -> Calibration:
        """Statistics of another graph over the same data."""
        return Calibration(graph, self.data, cache=self.cache, workers=self.workers, track=self.track)

    @property
    def ready(self) -> bool:
        """True if there are samples, so that statistics can be computed."""
        return self.data is not None

    def carry(self, before: str) -> None:
        """Keep what is known, where the graph was rewritten so that the tensors that kept their names kept their values.

        before   `Graph.digest` of the graph as it was
        """
        after = self.graph.digest()
        for (digest, statistic), state in list(self._known.items()):
            if digest == before:
                kept = {key: values for key, values in state.items() if key.rpartition("|")[0] in self.graph}
                self._known[after, statistic] = kept

    def ranges(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Exact (minimum, maximum) of each tensor."""
        return self._extremes(names)

    def outlier(self, names: Sequence[str]) -> tuple[str, int, float] | None:
        """The tensor, of the first few, that one sample drives furthest beyond all others: its name, the number of the
        sample, and the largest magnitude there relative to that of any other sample; None with less than two samples."""
        state = self._summary(names)
        peaks = {n: state[f"{n}|peak"] for n in names if len(state.get(f"{n}|peak", ())) > 1}
        ratios = {n: float(p[0, 0] / max(p[1, 0], 1e-30)) for n, p in peaks.items() if p[0, 0] > 0}
        if not ratios:
            return None
        name = max(ratios, key=lambda n: ratios[n])
        return name, int(peaks[name][0, 1]), ratios[name]

    def channel_ranges(self, names: Sequence[str]) -> dict[str, tuple[Array, Array]]:
        """Exact (minimum [C], maximum [C]) per channel of each tensor."""
        state = self._reduced("summary", names, _SUMMARY)
        return {n: (state[f"{n}|low"], state[f"{n}|high"]) for n in names}

    def means(self, names: Sequence[str]) -> dict[str, Array]:
        """Mean per channel [C] of each tensor."""
        for name in names:
            _other_axes(self.graph, name, "means")
        state = self._summary(names)
        return {n: state[f"{n}|sum"] / state[f"{n}|sum_positions"] for n in names}

    def positions(self, names: Sequence[str]) -> dict[str, int]:
        """Number of values per channel of each tensor, over all samples."""
        state = self._summary(names)
        return {n: int(state[f"{n}|sum_positions"]) for n in names}

    def moments(self, names: Sequence[str]) -> dict[str, Moments]:
        """Mean and mean square per channel of each tensor."""
        for name in names:
            _other_axes(self.graph, name, "moments")
        state = self._summary(names)
        return {n: Moments(*(state[f"{n}|{key}"] / state[f"{n}|sum_positions"] for key in ("sum", "sum2"))) for n in names}

    def histograms(self, names: Sequence[str], bins: int = 2048) -> dict[str, Histogram]:
        """Histogram of each tensor between its extremes."""
        ranges = self._extremes(names)

        def reduce(name: str, x: Array, _: int) -> State:
            low, high = ranges[name]
            flat = x.reshape(-1)[:: _stride(x.size)]
            width = (high - low) / bins or 1.0
            at = ((flat - np.float32(low)) * np.float32(1 / width)).astype(np.int32)
            np.minimum(np.maximum(at, 0, out=at), bins - 1, out=at)
            return {f"{name}|sum": np.bincount(at, minlength=bins).astype(np.float64)}

        state = self._fetched(f"histograms-{bins}", names, reduce, thin=True)
        return {n: Histogram(state[f"{n}|sum"], *ranges[n]) for n in names}

    def grams(self, layers: Sequence[Layer], positions: int = 256, limit: int = 4608) -> dict[str, Gram]:
        """Gram matrix of the inputs of each layer, by layer name.

        positions   patches per sample at most
        limit       largest D with a full matrix, see `patches.split`

        All are in memory at once (8 * groups * D^2 bytes each): pass few layers at a time where D is large. They are
        stored in the cache folder only.
        """
        by_name = {layer.name: layer for layer in layers}

        def reduce(name: str, x: Array, sample: int) -> State:
            p = split(patches(by_name[name], x, positions, sample), limit)
            return {
                f"{name}|gram": p,
                f"{name}|sum_x": p.sum(axis=2, dtype=np.float64),
                f"{name}|sum_n": np.array(float(p.shape[2])),
            }

        state = self._fetched(f"grams-{positions}-{limit}", list(by_name), reduce, {n: y.input for n, y in by_name.items()})
        self._known = {key: known for key, known in self._known.items() if not key[1].startswith("grams")}
        return {
            n: Gram(
                state[f"{n}|gram"] / state[f"{n}|sum_n"], state[f"{n}|sum_x"] / state[f"{n}|sum_n"], int(state[f"{n}|sum_n"])
            )
            for n in by_name
        }

    def input_rounding(self, layers: Sequence[Layer], block: int, rows: int = 256) -> dict[str, InputRounding]:
        """What MatMul or Gemm layers would lose if each row of their input were rounded to int8, by the largest of every
        `block` values, by layer name.

        rows   over all samples, roughly
        """
        by_name = {layer.name: layer for layer in layers}
        positions = -(-rows // ((self.data.size if self.data is not None else None) or 32))

        def reduce(name: str, x: Array, sample: int) -> State:
            layer = by_name[name]
            own = patches(layer, x, positions, sample)[0].T.astype(np.float32)
            spec = solve_minmax(own, QuantSpec(8, block=(1, block)))
            matrix = layer.matrix(self.graph.constant(layer.weight))[0].T
            signal, noise = np.split(np.concatenate([own, own - fake(own, spec)]) @ matrix, 2)  # one product
            values = {"power": own, "signal": signal, "noise": noise}
            sums = {field: np.square(v, dtype=np.float64).sum(axis=0) for field, v in values.items()}
            return {f"{name}|sum_{field}": v if field == "power" else v.sum() for field, v in sums.items()}

        tensors = {n: y.input for n, y in by_name.items()}
        state = self._fetched(f"input-rounding-{block}-{positions}", list(by_name), reduce, tensors)
        return {
            n: InputRounding(state[f"{n}|sum_power"], float(state[f"{n}|sum_signal"]), float(state[f"{n}|sum_noise"]))
            for n in by_name
        }

    def moved(self, before: str, changes: Mapping[str, tuple[int, Array | float, Array | float]]) -> None:
        """Keep ranges, means and moments that are known, after a rewrite that changed no activation but these.

        before    `digest` of the graph that they are known for
        changes   tensor -> (axis of the channels, factor > 0, offset) of x' = factor * x - offset, [channels] or numbers
        """
        known, after = self._known.get((before, "summary"), {}), State()
        for key, value in known.items():
            name, _, field = key.rpartition("|")
            axis, factor, offset = changes.get(name, (None, 1.0, 0.0))
            if axis is not None and axis != channel_axis(self.graph, name):
                continue
            if axis is not None and field in _SUMMARY:
                count, once = known[f"{name}|sum_positions"], known[f"{name}|sum"] * factor
                if field in ("low", "high"):
                    value = value * factor - offset
                elif field == "sum":
                    value = once - offset * count
                else:
                    value = value * factor**2 - 2 * offset * once + offset**2 * count
            after[key] = value
        self._known[self.graph.digest(), "summary"] = after

    def _extremes(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """`ranges` of the samples, also where a subclass knows other ranges: histograms count samples."""
        state = self._summary(names)
        return {n: (float(state[f"{n}|low"].min()), float(state[f"{n}|high"].max())) for n in names}

    def _summary(self, names: Sequence[str]) -> State:
        """Ranges, means and squares per channel together: the reductions cost a fraction of the run, and the means of layer
        inputs are mostly needed right after the ranges of activations."""
        inputs = [y.input for y in self.graph.layers] if len(names) > 1 else []
        return self._reduced("summary", names, _SUMMARY, inputs)

    # ---- the fold -------------------------------------------------------------------------------------------------------

    def _reduced(self, statistic: str, names: Sequence[str], fields: Mapping[str, str], others: Sequence[str] = ()) -> State:
        """Statistics that onnxruntime reduces inside the graph: one small output per (tensor, field), and positions.

        fields   label -> the operator that reduces a tensor to one value per channel (to one in all if its rank is unknown)
        others   tensors whose statistics are computed along with those of others, which may be NaN or infinite
        """

        def outputs(missing: Sequence[str]) -> Run:
            weights: dict[str, Array] = {}
            model = self.graph.model(weights)
            own = len(model.graph.node)
            del model.graph.output[:]
            for name in missing:
                shape = self.graph.shape(name)
                for label, op in fields.items():
                    axes = None if shape is None else _other_axes(self.graph, name, statistic)
                    add_reduction(model, op, name, f"{name}|{label}", axes, self.graph.opset)
                model.graph.node.append(helper.make_node("Size", [name], [f"{name}|size"]))
                model.graph.output.append(helper.make_tensor_value_info(f"{name}|size", onnx.TensorProto.INT64, []))

            watched = set(missing[:_WATCHED])

            def read(values: list[Array], sample: int) -> State:
                state: State = {}
                at = iter(values)
                for name in missing:
                    for label in fields:
                        state[f"{name}|{label}"] = np.asarray(next(at), np.float64)
                    positions = int(next(at)) / max(state[f"{name}|sum"].size, 1)
                    state[f"{name}|sum_positions"] = np.array(positions)
                    if "low" in fields and name in watched:
                        peak = max(-float(state[f"{name}|low"].min()), float(state[f"{name}|high"].max()))
                        state[f"{name}|peak"] = np.array([[peak, sample]])
                return state

            beside_makers(model.graph, own)
            return model, weights, read

        state = self._fold(statistic, names, outputs, others)
        finite = sorted(set(fields) - {"sum2"})  # a square may overflow though the value does not
        _check_finite(name for name in names for label in finite if not _finite(state[f"{name}|{label}"]))
        return state

    def _fetched(
        self,
        statistic: str,
        names: Sequence[str],
        reduce: Callable[[str, Array, int], State],
        tensors: dict[str, str] | None = None,
        thin: bool = False,
    ) -> State:
        """Statistics that need the activations themselves.

        tensors   the tensor of each name; None: the name itself
        thin      the graph takes the subsample, so that no whole activation is copied
        """
        tensor_of = tensors or {n: n for n in names}

        def outputs(missing: Sequence[str]) -> Run:
            weights: dict[str, Array] = {}
            model = self.graph.model(weights)
            own = len(model.graph.node)
            fetched = list(dict.fromkeys(tensor_of[n] for n in missing))
            inputs = set(self.graph.inputs)
            del model.graph.output[:]
            for name in fetched:
                source = name
                shape = self.graph.shape(name) or ()
                step = _stride(int(np.prod([n for n in shape if isinstance(n, int)]))) if thin else 1
                if step > 1 and self.graph.opset >= 10:  # dynamic axes count as 1; `reduce` thins the rest
                    source = f"{name}|thin"
                    add_slice(model, name, source, step)
                elif name in inputs:  # a model input cannot be an output at the same time
                    source = f"{name}|copy"
                    model.graph.node.append(helper.make_node("Identity", [name], [source]))
                model.graph.output.append(helper.make_empty_tensor_value_info(source))

            def read(values: list[Array], sample: int) -> State:
                by_tensor = dict(zip(fetched, values, strict=True))
                _check_finite(name for name, v in by_tensor.items() if v.dtype.kind == "f" and not _finite(v))
                return {k: v for n in missing for k, v in reduce(n, by_tensor[tensor_of[n]], sample).items()}

            beside_makers(model.graph, own)
            return model, weights, read

        return self._fold(statistic, names, outputs)

    def _fold(
        self, statistic: str, names: Sequence[str], outputs: Callable[[Sequence[str]], Run], others: Sequence[str] = ()
    ) -> State:
        """The state of a statistic with all `names`, and with `others` where there is a run."""
        if not names:
            return {}
        if self.data is None:
            raise OnnxqError(
                "calibration needs sample inputs, and there are none; give data (--data PATH), or use recipe "
                "int8-data-free, which needs none."
            )
        digest = self.graph.digest()
        self._known = {key: state for key, state in self._known.items() if key[0] == digest}
        known = self._known.setdefault((digest, statistic), {})
        file = self.cache / f"{digest}-{self.data.digest()}-{statistic}.npz" if self.cache else None
        if file is not None:
            known.update(load_arrays(file))
        shared = self._shared(digest, statistic)
        missing = _missing(names, known)
        if missing:
            known.update({key: values for key, values in shared.items() if key not in known})
            missing = _missing(names, known)
        if missing:
            missing = _missing([*names, *others], known)
            state = self._run(statistic, missing, outputs(missing), file)
            known.update(state)
            shared.update(state)
            if file is not None:
                save_arrays(file, {**load_arrays(file), **state})
        return known

    def _shared(self, digest: str, statistic: str) -> State:
        """What earlier runs on the same samples computed: recipes that are tried one after the other need much the same.
        Gram matrices are too large to be kept."""
        if self.data is None or statistic.startswith("grams"):
            return {}
        shared: State = self.data.known.pop((digest, statistic), {})
        self.data.known[digest, statistic] = shared  # the last that was asked for is the last to go
        while len(self.data.known) > _SHARED:
            del self.data.known[next(iter(self.data.known))]
        return shared

    def _run(self, statistic: str, missing: Sequence[str], run: Run, file: Path | None) -> State:
        assert self.data is not None
        digest = hashlib.blake2b("\n".join(missing).encode(), digest_size=8).hexdigest()
        checkpoint = file.with_name(f"{file.stem}-{digest}.part.npz") if file else None
        state = load_arrays(checkpoint) if checkpoint else {}
        start = int(state.pop("next", np.array(0)))
        model, weights, read = run
        prune(model)
        names = {t.name for t in model.graph.initializer}
        runtimes.trim()
        read_weights = {name: w for name, w in weights.items() if name in names}
        session = runtimes.session(model, lean=True, ordered=True, weights=read_weights)
        runtimes.trim()

        def state_of(numbered: tuple[int, dict[str, Array]]) -> State:
            number, feed = numbered
            with self.graph.mapped.reading():
                try:
                    outputs = session.run(None, feed)
                except OnnxqError as error:
                    raise self._explained(error, feed, number) from error
                return read(outputs, number)

        total = None if self.data.size is None else self.data.size - start
        states = map_threads(state_of, itertools.islice(enumerate(self.data), start, None), self.workers)
        with runtimes.blas(1):
            for n, sample in enumerate(self.track(states, f"calibrating: {statistic}", total), start=start + 1):
                for key, value in sample.items():
                    field = key.rpartition("|")[2]
                    if key not in state:
                        state[key] = np.zeros(gram_shape(value)) if field == "gram" else value
                        if field != "gram":
                            continue
                    known = state[key]
                    if known.shape != value.shape:
                        known, value = alike(field, known, value)
                    state[key] = merge_of(field)(known, value)
                if checkpoint is not None and n % self.checkpoint == 0:
                    save_arrays(checkpoint, {**state, "next": np.array(n)})
        if checkpoint is not None and checkpoint.is_file():
            checkpoint.unlink(missing_ok=True)  # another process may have done the same fold
        return state

    def _explained(self, error: OnnxqError, feed: Mapping[str, Array], number: int) -> OnnxqError:
        """Why a run failed: statistics are more operators than the float model has, so that is run, too."""
        assert self.data is not None
        weights: dict[str, Array] = {}
        model = self.graph.model(weights)
        try:
            runtimes.session(model, weights=weights).run(None, dict(feed))
        except OnnxqError as own:
            text = str(own).rstrip(".")
            return OnnxqError(f"{self.data.where}, sample {number}: {text}; check that the float model runs on it.")
        return error


def _missing(names: Iterable[str], known: State) -> list[str]:
    """Those of which nothing is known."""
    available = {key.partition("|")[0] for key in known}
    return [n for n in dict.fromkeys(names) if n not in available]


def _other_axes(graph: Graph, name: str, statistic: str) -> tuple[int, ...]:
    shape = graph.shape(name)
    if shape is None:
        raise OnnxqError(f"{statistic}: the rank of tensor '{name}' is unknown; run onnx.shape_inference on the model.")
    keep = channel_axis(graph, name)
    return tuple(a for a in range(len(shape)) if a != keep)


def _stride(size: int, limit: int = 16384) -> int:
    """Step of a subsample of at most `limit` values; odd, so that it is not in step with channels or rows."""
    return 1 if size <= limit else -(-size // limit) | 1


def _check_finite(names: Iterable[str]) -> None:
    """Raise NotFinite if there are names."""
    if names := sorted(set(names)):
        raise NotFinite(names)


def _finite(values: Array) -> bool:
    return bool(np.isfinite(values).all())
