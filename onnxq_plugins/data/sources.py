"""Sample inputs from any source, for calibration and comparison."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.data.images import open_images
from onnxq_plugins.data.inputs import Input, quoted
from onnxq_plugins.data.labels import check_labels, load_labels, reason
from onnxq_plugins.data.options import DataOptions
from onnxq_plugins.data.samples import Data, spread
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

Source = Any  # str | Path | ndarray | mapping of arrays | iterable of feeds | CalibrationDataReader


def open_data(
    source: Source, inputs: Sequence[Input], options: DataOptions | None = None, labels: str | Path | Array | None = None
) -> Data:
    """Open a source as Data.

    source   Data, returned unchanged; path of an .npz or .npy file (arrays named after the inputs, first axis = samples; a
             single array serves a single input), folder of images, ``package.module:callable`` that returns any of the
             others, array, mapping of arrays, iterable of feeds (mappings from input name to array with a batch axis), or an
             onnxruntime CalibrationDataReader. Iterators and readers without `rewind` are read into memory.

    labels   one for each sample of the source: an array, or a file as in `DataOptions`, which it overrides

    Raises OnnxqError if the source cannot be read or does not fit the inputs.
    """
    if isinstance(source, Data):
        return source
    options = options or DataOptions()
    labels = labels if isinstance(labels, np.ndarray) else load_labels(str(labels or options.labels))
    if isinstance(source, (str, Path)):
        path = Path(source)
        if isinstance(source, str) and not path.exists() and ":" in source:  # a Path, such as a recipe's, is never code
            return open_data(_call(source), inputs, options, labels)
        if not path.exists():
            raise OnnxqError(
                f"data '{source}' does not exist; give an .npz or .npy file, a folder of images or package.module:callable."
            )
        if path.is_dir():
            return open_images(path, inputs, options, labels)
        return _arrays(_load_numpy(path), inputs, options, labels, f"'{path}'")
    if isinstance(source, np.ndarray):
        return _arrays({"": source}, inputs, options, labels, "the data")
    if isinstance(source, Mapping):
        return _arrays(source, inputs, options, labels, "the data")
    if hasattr(source, "get_next"):
        return _feeds(_reader(source), inputs, options, labels)
    if isinstance(source, Iterable):
        return _feeds(source, inputs, options, labels)
    raise OnnxqError(
        f"data of type {type(source).__name__} is not supported; give a path, arrays, an iterable of "
        "feeds or a CalibrationDataReader."
    )


def _call(name: str) -> Source:
    module, _, attribute = name.partition(":")
    try:
        source: Source = getattr(importlib.import_module(module), attribute)()
        return source
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
            f"{where} has no array for the model's input {quoted(missing)}; it has "
            f"{quoted(arrays) or 'none'}. Name the arrays after the inputs."
        )
    used = {i.name: np.asarray(arrays[i.name]) for i in inputs}
    image_options = [
        name for name in ("resize", "crop", "mean", "std", "layout") if getattr(options, name) != getattr(DataOptions, name)
    ]
    counts = {name: len(a) if a.ndim else 0 for name, a in used.items()}
    if len(set(counts.values())) > 1:
        raise OnnxqError(f"{where}: the arrays differ in their number of samples (first axis): {counts}.")
    total = next(iter(counts.values()), 0)
    if not total:
        raise OnnxqError(f"{where} is empty; give at least one sample along the first axis.")
    numbers = spread(total, options.samples)
    labels = check_labels(labels, total, where)

    def samples() -> Iterator[Mapping[str, Array]]:
        for n in numbers:
            yield {i.name: used[i.name][n : n + 1] if used[i.name].ndim == len(i.shape) else used[i.name][n] for i in inputs}

    data = Data(inputs, samples, where, len(numbers), None if labels is None else labels[numbers])
    if image_options:
        listed = ", ".join(f"--{name}" for name in image_options)
        data.notes = (f"{listed} apply to folders of images only; {where} is used unchanged",)
    return data


def _reader(reader: Any) -> Iterable[Mapping[str, Array]]:
    """A CalibrationDataReader as a re-iterable."""
    if not hasattr(reader, "rewind"):
        return list(iter(reader.get_next, None))

    class Rewound:
        def __iter__(self) -> Iterator[Mapping[str, Array]]:
            reader.rewind()
            return iter(reader.get_next, None)

    return Rewound()


def _feeds(source: Iterable[Any], inputs: Sequence[Input], options: DataOptions, labels: Array | None) -> Data:
    feeds: Iterable[Any] = list(source) if iter(source) is source else source

    def samples() -> Iterator[Mapping[str, Array]]:
        singles = (sample for feed in feeds for sample in _unbatch(feed, inputs))
        return itertools.islice(singles, options.samples or None)

    return Data(inputs, samples, "the data", labels=labels if labels is None else labels[: options.samples or None])


def _unbatch(feed: Any, inputs: Sequence[Input]) -> Iterator[Any]:
    """Split a feed with a batch of several samples into single samples."""
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
