"""Samples from a folder of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.data.inputs import Input, quoted
from onnxq_plugins.data.labels import check_labels
from onnxq_plugins.data.options import DataOptions
from onnxq_plugins.data.samples import Data, spread
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


def open_images(folder: Path, inputs: Sequence[Input], options: DataOptions, labels: Array | None) -> Data:
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise OnnxqError(f"folder '{folder}' has no image ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise OnnxqError(
            f"folder '{folder}': images fit a model with one 4-D input; this one has "
            f"{quoted(i.name for i in inputs)}, so give an .npz file."
        )
    if options.layout not in ("", "nchw", "nhwc"):
        raise OnnxqError(f"layout '{options.layout}' is unknown; use nchw or nhwc.")
    target = inputs[0]
    layout = options.layout or ("nhwc" if target.shape[3] in (1, 3) and target.shape[1] not in (1, 3) else "nchw")
    channels = target.shape[1 if layout == "nchw" else 3]
    for name, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (1, 3 if channels != 1 else 1):
            raise OnnxqError(f"--{name} has {len(values)} values; give one, or one per channel, comma-separated.")
    if not all(options.std):
        raise OnnxqError("--std has a zero; give the standard deviation of RGB / 255.")
    if max(*options.mean, *options.std) > 2:
        present, scaled = (
            " ".join(
                f"--{name} {','.join(f'{v / divisor:.4g}' for v in values)}"
                for name, values in (("mean", options.mean), ("std", options.std))
            )
            for divisor in (1, 255)
        )
        raise OnnxqError(f"{present} are of RGB in 0..255, and images are read as RGB/255: give {scaled}.")
    numbers = spread(len(files), options.samples)
    selected = [files[n] for n in numbers]
    labels = check_labels(labels, len(files), f"folder '{folder}'")
    mode, mean, std = "L" if channels == 1 else "RGB", np.array(options.mean, np.float32), np.array(options.std, np.float32)

    def samples() -> Iterator[Mapping[str, Array]]:
        for file in selected:
            try:
                image = _pixels(file, options, mode)
            except OSError as error:
                raise _broken(selected, mode) from error
            pixels = (image - mean) / std
            yield {target.name: (pixels.transpose(2, 0, 1) if layout == "nchw" else pixels)[None]}

    data = Data(inputs, samples, f"folder '{folder}'", len(selected), None if labels is None else labels[numbers])
    if (options.mean, options.std) == (DataOptions.mean, DataOptions.std):
        data.notes = ("images were read as RGB/255 in 0..1; if the model expects other values, give --mean and --std",)
    return data


def _load_image(file: Path, mode: str) -> Any:
    """A Pillow image. Raises OSError for a broken file."""
    from PIL import Image  # imported late: half of all users have no images

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


def _pixels(file: Path, options: DataOptions, mode: str) -> Array:
    """One image as float32 [height, width, channels] in 0..1. Raises OSError for a broken file."""
    from PIL import Image

    image = _load_image(file, mode)
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
