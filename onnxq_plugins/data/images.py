"""Samples from a folder of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.data.inputs import Input, quoted
from onnxq_plugins.data.labels import check_labels
from onnxq_plugins.data.options import DataOptions
from onnxq_plugins.data.samples import Data, batches, chosen
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def has_images(folder: Path) -> bool:
    return any(f.suffix.lower() in IMAGE_SUFFIXES for f in folder.iterdir())


def open_images(folder: Path, inputs: Sequence[Input], options: DataOptions, labels: Array | None) -> Data:
    """Data from a folder of images, in the order of their names, for a model whose one needed input has height, width and
    channels, with or without a batch axis. Raises OnnxqError for another model, and options that do not fit it."""
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise OnnxqError(f"folder '{folder}' has no image ({', '.join(sorted(IMAGE_SUFFIXES))}) and no .npz file.")
    needed = [i for i in inputs if not i.optional]
    if len(needed) != 1 or len(needed[0].shape or ()) not in (3, 4):
        raise OnnxqError(
            f"folder '{folder}': images fit a model with one 4-D input; this one has "
            f"{quoted(i.name for i in needed)}, so give an .npz file."
        )
    target = needed[0]
    shape = target.shape or ()
    form = _Form.of(shape[-3:], target.dtype, options)
    numbers = chosen(len(files), options.samples, options.state)
    labels = check_labels(labels, len(files), f"folder '{folder}'")
    batch = (target.fixed or 1) if len(shape) == 4 else 1
    at = batches(len(numbers), batch)

    def samples() -> Iterator[Mapping[str, Array]]:
        for chunk in at:
            try:
                images = np.stack([form.read(files[numbers[n]]) for n in chunk])
            except OSError as error:
                raise _broken((files[n] for n in numbers), form.mode) from error
            yield {target.name: images if len(shape) == 4 else images[0]}

    labels = None if labels is None else labels[[numbers[n] for chunk in at for n in chunk]]
    data = Data(inputs, samples, f"folder '{folder}'", len(at), labels, batch)
    data.bounded = True
    if form.white == 1 and (options.mean, options.std) == (DataOptions.mean, DataOptions.std):
        data.notes = (
            "images were read as RGB/255 in 0..1; if the model expects other values, give --mean and --std, or --range 255",
        )
    return data


@dataclass(frozen=True, eq=False)
class _Form:
    """The form in which a model wants images.

    size    width and height; None: each image's own, after resize and crop
    dtype   whole numbers are rounded to it
    """

    options: DataOptions
    layout: str
    mode: str
    white: float
    size: tuple[int, int] | None
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, shape: Sequence[int | str | None], dtype: np.dtype[Any], options: DataOptions) -> _Form:
        """For an input [C, H, W] or [H, W, C]. Raises OnnxqError for options that do not fit it."""
        if options.layout not in ("", "nchw", "nhwc"):
            raise OnnxqError(f"layout '{options.layout}' is unknown; use nchw or nhwc.")
        layout = options.layout or ("nhwc" if shape[2] in (1, 3) and shape[0] not in (1, 3) else "nchw")
        channels, height, width = shape if layout == "nchw" else (shape[2], *shape[:2])
        white = 255.0 if dtype.kind in "iu" else options.range  # whole numbers are pixels as they are
        _check_normalization(options, white, 1 if channels == 1 else 3)
        if options.bgr and channels == 1:
            raise OnnxqError("--bgr orders three channels, and the model's input has one; leave it out.")
        size = (options.size[0], options.size[1]) if options.size else None
        if options.letterbox and size is None:
            if not isinstance(width, int) or not isinstance(height, int):
                raise OnnxqError("--letterbox needs a size, and the model's input has none that is fixed; give --size WxH.")
            size = (width, height)
        return cls(options, layout, "L" if channels == 1 else "RGB", white, size, dtype)

    def read(self, file: Path) -> Array:
        """One image as the model takes it, without a batch axis. Raises OSError for a broken file."""
        pixels = np.asarray(self._sized(file), np.float32)
        pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
        pixels = pixels[:, :, ::-1] if self.options.bgr else pixels
        mean, std = np.array(self.options.mean, np.float32), np.array(self.options.std, np.float32)
        pixels = (pixels / np.float32(255 / self.white) - mean) / std
        if self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            pixels = np.clip(np.round(pixels), limits.min, limits.max)
        pixels = pixels.astype(self.dtype) if self.dtype.kind in "iuf" else pixels
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if self.layout == "nchw" else pixels

    def _sized(self, file: Path) -> Any:
        """A Pillow image of the right size."""
        from PIL import Image  # imported late: half of all users have no images

        image, options, bilinear = _load_image(file, self.mode), self.options, Image.Resampling.BILINEAR
        if self.size is not None and options.letterbox:
            ratio = min(wanted / own for wanted, own in zip(self.size, image.size, strict=True))
            inner = [max(round(n * ratio), 1) for n in image.size]
            box = Image.new(self.mode, self.size, options.padding if self.mode == "L" else (options.padding,) * 3)
            left, top = ((wanted - own) // 2 for wanted, own in zip(self.size, inner, strict=True))
            box.paste(image.resize((inner[0], inner[1]), bilinear), (left, top))
            return box
        if self.size is not None:
            return image.resize(self.size, bilinear)
        if options.resize:
            ratio = options.resize / min(image.size)
            image = image.resize((max(round(image.width * ratio), 1), max(round(image.height * ratio), 1)), bilinear)
        if options.crop:
            if min(image.size) < options.crop:
                raise OnnxqError(
                    f"image '{file}' ({image.width} x {image.height}) is smaller than crop = {options.crop}; "
                    "resize it first with --resize."
                )
            left, top = (image.width - options.crop) // 2, (image.height - options.crop) // 2
            image = image.crop((left, top, left + options.crop, top + options.crop))
        return image


def _check_normalization(options: DataOptions, white: float, channels: int) -> None:
    """Raise OnnxqError for a mean or std of another number of channels, or of another range than images are read in."""
    for name, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (1, channels):
            raise OnnxqError(f"--{name} has {len(values)} values; give one, or one per channel, comma-separated.")
    if not all(options.std):
        raise OnnxqError("--std has a zero; give the standard deviation of RGB / 255.")
    largest, raw = max(*options.mean, *options.std), white == 255
    if raw and (not any(options.mean) or max(options.mean) > 1 or largest > 2):
        return
    if not raw and largest <= 2:
        return
    present, scaled = (
        " ".join(
            f"--{name} {','.join(f'{v * factor:.4g}' for v in values)}"
            for name, values in (("mean", options.mean), ("std", options.std))
        )
        for factor in (1, 255 if raw else 1 / 255)
    )
    if raw:
        raise OnnxqError(f"{present} are of RGB in 0..1, and images are read in 0..255: give {scaled}.")
    raise OnnxqError(f"{present} are of RGB in 0..255, and images are read as RGB/255: give {scaled}.")


def _load_image(file: Path, mode: str) -> Any:
    """A Pillow image. Raises OSError for a broken file."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert(mode)
    except Exception as error:  # Pillow raises several types for broken files
        raise OSError(type(error).__name__) from error


def _broken(files: Iterable[Path], mode: str) -> OnnxqError:
    """The error for images that cannot be read: all at once, the first five by name."""
    broken = []
    for file in files:
        try:
            _load_image(file, mode)
        except OSError as error:
            broken.append(f"'{file}' ({error})")
    if len(broken) == 1:
        return OnnxqError(f"image {broken[0].replace(' (', ' cannot be read (')}; remove or replace it.")
    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    return OnnxqError(f"{len(broken)} images cannot be read: {', '.join(broken[:5])}{more}; remove or replace them.")
