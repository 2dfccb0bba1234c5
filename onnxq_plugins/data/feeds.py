"""Samples from feeds: lists, iterators, readers, loaders of batches and folders of files with one feed each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.data.inputs import Input, fits, to_array
from onnxq_plugins.data.labels import check_labels, reason
from onnxq_plugins.data.options import DataOptions
from onnxq_plugins.data.samples import Data, chosen
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

_MEMORY = 2**30  # bytes of batches that are kept, so that their labels are


def reader_feeds(reader: Any) -> Iterable[Mapping[str, Array]]:
    """A CalibrationDataReader as a re-iterable."""
    if not hasattr(reader, "rewind"):
        return list(iter(reader.get_next, None))

    class Rewound:
        def __iter__(self) -> Iterator[Mapping[str, Array]]:
            reader.rewind()
            return iter(reader.get_next, None)

    return Rewound()


def open_feeds(source: Iterable[Any], inputs: Sequence[Input], options: DataOptions, labels: Array | None) -> Data:
    """Data from feeds, each used as it is. A feed is a mapping from input name to array, an array for a single input, or a
    batch of a loader: a sequence of arrays in the order of the inputs, the last of which may be labels, or a mapping and
    labels. Iterators are read into memory, and so are batches whose labels are used."""
    items: Iterable[Any] = list(source) if iter(source) is source else source
    notes: tuple[str, ...] = ()
    implied = labels is None
    if labels is None and _has_labels(next(iter(items), None), inputs):
        items, labels = _with_labels(items, inputs, options.samples)
        if labels is None:
            notes = ("what the batches hold besides inputs was ignored; give labels to measure accuracy",)

    def samples() -> Iterator[Mapping[str, Array]]:
        return itertools.islice((feed for item in items for feed, _ in _named(item, inputs)), options.samples or None)

    size = sum(1 for _ in samples()) if isinstance(items, (list, tuple)) else None
    data = Data(inputs, samples, "the data", size, labels)
    data.notes, data.implied = notes, implied
    if labels is not None and size is not None and labels.ndim and len(labels) > size:
        rows = [data.rows(feed) for feed in data]
        every = sum(1 for item in items for _ in _named(item, inputs))
        data.labels = labels[:size] if len(labels) == every else labels[: sum(rows)] if options.samples else labels
    return data


def open_folder(folder: Path, inputs: Sequence[Input], options: DataOptions, labels: Array | None) -> Data | None:
    """Data from a folder of .npz files, or of .npy files for a single input, each of which holds one feed; None if it has
    none."""
    files = sorted(folder.glob("*.npz")) or sorted(folder.glob("*.npy"))
    if not files:
        return None
    needed = [i for i in inputs if not i.optional]
    if files[0].suffix == ".npy" and len(needed) != 1:
        names = ", ".join(f"'{i.name}'" for i in needed)
        raise OnnxqError(f"folder '{folder}': .npy files fit a model with one input, this one has {names}; give .npz files.")
    numbers = chosen(len(files), options.samples, options.state)
    labels = check_labels(labels, len(files), f"folder '{folder}'")

    def samples() -> Iterator[Mapping[str, Array]]:
        for n in numbers:
            arrays = load_arrays(files[n])
            yield {needed[0].name: next(iter(arrays.values()))} if len(arrays) == len(needed) == 1 else arrays

    return Data(inputs, samples, f"'{folder}'", len(numbers), None if labels is None else labels[numbers])


def load_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz file by name; that of an .npy file as "". Raises OnnxqError if it cannot be read."""
    try:
        if path.suffix == ".npy":
            return {"": np.load(path, mmap_mode="r", allow_pickle=False)}
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib each raise their own
        raise OnnxqError(
            f"data '{path}' is not a readable .npz or .npy file ({reason(error)}); save arrays of numbers with numpy.savez."
        ) from error


# ---- batches --------------------------------------------------------------------------------------------------------------


def _is_batch(item: Any) -> bool:
    """True for a sequence of arrays; False for a mapping, an array, or the numbers of one."""
    return isinstance(item, (list, tuple)) and any(hasattr(part, "__array__") and np.ndim(part) for part in item)


