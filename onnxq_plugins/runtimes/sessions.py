"""Running models in onnxruntime: sessions, outputs, interleaved latency. CPU only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxq_plugins import files
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.parallel import map_threads
from onnxq_plugins.runtimes.custom_ops import add_custom_ops, unknown_operator
from onnxq_plugins.spec import Array

Feed = Mapping[str, Array]
_Model = onnx.ModelProto | bytes | str | Path


def quiet() -> None:
    """Keep onnxruntime from logging to standard error, in the whole process: its complaints are raised as errors."""
    ort.set_default_logger_severity(4)


class Session(ort.InferenceSession):  # type: ignore[misc]
    """A session whose runs fail with OnnxqError: shapes that do not match are found only there."""

    def run(self, *args: Any, **more: Any) -> list[Any]:
        try:
            outputs: list[Any] = super().run(*args, **more)
        except Exception as error:  # onnxruntime raises a dozen types
            raise _failed(error) from error
        return outputs

    def run_with_ort_values(self, *args: Any, **more: Any) -> list[Any]:
        try:
            outputs: list[Any] = super().run_with_ort_values(*args, **more)
        except Exception as error:
            raise _failed(error) from error
        return outputs


def _failed(error: Exception) -> OnnxqError:
    text = " ".join(str(error).split())[:300].rstrip(".")
    return OnnxqError(f"onnxruntime {ort.__version__} cannot run the model on this input ({text}).")


def session(
    model: _Model,
    *,
    threads: int = 1,
    optimize: bool = True,
    dump: str | Path | None = None,
    weights: Mapping[str, Array] | None = None,
    lean: bool = False,
    arena: bool = True,
    profile: str | Path | None = None,
    folder: Path | None = None,
    written: bool = False,
    ordered: bool = False,
) -> Session:
    """An onnxruntime session on the CPU.

    threads    intra-op threads
    optimize   False turns every graph optimization off: the model runs exactly as written
    dump       write the optimized model here (what the audit reads)
    weights    values for placeholders in the model (`Graph.model(weights)`), used in place, without a copy
    lean       do not plan memory in advance: needs less of it, runs a little slower
    arena      keep freed memory for the next run; without it every tensor is allocated on its own
    folder     of the model's external data, unless the model is a path; the data are mapped, not read, and not repacked
    written    round where the model says so: layers between Q/DQ pairs are float ones, which no machine saturates, and all
               other optimizations remain
    ordered    run the operators in the model's order; else onnxruntime computes all that others read first
    profile    time every kernel, at some microseconds each; `end_profiling` writes a file with this prefix

    Raises OnnxqError if onnxruntime refuses the model; so do its runs if they fail.
    """
    options = _options(threads, optimize, lean, arena, written)
    if ordered:
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if folder is not None:
        options.add_session_config_entry(_FOLDER, str(folder.resolve()))
        options.add_session_config_entry(_NO_PREPACKING, "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if dump is not None:
        options.optimized_model_filepath = str(dump)
        if folder is not None:
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    add_custom_ops(options)
    try:
        if weights:
            model = _add_weights(options, model, weights, lean)
        elif folder is None and isinstance(model, onnx.ModelProto) and files.size_of(model) > _IN_MEMORY:
            with tempfile.TemporaryDirectory() as scratch:
                return _created(files.save_model(model, Path(scratch) / "model.onnx", beside=True), options)
        return _created(model, options)
    except Exception as error:  # onnxruntime raises a dozen types
        if (unknown := unknown_operator(error)) is not None:
            raise unknown from error
        text = " ".join(str(error).split())
        raise OnnxqError(f"onnxruntime {ort.__version__} cannot load the model: {text[:300].rstrip('.')}.") from error


def _created(model: _Model, options: ort.SessionOptions) -> Session:
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    made = Session(str(source) if isinstance(source, Path) else source, options, providers=["CPUExecutionProvider"])
    if isinstance(source, bytes) and len(source) > _TRIMMED:
        del source
        trim()
    return made


def _options(threads: int, optimize: bool, lean: bool, arena: bool, written: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_mem_pattern = not lean
    options.enable_cpu_mem_arena = arena
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if written:
        options.add_session_config_entry(_AS_WRITTEN, "1")
    return options


# bytes of a model up to which onnxruntime reads a copy of it from memory, not mapped from a file, and packs its weights even
# where memory is what counts
_IN_MEMORY = 2**28
_TRIMMED = 2**24  # bytes of a model from which on what creating its session leaves behind is worth returning
_AS_WRITTEN = "session.disable_quant_qdq"
_FOLDER, _NO_PREPACKING = "session.model_external_initializers_file_folder_path", "session.disable_prepacking"


def _add_weights(options: ort.SessionOptions, model: _Model, weights: Mapping[str, Array], lean: bool) -> _Model:
    """Give a session the weights of a model; the model, which refers to those that are used from files."""
    size = sum(array.nbytes for array in weights.values())
    if size > min(files.LARGE, _IN_MEMORY if lean else files.LARGE):
        options.add_session_config_entry(_NO_PREPACKING, "1")  # packed copies would take as much memory again
    if size > files.LARGE:
        model, weights, root = _from_files(model, weights)
        if root is not None:
            options.add_session_config_entry(_FOLDER, str(root))
    if weights:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
    return model


def _from_files(model: _Model, weights: Mapping[str, Array]) -> tuple[_Model, dict[str, Array], Path | None]:
    """A model that refers to the files which weights are mapped from, the other weights, and the folder that file names are
    relative to: onnxruntime copies arrays that are passed to it, but maps files."""
    places = {name: place for name, array in weights.items() if (place := files.origin(array)) is not None}
    if not places or not isinstance(model, onnx.ModelProto):
        return model, dict(weights), None
    root = Path(os.path.commonpath([file.parent for file, _ in places.values()]))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # placeholders only
    for tensor in copy.graph.initializer:
        if tensor.name in places:
            file, first = places[tensor.name]
            del tensor.external_data[:]
            for key, value in (
                ("location", file.relative_to(root).as_posix()),
                ("offset", first),
                ("length", weights[tensor.name].nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
    return copy, {name: array for name, array in weights.items() if name not in places}, root


def blas(threads: int) -> contextlib.AbstractContextManager[object]:
    """A context in which numpy's matrix products use this many threads. Many small products can be many times slower on
    several threads than on one, where another process wants the same cores."""
    from threadpoolctl import ThreadpoolController

    limited: contextlib.AbstractContextManager[object] = ThreadpoolController().limit(limits=threads, user_api="blas")
    return limited


def trim() -> None:
    """Return freed memory to the system. glibc keeps what creating a session leaves behind, which may be more than the
    session itself; elsewhere there is nothing to do."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def run(runner: ort.InferenceSession, feed: Feed) -> list[Array]:
    """All outputs for one feed. Large ones stay where onnxruntime wrote them, as a copy costs more than some operators; for
    small ones the copy is cheaper, and strings have no other way."""
    if sum(x.nbytes for x in feed.values()) < 2**18 or any(x.dtype.kind == "O" for x in feed.values()):
        return list(runner.run(None, dict(feed)))
    values = {name: ort.OrtValue.ortvalue_from_numpy(np.asarray(x, order="C")) for name, x in feed.items()}
    return [value.numpy() for value in runner.run_with_ort_values(None, values)]


