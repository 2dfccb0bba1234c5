"""Sample inputs for calibration and comparison: any source becomes Data."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.data.images import image_samples
from onnxq_plugins.data.inputs import Input, names
from onnxq_plugins.data.labels import load_labels, one_label_each, reason
from onnxq_plugins.data.options import DataOptions
from onnxq_plugins.data.samples import Data, spread
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

Source = Any  # str | Path | ndarray | mapping of arrays | iterable of feeds | CalibrationDataReader


def open_data(
    source: Source, inputs: Sequence[Input], options: DataOptions | None = None, labels: str | Path | Array | None = None
) -> Data:
    """Make Data of a source.

    source   Data, taken as it is; path of an .npz or .npy file (arrays named after the inputs, first axis = samples; a
             single array serves a single input), folder of images, ``package.module:callable`` that returns any of the
             others, array, mapping of arrays, iterable of feeds (mappings from input name to array with a batch axis), or an
             onnxruntime CalibrationDataReader. Iterators and readers without `rewind` are read into memory.

    labels   one a sample of the source: an array, or a file as in `DataOptions`, which it overrides

    Raises OnnxqError if the source cannot be read or does not fit the inputs.
    """
    if isinstance(source, Data):
        return source
    options = options or DataOptions()
    known = labels if isinstance(labels, np.ndarray) else load_labels(str(labels or options.labels))
    if isinstance(source, (str, Path)):
        path = Path(source)
        if isinstance(source, str) and not path.exists() and ":" in source:  # never a Path, such as a recipe's
            return open_data(_call(source), inputs, options, known)
        if not path.exists():
            raise OnnxqError(
                f"data '{source}' does not exist; give an .npz or .npy file, a folder of images or package.module:callable."
            )
        if path.is_dir():
            return image_samples(path, inputs, options, known)
        return _arrays(_load_numpy(path), inputs, options, known, f"'{path}'")
    if isinstance(source, np.ndarray):
        return _arrays({"": source}, inputs, options, known, "the data")
    if isinstance(source, Mapping):
        return _arrays(source, inputs, options, known, "the data")
    if hasattr(source, "get_next"):
        return _feeds(_reader(source), inputs, options, known)
    if isinstance(source, Iterable):
        return _feeds(source, inputs, options, known)
    raise OnnxqError(
        f"data of type {type(source).__name__} is not understood; give a path, arrays, an iterable of "
        "feeds or a CalibrationDataReader."
    )


def _call(name: str) -> Source:
    module, _, attribute = name.partition(":")
    try:
        made: Source = getattr(importlib.import_module(module), attribute)()
        return made
    except Exception as error:  # the user's own code: any error is theirs
        raise OnnxqError(f"data '{name}' failed: {type(error).__name__}: {' '.join(str(error).split())}.") from error


def _load_numpy(path: Path) -> dict[str, Array]:
    try:
        if path.suffix == ".npy":
            return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise OnnxqError(
            f"data '{path}' is not a readable .npz or .npy file ({reason(error)}); save arrays of numbers with numpy.savez."
        ) from error


def _arrays(
    arrays: Mapping[str, Array], inputs: Sequence[Input], options: DataOptions, labels: Array | None, where: str
) -> Data:
    if "labels" in arrays and "labels" not in {i.name for i in inputs}:
        labels = np.asarray(arrays["labels"]) if labels is None else labels
        arrays = {name: array for name, array in arrays.items() if name != "labels"}
    if len(arrays) == 1 and len(inputs) == 1:
        arrays = {inputs[0].name: next(iter(arrays.values()))}
    if missing := {i.name for i in inputs} - set(arrays):
        raise OnnxqError(
            f"{where} has no array for the model's input {names(missing)}; it has "
            f"{names(arrays) or 'none'}. Name the arrays after the inputs."
        )
    chosen = {i.name: np.asarray(arrays[i.name]) for i in inputs}
    images = [
        name for name in ("resize", "crop", "mean", "std", "layout") if getattr(options, name) != getattr(DataOptions, name)
    ]
    counts = {name: len(a) if a.ndim else 0 for name, a in chosen.items()}
    if len(set(counts.values())) > 1:
        raise OnnxqError(f"{where}: the arrays differ in their number of samples (first axis): {counts}.")
    total = next(iter(counts.values()), 0)
    if not total:
        raise OnnxqError(f"{where} is empty; give at least one sample along the first axis.")
    picked = spread(total, options.samples)
    labels = one_label_each(labels, total, where)

    def samples() -> Iterator[Mapping[str, Array]]:
        for n in picked:
            yield {
                i.name: chosen[i.name][n : n + 1] if chosen[i.name].ndim == len(i.shape) else chosen[i.name][n]
                for i in inputs
            }

    made = Data(inputs, samples, where, len(picked), None if labels is None else labels[picked])
    if images:
        named = ", ".join(f"--{name}" for name in images)
        made.notes = (f"{named} apply to folders of images only; {where} is used as it is",)
    return made


def _reader(reader: Any) -> Iterable[Mapping[str, Array]]:
    """A CalibrationDataReader as a re-iterable."""
    if not hasattr(reader, "rewind"):
        return list(iter(reader.get_next, None))

    class Again:
        def __iter__(self) -> Iterator[Mapping[str, Array]]:
            reader.rewind()
            return iter(reader.get_next, None)

    return Again()


def _feeds(source: Iterable[Any], inputs: Sequence[Input], options: DataOptions, labels: Array | None) -> Data:
    feeds: Iterable[Any] = list(source) if iter(source) is source else source

    def samples() -> Iterator[Mapping[str, Array]]:
        made = (sample for feed in feeds for sample in _unbatch(feed, inputs))
        return itertools.islice(made, options.samples or None)

    return Data(inputs, samples, "the data", labels=labels if labels is None else labels[: options.samples or None])


def _unbatch(feed: Any, inputs: Sequence[Input]) -> Iterator[Any]:
    """One feed with a batch of several samples as several feeds."""
    if isinstance(feed, np.ndarray) and len(inputs) == 1:
        feed = {inputs[0].name: feed}
    if not isinstance(feed, Mapping):
        yield feed
        return
    sizes = {len(a) for i in inputs if i.name in feed and (a := np.asarray(feed[i.name])).ndim == len(i.shape) > 0}
    size = sizes.pop() if len(sizes) == 1 else 1
    if size <= 1:
        yield feed
    else:
        for n in range(size):
            yield {name: np.asarray(a)[n : n + 1] for name, a in feed.items()}
