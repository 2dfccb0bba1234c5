"""Sample inputs for calibration and comparison: any source becomes a re-iterable of checked one-sample feeds."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph
from onnxq_plugins.spec import Array

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
_FEW = 8  # samples below which their number is remarked
Source = Any  # str | Path | ndarray | mapping of arrays | iterable of feeds | CalibrationDataReader


@dataclass(frozen=True)
class Input:
    """What a model wants under one input name: dtype and shape (None for dynamic axes)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    @property
    def batch(self) -> int | None:
        """Size of the first axis; None if dynamic, 1 if there is no axis."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class DataOptions:
    """How files become samples; the ``[data]`` table of a recipe and the options of the command line.

    path       an .npz or .npy file or a folder of images
    samples    use that many, spread evenly over the source; 0 for all
    resize     images: shorter side in pixels after resizing, 0 for none
    crop       images: side of the square cut from the middle, 0 for none
    mean, std  images: of RGB / 255, one value or three
    layout     images: ``nchw`` or ``nhwc``; "" reads it off the model's input
    labels     an .npy file, or a text file of numbers: one label a sample of the source, in its order. An .npz file may hold
               them itself, under the name ``labels``
    """

    path: str = ""
    samples: int = 0
    resize: int = 0
    crop: int = 0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = ""
    labels: str = ""

    def __post_init__(self) -> None:
        for name in ("samples", "resize", "crop"):
            if getattr(self, name) < 0:
                raise OnnxqError(f"{name} = {getattr(self, name)} must not be negative")


def graph_inputs(graph: Graph) -> list[Input]:
    """The inputs of a Graph."""
    return [
        Input(
            name,
            np.dtype(graph.tensor(name).dtype or np.float32),
            tuple(n if isinstance(n, int) and n >= 0 else None for n in graph.shape(name) or ()),
        )
        for name in graph.inputs
    ]


def model_inputs(model: onnx.ModelProto) -> list[Input]:
    """The inputs of a model, initializers listed among them left out."""
    constants = {t.name for t in model.graph.initializer}
    found = []
    for value in model.graph.input:
        if value.name not in constants:
            kind = value.type.tensor_type
            shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in kind.shape.dim)
            found.append(Input(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape))
    return found


class Data:
    """Samples for a model: iterate as often as you like, each item one checked feed (batch 1, or the model's own
    batch size where that is fixed).

    labels   what is known of each sample, along the first axis, or None

    Raises OnnxqError while iterating when a sample has NaN or Inf, a wrong name, shape or dtype, or there is none.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        samples: Callable[[], Iterator[Mapping[str, Array]]],
        where: str = "the data",
        size: int | None = None,
        labels: Array | None = None,
    ) -> None:
        self.inputs, self._samples, self.where, self.size, self.labels = list(inputs), samples, where, size, labels
        self.notes: tuple[str, ...] = ()  # what the user may want to know about how the source was read
        self._digest = ""

    def __iter__(self) -> Iterator[dict[str, Array]]:
        fixed = self._fixed
        one = (self._checked(feed, number) for number, feed in enumerate(self._samples()))
        empty = True
        for feed in one if fixed is None else self._batches(one, fixed):
            empty = False
            yield feed
        if empty:
            raise OnnxqError(f"{self.where} holds no sample; give at least one.")

    def remarks(self) -> list[str]:
        """What the user may want to know about the samples, seen from the first eight. Raises OnnxqError as iterating
        does."""
        first = [self._checked(feed, n) for n, feed in enumerate(itertools.islice(self._samples(), _FEW))]
        found = list(self.notes)
        if 0 < len(first) < _FEW:
            found.append(
                f"{self.where} holds {len(first)} sample{'s' * (len(first) > 1)} only, which all ranges and codes "
                "will rest on; give 32 or more"
            )
        alike = len(first) > 1 and all(np.array_equal(first[0][name], x) for feed in first for name, x in feed.items())
        flat = all((x == x.flat[0]).all() for feed in first for x in feed.values() if x.size)
        large = any(x.size > 1 for feed in first for x in feed.values())
        if alike or (flat and large):
            found.append(
                f"the first samples of {self.where} are "
                + ("all equal" if alike else "one value everywhere")
                + "; calibrate on inputs as the model will see them"
            )
        return found

    def spread(self, count: int) -> list[dict[str, Array]]:
        """So many feeds spread evenly, or all where there are fewer; no more are held."""
        chosen = set(_spread(self._feeds(), count))
        return [feed for n, feed in enumerate(self) if n in chosen]

    def spread_labels(self, count: int) -> list[Array] | None:
        """The labels of the feeds that `spread` gives, one array [batch, ...] each; None if there are none. Raises
        OnnxqError if there are more or fewer labels than samples."""
        if self.labels is None:
            return None
        size = self._fixed or 1
        samples = self.size or sum(1 for _ in self._samples())
        _one_each(self.labels, samples, self.where)
        at = [np.arange(first, min(first + size, samples)) for first in range(0, samples, size)]
        return [self.labels[np.resize(at[n], size)] for n in _spread(self._feeds(), count)]

    @property
    def _fixed(self) -> int | None:
        """The batch size that the model insists on, if that is not 1."""
        return next((i.batch for i in self.inputs if i.batch not in (None, 1)), None)

    def _feeds(self) -> int:
        """How many feeds there are."""
        samples = self.size or sum(1 for _ in self._samples())
        return -(-samples // (self._fixed or 1))

    def _batches(self, one: Iterator[dict[str, Array]], size: int) -> Iterator[dict[str, Array]]:
        """Groups of `size` samples; the last group is filled up with its own first samples."""
        while chunk := list(itertools.islice(one, size)):
            full = [chunk[i % len(chunk)] for i in range(size)]
            yield {
                i.name: np.concatenate([f[i.name] for f in full]) if i.batch == size else full[0][i.name]
                for i in self.inputs
            }

    def digest(self) -> str:
        """A fingerprint of all samples; reads them once."""
        if not self._digest:
            seen = hashlib.blake2b(digest_size=16)
            for feed in self:
                for name in sorted(feed):
                    seen.update(f"{name}{feed[name].shape}{feed[name].dtype}".encode())
                    seen.update(np.ascontiguousarray(feed[name]).tobytes())
            self._digest = seen.hexdigest()
        return self._digest

    def _checked(self, feed: Mapping[str, Array], number: int) -> dict[str, Array]:
        wanted = {i.name for i in self.inputs}
        if not isinstance(feed, Mapping):
            raise OnnxqError(
                f"{self.where}, sample {number}: expected a mapping from input name to array, got {type(feed).__name__}."
            )
        if missing := wanted - set(feed):
            unknown = sorted(set(feed) - wanted)
            raise OnnxqError(
                f"{self.where}, sample {number}: no array for the model's input {_names(missing)}"
                + (f" (it has {_names(unknown)})" if unknown else "")
                + "; name the arrays after the inputs."
            )
        return {i.name: _fit(np.asarray(feed[i.name]), i, f"{self.where}, sample {number}") for i in self.inputs}


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
    known = labels if isinstance(labels, np.ndarray) else _load_labels(str(labels or options.labels))
    if isinstance(source, (str, Path)):
        path = Path(source)
        if isinstance(source, str) and not path.exists() and ":" in source:  # never a Path, such as a recipe's
            return open_data(_call(source), inputs, options, known)
        if not path.exists():
            raise OnnxqError(
                f"data '{source}' does not exist; give an .npz or .npy file, a folder of images or package.module:callable."
            )
        if path.is_dir():
            return _images(path, inputs, options, known)
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


# ---- sources ------------------------------------------------------------------------------------------------------------


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
            f"data '{path}' is not a readable .npz or .npy file ({_unreadable(error)}); save arrays of numbers "
            "with numpy.savez."
        ) from error


