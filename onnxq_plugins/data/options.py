"""Options for reading samples from files."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq_plugins.errors import OnnxqError


@dataclass(frozen=True)
class DataOptions:
    """How files become samples; the ``[data]`` table of a recipe and the options of the command line.

    path       an .npz or .npy file or a folder of images
    samples    number of samples to use, spread evenly over the source; 0 for all
    resize     images: shorter side in pixels after resizing, 0 for none
    crop       images: side of the square cut from the middle, 0 for none
    mean, std  images: of RGB / 255, one value or three
    layout     images: ``nchw`` or ``nhwc``; "" infers it from the model's input
    labels     an .npy file, or a text file of numbers: one label for each sample of the source, in its order. An .npz file
               may contain them itself, under the name ``labels``
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
