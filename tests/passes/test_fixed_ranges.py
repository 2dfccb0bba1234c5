"""Ranges that are given: tensors have them, all others are left to the passes behind."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, quantize
from tests.zoo import cnn, feeds, resnet20


def fixed(model, ranges, **options):
    return quantize(
        model, {"pass": [{"use": "fixed-ranges", "ranges": ranges}, {"use": "ranges"}]}, feeds(model, 8), **options
    )


def test_a_tensor_has_the_range_that_is_given_and_others_their_own():
    model = resnet20()
    plain = quantize(model, {}, feeds(model, 8)).plan
    result = fixed(model, {"x": [-3.0, 5.0]})
    low, high = result.plan["x"].value_range
    step = float(result.plan["x"].scale)
    assert abs(low + 3) <= step and abs(high - 5) <= step
    others = [n for n, spec in plain.items() if n != "x" and spec.codes is None]
    assert others and all(np.array_equal(result.plan[n].scale, plain[n].scale) for n in others)


@pytest.mark.parametrize("tensor", ["nowhere", "t7"])
def test_a_tensor_that_is_not_quantized_is_an_error(tmp_path, tensor):
    with pytest.raises(OnnxqError, match="is no quantized tensor"):
        fixed(cnn(), {tensor: [0.0, 1.0]}, output=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("ends", [[1.0], [1.0, 0.0], [0.0, 0.0], [0.0, float("nan")]])
def test_what_is_no_range_is_an_error(ends):
    with pytest.raises(OnnxqError, match="lowest, highest"):
        fixed(cnn(), {"x": ends})