def _unreadable(error: Exception) -> str:
    """What numpy says of a file; its advice to allow pickles, which run code, is left out."""
    text = " ".join(str(error).split())
    if "pickle" in text.lower():
        return "it holds Python objects" if text.startswith("Object arrays") else "it is not in numpy's format"
    return text[:120].rstrip(".")


def _load_labels(path: str) -> Array | None:
    """Labels along the first axis, of an .npy file or of a text file with a number a line; None for no path."""
    if not path:
        return None
    if not Path(path).exists():
        raise OnnxqError(f"labels '{path}' do not exist; give an .npy file, or a text file with a whole number a line.")
    try:
        with warnings.catch_warnings(action="ignore"):  # numpy warns of empty files
            labels: Array = (
                np.load(path, allow_pickle=False)
                if Path(path).suffix == ".npy"
                else np.loadtxt(path, dtype=np.int64, ndmin=1)
            )
        if not labels.ndim:
            raise ValueError("one number only")
        if not labels.size:
            raise ValueError("no number")
        return labels
    except Exception as error:  # as in `_load_numpy`
        raise OnnxqError(
            f"labels '{path}' are not a readable .npy file or text file with a whole number a line ({_unreadable(error)})."
        ) from error


def _one_each(labels: Array | None, samples: int, where: str) -> Array | None:
    """The labels, if there is one for each sample."""
    if labels is not None and (not labels.ndim or len(labels) != samples):
        raise OnnxqError(
            f"{where} has {samples} samples and {len(labels) if labels.ndim else 1} labels; give one label a sample."
        )
    return labels


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
            f"{where} has no array for the model's input {_names(missing)}; it has "
            f"{_names(arrays) or 'none'}. Name the arrays after the inputs."
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
    picked = _spread(total, options.samples)
    labels = _one_each(labels, total, where)

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


