"""Real networks with labelled data, read from a folder outside the repository (we may not redistribute them).

The folder is given with --shared or the environment variable ONNXQ_SHARED and holds `models/` and `data/`. Calibration
and test images never overlap: ImageNet, every eighth file against the rest; the others come split.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NAMES = ("mobilenet_v1_0.75_224", "resnet20_cifar10", "kwt1_speechcommands12")


@dataclass(frozen=True)
class Case:
    """A model, its input's name, calibration samples, test samples and labels."""

    name: str
    path: Path
    input: str
    calibration: np.ndarray
    test: np.ndarray
    labels: np.ndarray

    def feeds(self) -> list[dict[str, np.ndarray]]:
        """The calibration samples as batch-1 feeds."""
        return [{self.input: x[None]} for x in self.calibration]


def shared_folder(given: str | None = None) -> Path:
    """The folder with models and data; by default the one next to the checkout."""
    return Path(given or os.environ.get("ONNXQ_SHARED") or Path(__file__).parents[2] / "shared")


def load_case(name: str, shared: Path, test: bool = True) -> Case:
    """Model and data by name, without the test samples if `test` is False; FileNotFoundError if the folder does
    not hold them."""
    path = shared / "models" / f"{name}.onnx"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: give the folder with models/ and data/ as --shared or ONNXQ_SHARED")
    if name.startswith("mobilenet"):
        folder = shared / "data" / "imagenet500"
        files = sorted(f for f in folder.iterdir() if f.suffix == ".jpg")
        tested = [f for i, f in enumerate(files) if i % 8] if test else []
        labels = json.loads((folder / "labels.json").read_text())
        return Case(
            name, path, "input", _imagenet(files[::8]), _imagenet(tested), np.array([labels[f.name] for f in tested])
        )
    if name.startswith("resnet20"):
        data = np.load(shared / "data" / "cifar10.npz")
        return Case(
            name, path, "input", _cifar(data["calibration_images"]), _cifar(data["test_images"]), data["test_labels"]
        )
    data = np.load(shared / "data" / "speech_commands12.npz")
    return Case(
        name,
        path,
        "mfcc",
        data["calibration_mfcc"].astype(np.float32),
        data["test_mfcc"].astype(np.float32),
        data["test_labels"],
    )


def _imagenet(files: list[Path]) -> np.ndarray:
    from PIL import Image

    images = np.empty((len(files), 3, 224, 224), np.float32)
    for image, file in zip(images, files, strict=True):
        image[:] = np.asarray(Image.open(file).convert("RGB"), np.float32).transpose(2, 0, 1) / 127.5 - 1
    return images


def _cifar(images: np.ndarray) -> np.ndarray:
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    return np.ascontiguousarray(((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2))


def peak_memory() -> float:
    """Peak resident memory of this process in MB. getrusage would count the parent's, from before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
