"""Scales of constants that are decoded take few bytes, and stay what the plan says."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from onnxq_plugins import quantize, runtimes
from onnxq_plugins.export.weights import in_few_bytes
from tests.networks import network, weight


@pytest.mark.parametrize(
    ("scale", "stored"),
    [
        (np.full((64, 1), 0.3, np.float32), np.full((1, 1), 0.3, np.float32)),
        (np.arange(1, 65, dtype=np.float32) / 1024, np.arange(1, 65, dtype=np.float16) / np.float16(1024)),
        (np.arange(1, 65, dtype=np.float32) / 1000, np.arange(1, 65, dtype=np.float32) / 1000),  # not exact in 16 bits
        (np.arange(1, 5, dtype=np.float32), np.arange(1, 5, dtype=np.float32)),  # too few
        (np.arange(1, 65, dtype=np.float32) * 1e6, np.arange(1, 65, dtype=np.float32) * 1e6),
        (np.arange(1, 65, dtype=np.uint8), np.arange(1, 65, dtype=np.uint8)),
    ],
)
def test_scales_are_stored_in_few_bytes_where_that_is_exact(scale, stored):
    found = in_few_bytes(scale)
    assert found.dtype == stored.dtype and np.array_equal(found, stored)
    assert np.array_equal(np.broadcast_to(found.astype(scale.dtype), scale.shape), scale)


def test_decoded_weights_have_scales_of_16_bits_that_clip_nothing():
    weights = {"w": weight((1, 128, 16)), "r": weight((1, 128, 32))}
    model = network([("LSTM", ["x", "w", "r"], ["y"], {"hidden_size": 32})], [4, 1, 16], weights)
    samples = [{"x": np.random.default_rng(n).standard_normal((4, 1, 16)).astype(np.float32)} for n in range(6)]
    result = quantize(model, {"pass": [{"use": "ranges"}]}, samples[:4], workers=1)
    for name, values in weights.items():
        scale = result.plan[name].scale
        assert scale.size == 128 and np.array_equal(scale.astype(np.float16).astype(np.float32), scale)
        exact = np.abs(values).max(axis=2, keepdims=True) / 127
        assert (scale >= exact * (1 - 1e-6)).all() and (scale <= exact * 1.002).all()
    assert sum(t.data_type == TensorProto.FLOAT16 for t in result.model.graph.initializer) == 2
    for feed in samples[4:]:
        y, z = (runtimes.session(m).run(None, dict(feed))[0] for m in (model, result.model))
        assert np.square(y - z).sum() < 1e-3 * np.square(y).sum()