def _images(folder: Path, inputs: Sequence[Input], options: DataOptions, labels: Array | None) -> Data:
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise OnnxqError(f"folder '{folder}' holds no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise OnnxqError(
            f"folder '{folder}': images fit a model with one 4-D input; this one wants "
            f"{_names(i.name for i in inputs)}, so give an .npz file."
        )
    if options.layout not in ("", "nchw", "nhwc"):
        raise OnnxqError(f"layout '{options.layout}' is unknown; use nchw or nhwc.")
    wanted = inputs[0]
    layout = options.layout or ("nhwc" if wanted.shape[3] in (1, 3) and wanted.shape[1] not in (1, 3) else "nchw")
    channels = wanted.shape[1 if layout == "nchw" else 3]
    for name, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (1, 3 if channels != 1 else 1):
            raise OnnxqError(f"--{name} has {len(values)} values; give one, or one per channel, comma-separated.")
    if not all(options.std):
        raise OnnxqError("--std has a zero; give the standard deviation of RGB / 255.")
    if max(*options.mean, *options.std) > 2:
        said, right = (
            [
                f"--{name} {','.join(f'{v / by:.4g}' for v in values)}"
                for name, values in (("mean", options.mean), ("std", options.std))
            ]
            for by in (1, 255)
        )
        raise OnnxqError(f"{' '.join(said)} are of RGB in 0..255, and images are read as RGB/255: give {' '.join(right)}.")
    numbers = _spread(len(files), options.samples)
    picked = [files[n] for n in numbers]
    labels = _one_each(labels, len(files), f"folder '{folder}'")
    mode, mean, std = "L" if channels == 1 else "RGB", np.array(options.mean, np.float32), np.array(options.std, np.float32)

    def samples() -> Iterator[Mapping[str, Array]]:
        for file in picked:
            try:
                image = _pixels(file, options, mode)
            except OSError as error:
                raise _broken(picked, mode) from error
            pixels = (image - mean) / std
            yield {wanted.name: (pixels.transpose(2, 0, 1) if layout == "nchw" else pixels)[None]}

    made = Data(inputs, samples, f"folder '{folder}'", len(picked), None if labels is None else labels[numbers])
    if (options.mean, options.std) == (DataOptions.mean, DataOptions.std):
        made.notes = ("images were read as RGB/255 in 0..1; if the model wants other values, give --mean and --std",)
    return made


def _opened(file: Path, mode: str) -> Any:
    """A Pillow image. Raises OSError for a broken file."""
    from PIL import Image  # imported late: half of all users have no images

    try:
        with Image.open(file) as opened:
            return opened.convert(mode)
    except Exception as error:  # Pillow raises several types for broken files
        raise OSError(type(error).__name__) from error


