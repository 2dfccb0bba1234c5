"""Sample inputs from any source, for calibration and comparison."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.data.arrays import columns, open_arrays
from onnxq_plugins.data.feeds import load_arrays, open_feeds, open_folder, reader_feeds
from onnxq_plugins.data.images import has_images, open_images
from onnxq_plugins.data.inputs import Input
from onnxq_plugins.data.labels import load_labels
from onnxq_plugins.data.options import DataOptions
from onnxq_plugins.data.samples import Data
from onnxq_plugins.data.streams import with_states
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

Source = Any  # str | Path | array | mapping of arrays | iterable of feeds | CalibrationDataReader | DataFrame | nncf.Dataset


def open_data(
    source: Source, inputs: Sequence[Input], options: DataOptions | None = None, labels: str | Path | Array | None = None
) -> Data:
    """Open a source as Data.

    source   Data, returned unchanged; or feeds, or arrays with the samples in front.

             Feeds are used exactly as they are, as onnxruntime's `run` takes them: an iterable of mappings from input name
             to array (bare arrays for a single input), an onnxruntime CalibrationDataReader, an nncf.Dataset, a folder of
             .npz files with one feed each. Batches of a loader, [x] or (x, y), are feeds, too: y are labels where they are
             class numbers, and a model that takes one row at a time gets each row. Iterators and readers without `rewind`
             are read into memory.

             Arrays have the samples along the first axis: path of an .npz or .npy file, mapping of arrays, single array (a
             single array serves a single input), a DataFrame with columns named after the inputs. An array has one axis
             more than its input, or as many where the input's first axis is open or 1. See `open_arrays`.

             Arrays may be anything with ``__array__``, such as tensors of PyTorch. Also: a folder of images, and
             ``package.module:callable`` that returns any of the others.

    labels   one for each sample of the source, or each row of a feed: an array, or a file as in `DataOptions`, which it
             overrides

    With `options.state`, samples are steps of streams that may leave states out: `runtimes.rolled` adds them.

    Raises OnnxqError if the source cannot be read or does not fit the inputs.
    """
    if isinstance(source, Data):
        return source
    options = options or DataOptions()
    data = _open(source, with_states(inputs, options.state) if options.state else inputs, options, labels)
    data.state = options.state
    return data


def _open(source: Source, inputs: Sequence[Input], options: DataOptions, labels: str | Path | Array | None) -> Data:
    labels = labels if isinstance(labels, np.ndarray) else load_labels(str(labels or options.labels))
    if isinstance(source, (str, Path)):
        return _path(source, inputs, options, labels)
    if hasattr(source, "columns") and hasattr(source, "to_numpy"):
        return open_arrays(columns(source, inputs), inputs, options, labels, "the table")
    if isinstance(source, Mapping):
        return open_arrays(source, inputs, options, labels, "the data")
    if hasattr(source, "__array__"):
        return open_arrays({"": source}, inputs, options, labels, "the data")
    if hasattr(source, "get_next"):
        return open_feeds(reader_feeds(source), inputs, options, labels)
    if hasattr(source, "get_inference_data"):  # of NNCF
        return open_feeds(source.get_inference_data(), inputs, options, labels)
    if isinstance(source, Iterable):
        return open_feeds(source, inputs, options, labels)
    raise OnnxqError(
        f"data of type {type(source).__name__} is not supported; give a path, arrays, an iterable of "
        "feeds or a CalibrationDataReader."
    )


def _path(source: str | Path, inputs: Sequence[Input], options: DataOptions, labels: Array | None) -> Data:
    path = Path(source)
    if isinstance(source, str) and not path.exists() and ":" in source:  # a Path, such as a recipe's, is never code
        return _open(_call(source), inputs, options, labels)
    if not path.exists():
        raise OnnxqError(
            f"data '{source}' does not exist; give an .npz or .npy file, a folder of images or package.module:callable."
        )
    if not path.is_dir():
        return open_arrays(load_arrays(path), inputs, options, labels, f"'{path}'")
    feeds = None if has_images(path) else open_folder(path, inputs, options, labels)
    return open_images(path, inputs, options, labels) if feeds is None else feeds


def _call(name: str) -> Source:
    module, _, attribute = name.partition(":")
    try:
        source: Source = getattr(importlib.import_module(module), attribute)()
        return source
    except Exception as error:  # the user's own code: any error is theirs
        raise OnnxqError(f"data '{name}' failed: {type(error).__name__}: {' '.join(str(error).split())}.") from error
