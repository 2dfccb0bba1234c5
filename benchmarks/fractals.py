"""Fractal calibration images: seconds for 64 of 224 x 224 x 3, and their statistics next to those of photographs.

    python -m benchmarks.fractals [--shared FOLDER]

Photographs are the calibration images of `benchmarks.models`, if the folder holds them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.models import load_case, shared_folder
from onnxq_plugins.solvers.fractals import fractals

COUNT = 64


def spectrum_slope(image: np.ndarray) -> float:
    """Exponent of amplitude over frequency of an image [h, w, c]: -1 if it falls as 1 / f, 0 for white noise.

    Fits a line through the logarithms of radial means of the power, after windowing the edges."""
    grey = image.mean(axis=2)
    height, width = grey.shape
    power = np.abs(np.fft.fft2((grey - grey.mean()) * np.outer(np.hanning(height), np.hanning(width)))) ** 2
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    ring = np.digitize(frequency, np.geomspace(2 / min(height, width), 0.4, 10))
    means = [(frequency[ring == k].mean(), power[ring == k].mean() + 1e-12) for k in range(1, 10) if (ring == k).any()]
    return float(np.polyfit(*np.log(means).T, 1)[0] / 2)


def statistics_of(image: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, standard deviation and correlation of the channels, slope of the spectrum, of an image [h, w, 3] in 0..1."""
    flat = image.reshape(-1, image.shape[2]).astype(np.float64)
    correlation = np.corrcoef(flat.T)[np.triu_indices(flat.shape[1], 1)].mean()
    return float(flat.mean()), float(flat.std(axis=0).mean()), float(correlation), spectrum_slope(image)


def sets(shared: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and images [n, h, w, 3] in 0..1."""
    for size in (224, 32):
        yield f"fractals {size} x {size}", np.stack(list(fractals(COUNT, size, size, 3, np.random.default_rng(0))))
    for what, name in (("ImageNet 224 x 224", "mobilenet_v1_0.75_224"), ("CIFAR-10 32 x 32", "resnet20_cifar10")):
        try:
            images = load_case(name, shared, test=False).calibration.transpose(0, 2, 3, 1)
        except FileNotFoundError:
            continue
        shift, scale = (
            (1, 0.5)
            if "ImageNet" in what
            else (np.array([0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], [0.229, 0.224, 0.225])
        )
        yield what, (images + shift) * scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    args = parser.parse_args()
    spent = []
    for seed in range(3):
        start = time.perf_counter(), time.process_time()
        for _ in fractals(COUNT, 224, 224, 3, np.random.default_rng(seed)):
            pass
        spent.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    seconds, busy = (statistics.median(column) for column in zip(*spent, strict=True))
    print(f"{COUNT} images of 224 x 224 x 3: {seconds:.1f} s, of which {busy:.1f} s computing (median of 3)\n")
    print("Median over the images (5 % to 95 %)\n\n| images | mean | std | correlation | slope |\n|---|---|---|---|---|")
    for name, images in sets(shared_folder(args.shared)):
        values = np.nanpercentile([statistics_of(image) for image in images], [50, 5, 95], axis=0).T
        cells = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in values]
        print(f"| {len(images)} {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
