"""Pictures for tests."""

from __future__ import annotations

import numpy as np
from PIL import Image


def write_png(path: str, width: int = 12, height: int = 12, mode: str = "RGB", seed: int = 0) -> np.ndarray:
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return pixels
