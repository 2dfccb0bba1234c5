"""Images become the array that the model expects."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnxq_plugins import open_data
from onnxq_plugins.data import DataOptions, Input
from tests.data.pictures import write_png


def nchw(size: int, channels: int = 3) -> Input:
    return Input("x", np.dtype(np.float32), (None, channels, size, size))


@pytest.mark.parametrize(
    ("mode", "mean", "std"),
    [
        ("RGB", (0.0,), (1.0,)),
        ("RGB", (0.5,), (0.25,)),
        ("RGB", (0.485, 0.456, 0.406), (0.2, 0.3, 0.4)),
        ("L", (0.0,), (1.0,)),
        ("L", (0.5,), (0.25,)),
    ],
)
@pytest.mark.parametrize(("layout", "channels_last"), [("nchw", False), ("", False), ("nhwc", True), ("", True)])
def test_images_become_exactly_the_expected_array(tmp_path, monkeypatch, mode, mean, std, layout, channels_last):
    monkeypatch.chdir(tmp_path)
    channels = len(mode)
    pixels = write_png("a.png", 12, 12, mode).reshape(12, 12, channels)
    shape = (None, 12, 12, channels) if channels_last else (None, channels, 12, 12)
    data = open_data(tmp_path, [Input("x", np.dtype(np.float32), shape)], DataOptions(mean=mean, std=std, layout=layout))
    expected = (pixels.astype(np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    expected = expected[None] if channels_last else expected.transpose(2, 0, 1)[None]
    (feed,) = data
    assert feed["x"].dtype == np.float32
    np.testing.assert_allclose(feed["x"], expected, rtol=1e-6, atol=1e-7)


def test_crop_takes_the_middle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = write_png("a.png", 20, 16)
    (feed,) = open_data(tmp_path, [nchw(8)], DataOptions(crop=8))
    np.testing.assert_allclose(feed["x"][0].transpose(1, 2, 0), pixels[4:12, 6:14] / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "resized"), [((20, 16), (15, 12)), ((16, 20), (12, 15)), ((7, 6), (14, 12)), ((12, 12), (12, 12))]
)
def test_resize_gives_the_shorter_side(tmp_path, monkeypatch, size, resized):
    monkeypatch.chdir(tmp_path)
    pixels = write_png("a.png", *size)
    (feed,) = open_data(tmp_path, [nchw(12)], DataOptions(resize=12, crop=12))
    image = np.asarray(Image.fromarray(pixels).resize(resized, Image.Resampling.BILINEAR), np.float32) / 255
    left, top = (resized[0] - 12) // 2, (resized[1] - 12) // 2
    np.testing.assert_allclose(feed["x"][0].transpose(1, 2, 0), image[top : top + 12, left : left + 12], rtol=1e-6)


def test_images_of_other_modes_are_converted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = write_png("a.png", mode="RGBA")
    (feed,) = open_data(tmp_path, [nchw(12)])
    np.testing.assert_allclose(feed["x"][0].transpose(1, 2, 0), pixels[:, :, :3] / 255, rtol=1e-6)
    (feed,) = open_data(tmp_path, [nchw(12, channels=1)])
    assert feed["x"].shape == (1, 1, 12, 12)


def test_a_batch_of_images_is_read_in_name_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(("c.png", "a.bmp", "b.PNG")):
        Image.fromarray(np.full((12, 12, 3), 50 * n, np.uint8)).save(name)
    maxima = [float(feed["x"].max()) for feed in open_data(tmp_path, [nchw(12)])]
    np.testing.assert_allclose(maxima, np.array([50, 100, 0]) / 255, rtol=1e-6)
