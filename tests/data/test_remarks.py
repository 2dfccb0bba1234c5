"""Data that fit badly: refused or remarked on, with what to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, quantize
from tests.zoo import cnn


@pytest.mark.parametrize(
    ("spoil", "phrase"),
    [
        (lambda x: x[:3], "has only 3 samples"),
        (lambda x: x[:1].repeat(12, 0), "are all equal"),
        (lambda x: np.arange(12, dtype=np.float32)[:, None, None, None] * np.ones_like(x), "are constant"),
        (lambda x: x, ""),
    ],
)
def test_samples_that_tell_little_are_remarked(spoil, phrase):
    x = np.random.default_rng(0).standard_normal((12, 3, 12, 12)).astype(np.float32)
    for data in (spoil(x), [{"x": one[None]} for one in spoil(x)]):
        told = " ".join(quantize(cnn(), "int8", data, workers=1).report["notes"])
        assert phrase in told and (phrase or not told)


@pytest.mark.parametrize(
    ("mean", "std", "right"),
    [("127.5", "127.5", "--mean 0.5 --std 0.5"), ("124,116,104", "1", "--mean 0.4863,0.4549,0.4078 --std 0.003922")],
)
def test_normalization_of_raw_pixels_is_refused_with_the_right_numbers(onnxq, mean, std, right):
    from PIL import Image

    Path("p").mkdir()
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save("p/a.png")
    onnx.save(cnn(), "m.onnx")
    code, _, err = onnxq("quantize", "m.onnx", "--data", "p", "--mean", mean, "--std", std)
    assert code == 2 and f"give {right}." in err and not list(Path().glob("*int8*"))


def test_all_broken_images_are_told_at_once(onnxq):
    from PIL import Image

    Path("p").mkdir()
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save("p/good.png")
    for n in range(7):
        Path(f"p/x{n}.png").write_bytes(b"no image")
    onnx.save(cnn(), "m.onnx")
    code, _, err = onnxq("quantize", "m.onnx", "--data", "p")
    assert code == 2 and "7 images cannot be read: 'p/x0.png' (" in err and "'p/x4.png'" in err and "x5" not in err
    assert "and 2 more" in err


@pytest.mark.parametrize(
    ("shape", "phrase"),
    [
        ((4, 12, 12, 3), "transpose to NCHW: x.transpose(0, 3, 1, 2)"),
        ((4, 8, 8, 3), "transpose to NCHW"),
        ((3, 12, 12), "add a batch axis: x[None]"),
        ((4, 3, 8, 8), "the data has [1, 3, 8, 8]."),
    ],
)
def test_shapes_that_nearly_fit_are_told_how_to(shape, phrase):
    with pytest.raises(OnnxqError) as told:
        quantize(cnn(), "int8", np.ones(shape, np.float32), workers=1)
    assert phrase in str(told.value)
    if len(shape) == 3:
        with pytest.raises(OnnxqError) as told:
            quantize(cnn(), "int8", [np.ones(shape, np.float32)], workers=1)
        assert phrase in str(told.value)


def test_files_that_cannot_be_used_are_told_plainly(onnxq):
    onnx.save(cnn(), "m.onnx")
    Path("t.npz").write_text("1,2")
    np.savez("o.npz", x=np.array([{}], object))
    np.savez("d.npz", x=np.zeros((9, 3, 12, 12), np.float32))
    for arguments, phrase in (
        (["--data", "d.npz", "--labels", "none.txt"], "labels 'none.txt' do not exist"),
        (["--data", "t.npz"], "not in numpy's format"),
        (["--data", "o.npz"], "contains Python objects"),
        (["--data", "d.npz", "--mean", "a"], "--mean 'a' must be a number"),
        ([], "give data (--data PATH)"),
    ):
        code, _, err = onnxq("quantize", "m.onnx", *arguments)
        assert code == 2 and phrase in err and "pickle" not in err