def _is_labelled(item: Any) -> bool:
    """True for a mapping from input name to array with its labels."""
    pair = isinstance(item, (list, tuple)) and len(item) == 2
    return pair and isinstance(item[0], Mapping) and not isinstance(item[1], Mapping)


def _wanted(batch: Sequence[Any], inputs: Sequence[Input]) -> list[Input] | None:
    """The inputs that the arrays of a batch are for; None if their number fits neither with labels nor without."""
    needed = [i for i in inputs if not i.optional]
    if len(batch) == len(inputs):
        return list(inputs)
    return next((some for some in (needed, list(inputs)) if len(batch) in (len(some), len(some) + 1)), None)


def _has_labels(item: Any, inputs: Sequence[Input]) -> bool:
    return _is_labelled(item) or (
        _is_batch(item) and (wanted := _wanted(item, inputs)) is not None and len(item) == len(wanted) + 1
    )


def _named(item: Any, inputs: Sequence[Input]) -> Iterator[tuple[Any, Any]]:
    """Feeds of an item of the source, each with its labels or None."""
    bare = not isinstance(item, Mapping) and not _is_labelled(item) and not _is_batch(item)
    if bare and sum(not i.optional for i in inputs) == 1:
        item = [item] if hasattr(item, "__array__") else [to_array(item, "the data")] if np.iterable(item) else item
    if not isinstance(item, (list, tuple)):
        yield item, None
        return
    if _is_labelled(item):
        parts, wanted = item[0], [i for i in inputs if i.name in item[0]] or None
        if wanted is None:  # which whoever reads it says
            yield parts, None
            return
    else:
        wanted = _wanted(item, inputs)
        parts = {i.name: part for i, part in zip(wanted or (), item, strict=False)}
    if wanted is None:
        names = ", ".join(f"'{i.name}'" for i in inputs)
        raise OnnxqError(f"the data: a batch of {len(item)} arrays does not fit the model's inputs {names}; give mappings.")
    feed = {i.name: to_array(parts[i.name], f"the data: input '{i.name}'") for i in wanted}
    labels = to_array(item[-1], "the data: labels") if _is_labelled(item) or len(item) > len(wanted) else None
    rows = _rows(feed, wanted)
    if rows is None:
        yield feed, labels
        return
    for n in range(rows):
        own = labels[n : n + 1] if labels is not None and labels.ndim and len(labels) == rows else None
        yield {name: x[n : n + 1] if x.ndim and len(x) == rows else x for name, x in feed.items()}, own


def _rows(feed: Mapping[str, Array], inputs: Sequence[Input]) -> int | None:
    """Rows of a batch for a model that takes one at a time; None if it takes the batch as it is."""
    single = [
        i
        for i in inputs
        if i.shape and i.shape[0] == 1 and feed[i.name].ndim == len(i.shape) and fits(feed[i.name].shape[1:], i.shape[1:])
    ]
    counts = {len(feed[i.name]) for i in single} - {1}
    return counts.pop() if len(counts) == 1 else None


def _with_labels(items: Iterable[Any], inputs: Sequence[Input], samples: int) -> tuple[Iterable[Any], Array | None]:
    """Batches and the labels in them, both in memory since a loader may shuffle; the source itself and None where they are
    no class numbers, one per row, or need too much memory."""
    kept: list[Mapping[str, Array]] = []
    labels: list[Array] = []
    space = _MEMORY
    for feed, own in itertools.islice((pair for item in items for pair in _named(item, inputs)), samples or None):
        rows = {len(x) for x in feed.values() if x.ndim}
        values = np.atleast_1d(own) if own is not None else np.empty(0)
        space -= sum(x.nbytes for x in feed.values())
        classes = (
            values.dtype.kind in "iuf" and values.ndim == 1 and (values >= 0).all() and (values == np.round(values)).all()
        )
        if len(values) not in rows | {1} or not classes or space < 0:
            return items, None
        kept.append(feed)
        labels.append(values)
    return kept, np.concatenate(labels) if labels else None
