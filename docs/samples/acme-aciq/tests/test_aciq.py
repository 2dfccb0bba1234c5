"""What every pass must do, and what this one is for."""

import numpy as np
import pytest
from onnxq_plugins import Histogram, quantize
from onnxq_plugins.testing import parametrize_plugin, parametrize_with_checks
from onnxq_plugins.testing.models import cnn, feeds

import acme_aciq
from acme_aciq import Aciq
from acme_aciq.clipping import gauss_clip, laplace_clip

FOUR = {"target": "npu4", "weights": {"bits": 4}, "activations": {"bits": 4}}


@parametrize_with_checks([Aciq(), Aciq(prior="gauss")], recipe=FOUR)
def test_conformance(step, check):
    check(step)


@parametrize_plugin(acme_aciq)
def test_the_plugin(check):
    check()


@pytest.mark.parametrize(("bits", "b", "s"), [(2, 2.83, 1.71), (3, 3.89, 2.15), (4, 5.03, 2.55)])
def test_clips_are_those_of_the_paper(bits, b, s):
    assert laplace_clip(bits) == pytest.approx(b, abs=0.02)
    assert gauss_clip(bits) == pytest.approx(s, abs=0.02)


@pytest.mark.parametrize("prior", ["laplace", "gauss"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("relu", [False, True])
def test_no_other_range_has_a_lower_error(prior, bits, relu):
    x = getattr(np.random.default_rng(0), {"laplace": "laplace", "gauss": "normal"}[prior])(
        size=200_000
    )
    x = np.maximum(x, 0) if relu else x
    counts, edges = np.histogram(x, 2048)
    low, high = Aciq().clipped(Histogram(counts, edges[0], edges[-1]), bits)

    def error(reach):
        ends = (0, reach) if relu else (-reach, reach)
        step = (ends[1] - ends[0]) / 2**bits
        codes = np.clip(np.floor((x - ends[0]) / step), 0, 2**bits - 1) + 0.5
        return np.mean((x - np.where(x, codes * step + ends[0], 0)) ** 2)  # 0 is exact

    found = error((high - low) / (1 if relu else 2))
    others = [error(reach) for reach in np.linspace(0.5, np.abs(x).max(), 60)]
    assert found <= 1.06 * min(others)


def test_four_bits_gain_from_clipping():
    results = [
        quantize(cnn(), {**FOUR, "pass": [{"use": name}]}, feeds(cnn(), 64))
        for name in ("ranges", "acme.aciq")
    ]
    assert results[1].check.sqnr > results[0].check.sqnr