def per_feed(runner: ort.InferenceSession, feeds: Iterable[Feed], workers: int = 1) -> list[list[Any]]:
    """Every output of the model: its value for each feed. A value is an array, or a list for a sequence, a dict for a map, a
    list of dicts for a sequence of maps, None for an optional without a value. Nothing says that values of unlike feeds have
    the same shape.

    workers   feeds that run at the same time
    """
    rows = list(map_threads(lambda feed: runner.run(None, dict(feed)), feeds, workers))
    return [list(column) for column in zip(*rows, strict=True)]


def joined(values: Sequence[Any]) -> Any:
    """The values of one output as one array, concatenated along the first axis (scalars make an axis); as a list, one value
    per feed, where they are no arrays or shapes differ elsewhere."""
    arrays = [np.atleast_1d(value) if isinstance(value, np.ndarray | np.generic) else None for value in values]
    alike = {None if array is None else (array.dtype, array.shape[1:]) for array in arrays}
    return list(values) if len(alike) != 1 or None in alike else np.concatenate(arrays)  # type: ignore[arg-type]


def outputs(runner: ort.InferenceSession, feeds: Iterable[Feed]) -> list[Any]:
    """Every output of the model over the feeds, `joined`: one array each, or a list where that is impossible."""
    return [joined(values) for values in per_feed(runner, feeds)]


def is_random(runner: ort.InferenceSession, feed: Feed) -> bool:
    """True if a model gives other outputs for the same feed when it runs again. Onnxruntime on one thread repeats its sums
    in the same order, so that any difference comes from operators such as RandomNormalLike."""
    first, second = (pickle.dumps(runner.run(None, dict(feed))) for _ in range(2))
    return first != second


def wanted(runner: ort.InferenceSession, feed: Feed) -> Feed:
    """A feed in the types of a session's inputs: a user's own model may be in half precision."""
    types = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}
    inputs = (*runner.get_inputs(), *(i for i in runner.get_overridable_initializers() if i.name in feed))
    return {i.name: feed[i.name].astype(types.get(i.type, feed[i.name].dtype), copy=False) for i in inputs}


def latency(runners: Sequence[ort.InferenceSession], feed: Feed | Sequence[Feed], seconds: float = 1.0) -> list[float]:
    """Median milliseconds of each session, measured in turn (A B A B ...) so that a noisy machine affects all alike.

    feed   one for all, or one per session
    """
    durations: list[list[float]] = [[] for _ in runners]
    feeds = [feed] * len(runners) if isinstance(feed, Mapping) else list(feed)
    for runner, own in zip(runners, feeds, strict=True):
        runner.run(None, dict(own))
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(durations[0]) < 5:
        for runner, own, each in zip(runners, feeds, durations, strict=True):
            start = time.perf_counter()
            runner.run(None, dict(own))
            each.append(time.perf_counter() - start)
    return [float(np.median(each)) * 1e3 for each in durations]
