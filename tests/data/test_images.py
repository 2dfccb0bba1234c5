"""Images become the array that the model expects."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnxq_plugins import OnnxqError, open_data
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


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return write_png("a.png", width, height, seed=seed)


def one(inputs: Input, folder, **options) -> np.ndarray:
    (feed,) = open_data(folder, [inputs], DataOptions(**options))
    return feed[inputs.name]


def test_raw_pixels_blue_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = picture(12, 12)
    x = one(nchw(12), tmp_path, range=255, bgr=True)
    np.testing.assert_array_equal(x[0].transpose(1, 2, 0), pixels[:, :, ::-1])
    x = one(nchw(12), tmp_path, range=255, mean=(127.5,), std=(127.5,))
    np.testing.assert_allclose(x[0].transpose(1, 2, 0), pixels / 127.5 - 1, atol=1e-6)
    mean = np.float32([103, 116, 123])  # of the channels as the model gets them
    x = one(nchw(12), tmp_path, range=255, bgr=True, mean=tuple(map(float, mean)))
    np.testing.assert_allclose(x[0].transpose(1, 2, 0), pixels[:, :, ::-1] - mean, atol=1e-4)


def test_a_model_of_bytes_gets_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = picture(12, 12)
    x = one(Input("x", np.dtype(np.uint8), (1, 12, 12, 3)), tmp_path)
    assert x.dtype == np.uint8
    np.testing.assert_array_equal(x[0], pixels)


@pytest.mark.parametrize("size", [(20, 8), (8, 20), (12, 12)])
def test_size_sets_both_sides(tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    pixels = picture(24, 16)
    x = one(Input("x", np.dtype(np.float32), (1, 3, "h", "w")), tmp_path, size=size, range=255)
    np.testing.assert_array_equal(x[0].transpose(1, 2, 0), Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


@pytest.mark.parametrize(("width", "height"), [(24, 12), (12, 24), (16, 16), (31, 7)])
@pytest.mark.parametrize("padding", [114, 0])
def test_letterbox_keeps_the_ratio_and_pads_evenly(tmp_path, monkeypatch, width, height, padding):
    monkeypatch.chdir(tmp_path)
    pixels = picture(width, height)
    x = one(nchw(16), tmp_path, letterbox=True, padding=padding, range=255)[0].transpose(1, 2, 0)
    ratio = 16 / max(width, height)
    inner = round(width * ratio), round(height * ratio)
    left, top = (16 - inner[0]) // 2, (16 - inner[1]) // 2
    resized = np.asarray(Image.fromarray(pixels).resize(inner, Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(x[top : top + inner[1], left : left + inner[0]], resized)
    border = np.ones((16, 16), bool)
    border[top : top + inner[1], left : left + inner[0]] = False
    assert (x[border] == padding).all()


def test_images_without_a_batch_axis_and_of_a_fixed_batch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = picture(12, 12)
    x = one(Input("x", np.dtype(np.float32), (3, 12, 12)), tmp_path)
    np.testing.assert_allclose(x.transpose(1, 2, 0), pixels / 255, rtol=1e-6)
    for name in "bc":
        write_png(f"{name}.png", seed=ord(name))
    feeds = list(open_data(tmp_path, [Input("x", np.dtype(np.float32), (2, 3, 12, 12))], labels=np.arange(3)))
    assert [feed["x"].shape for feed in feeds] == [(2, 3, 12, 12)] * 2
    np.testing.assert_array_equal(feeds[1]["x"][0], feeds[1]["x"][1])  # the last batch is completed


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (
            {"range": 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
            "give --mean 123.7,116.3,103.5 --std 58.4",
        ),
        ({"mean": (123.0,), "std": (58.0,)}, "read as RGB/255: give --mean 0.4824 --std 0.2275"),
        ({"letterbox": True}, "--letterbox needs a size"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, monkeypatch, options, phrase):
    monkeypatch.chdir(tmp_path)
    picture(12, 12)
    with pytest.raises(OnnxqError, match=phrase):
        one(Input("x", np.dtype(np.float32), (1, 3, None, None)), tmp_path, **options)


@pytest.mark.parametrize(
    "options", [{"size": (3,)}, {"size": (0, 3)}, {"size": (3, 3), "crop": 2}, {"range": 2.0}, {"padding": 300}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OnnxqError):
        DataOptions(**options)