def _broken(files: Iterable[Path], mode: str) -> OnnxqError:
    """What is said of images that cannot be read: all at once, the first five by name."""
    found = []
    for file in files:
        try:
            _opened(file, mode)
        except OSError as error:
            found.append(f"'{file}' ({error})")
    if len(found) == 1:
        return OnnxqError(f"image {found[0].replace(' (', ' cannot be read (')}; remove or replace it.")
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return OnnxqError(f"{len(found)} images cannot be read: {', '.join(found[:5])}{more}; remove or replace them.")


def _pixels(file: Path, options: DataOptions, mode: str) -> Array:
    """One image as float32 [height, width, channels] in 0..1. Raises OSError for a broken file."""
    from PIL import Image

    image = _opened(file, mode)
    if options.resize:
        ratio = options.resize / min(image.size)
        size = (max(round(image.width * ratio), 1), max(round(image.height * ratio), 1))
        image = image.resize(size, Image.Resampling.BILINEAR)
    if options.crop:
        if min(image.size) < options.crop:
            raise OnnxqError(
                f"image '{file}' ({image.width} x {image.height}) is smaller than crop = {options.crop}; "
                "resize it first with --resize."
            )
        left, top = (image.width - options.crop) // 2, (image.height - options.crop) // 2
        image = image.crop((left, top, left + options.crop, top + options.crop))
    pixels = np.asarray(image, np.float32) / np.float32(255)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


# ---- small helpers -------------------------------------------------------------------------------------------------------


def _spread(total: int, wanted: int) -> list[int]:
    """`wanted` numbers spread evenly over range(total): files are often sorted by class."""
    if wanted <= 0 or wanted >= total:
        return list(range(total))
    return [n * total // wanted for n in range(wanted)]


def _fit(array: Array, wanted: Input, where: str) -> Array:
    """The array as the model's dtype and shape, or the sentence that says why not."""
    if array.dtype != wanted.dtype:
        kinds = {"i": "iu", "u": "iu"}.get(wanted.dtype.kind, wanted.dtype.kind)
        if array.dtype.kind not in kinds:  # whole numbers for a float input are mostly raw pixels
            hint = "; convert and normalize it as the model was trained" if wanted.dtype.kind == "f" else ""
            raise OnnxqError(f"{where}: input '{wanted.name}' wants {wanted.dtype}, the data is {array.dtype}{hint}.")
        array = array.astype(wanted.dtype)
    shape: tuple[int | None, ...] = wanted.shape
    if shape and shape[0] is not None and len(array.shape) == len(shape) and array.shape[0] == 1:
        shape = (1, *shape[1:])  # batches of a fixed size are put together later
    if len(shape) != array.ndim or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
        want = [n if n is not None else "any" for n in wanted.shape]
        hint = "; see --resize, --crop and --layout" if where.startswith("folder") else _misfit(array.shape, wanted.shape)
        raise OnnxqError(f"{where}: input '{wanted.name}' wants shape {want}, the data has {list(array.shape)}{hint}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        kind = "NaN" if np.isnan(array).any() else "Inf"
        raise OnnxqError(f"{where}: input '{wanted.name}' has {kind}; remove that sample or mend it.")
    return array


def _misfit(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> str:
    """What would make an array of a shape fit, where that can be told."""
    if len(shape) == len(wanted) == 4 and wanted[1] == shape[3] != shape[1]:
        return "; transpose to NCHW: x.transpose(0, 3, 1, 2)"
    if len(shape) == len(wanted) == 4 and wanted[3] == shape[1] != shape[3]:
        return "; transpose to NHWC: x.transpose(0, 2, 3, 1)"
    # where the first axis of an array counts samples, one sample without it has been taken apart
    missing = len(wanted) - len(shape)
    if missing in (1, 2) and all(n is None or n == m for n, m in zip(wanted[missing:], shape, strict=True)):
        return "; add a batch axis: x[None]"
    return ""


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{n}'" for n in sorted(names))
