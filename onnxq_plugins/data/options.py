"""Options for reading samples from files."""

from __future__ import annotations

from dataclasses import dataclass, field

from onnxq_plugins.errors import OnnxqError

_OF_IMAGES = ("resize", "crop", "size", "letterbox", "padding", "bgr", "range", "mean", "std", "layout")


@dataclass(frozen=True)
class DataOptions:
    """How files become samples; the ``[data]`` table of a recipe and the options of the command line.

    path       an .npz or .npy file, a folder of images, or a folder of .npz files with one feed each
    samples    number of samples to use, spread evenly over the source; 0 for all
    resize     images: shorter side in pixels after resizing, 0 for none
    crop       images: side of the square cut from the middle, 0 for none
    size       images: width and height in pixels after resizing, whatever the sides were before; () for none
    letterbox  images: keep the ratio of the sides and pad to `size` (the model's own size if that is fixed), evenly on both
               sides
    padding    images: grey of the letterbox, 0..255
    bgr        images: blue first, as OpenCV reads them
    range      images: what white is: 1, or 255 for raw pixels
    mean, std  images: of a channel in that range, one value or one per channel in the model's order
    layout     images: ``nchw`` or ``nhwc``; "" infers it from the model's input
    labels     an .npy file, or a text file of numbers: one label for each sample of the source, in its order. An .npz file
               may contain them itself, under the name ``labels``
    state      output -> input of the next step: the samples are steps of streams, in their order, and feeds may leave these
               inputs out. `samples` takes the first steps then
    outliers   keep samples in which an input reaches far beyond all usual ones (`data.outliers`)
    """

    path: str = ""
    samples: int = 0
    resize: int = 0
    crop: int = 0
    size: tuple[int, ...] = ()
    letterbox: bool = False
    padding: int = 114
    bgr: bool = False
    range: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = ""
    labels: str = ""
    state: dict[str, str] = field(default_factory=dict, hash=False)
    outliers: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "resize", "crop"):
            if getattr(self, name) < 0:
                raise OnnxqError(f"{name} = {getattr(self, name)} must not be negative")
        if self.size and (len(self.size) != 2 or min(self.size) < 1):
            raise OnnxqError(f"size = {list(self.size)} must be width and height in pixels, such as [320, 240]")
        if (self.size or self.letterbox) and (self.resize or self.crop):
            raise OnnxqError("size and letterbox set both sides of an image: leave resize and crop out")
        if self.range not in (1, 255):
            raise OnnxqError(f"range = {self.range:g} must be 1 or 255: what white is")
        if not 0 <= self.padding <= 255:
            raise OnnxqError(f"padding = {self.padding} must be a grey of 0..255")

    def of_images(self) -> list[str]:
        """The options on the command line which differ from their defaults and apply to images only."""
        return [f"--{name}" for name in _OF_IMAGES if getattr(self, name) != getattr(DataOptions, name)]
