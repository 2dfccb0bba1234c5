"""The digits data set and model embedded in the package, used by `onnxq quickstart`.

The data are scikit-learn's `load_digits`: 1797 grey 8x8 images of handwritten digits with pixels
in 0..16. They come with scikit-learn, so nothing has to be downloaded. The model is a small depthwise-separable
residual CNN trained on the training part of the split below by `benchmarks/train_digits.py`; it
keeps its BatchNormalization nodes, as an exporter in training layout would.
"""

from __future__ import annotations

import pathlib

import numpy as np

TEST_SIZE = 450
CALIBRATION_SIZE = 64


def digits_split() -> dict[str, np.ndarray]:
    """Return the fixed stratified split of the digits.

    Images are float32 [N, 1, 8, 8] in 0..1, labels int64 [N]:
    `train_images`, `train_labels` (1347), `calibration_images` (64, also in the training part),
    `test_images`, `test_labels` (450).
    """
    # imported here: scikit-learn takes longer to import than all the rest, and only the quickstart needs it
    from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped, unused-ignore]

    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[:, None, :, :]
    labels = digits.target.astype(np.int64)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_SIZE, random_state=0, stratify=labels
    )
    # stratified as well: a calibration set without one of the digits would miss part of the ranges
    _, calibration_images = train_test_split(train_images, test_size=CALIBRATION_SIZE, random_state=0, stratify=train_labels)
    return {
        "train_images": train_images,
        "train_labels": train_labels,
        "calibration_images": calibration_images,
        "test_images": test_images,
        "test_labels": test_labels,
    }


def digits_model_path() -> pathlib.Path:
    """Return the path of the embedded model: `image` [N, 1, 8, 8] to `logits` [N, 10]."""
    return pathlib.Path(__file__).resolve().parent / "digits.onnx"
