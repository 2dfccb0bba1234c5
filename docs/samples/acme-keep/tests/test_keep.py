"""The conformance kit, and what the pass promises beyond it."""

import numpy as np
import pytest
from onnxq_plugins import OnnxqError, quantize
from onnxq_plugins.testing import parametrize_with_checks
from onnxq_plugins.testing.models import feeds, mobilenet

from acme_keep import KeepWorst

FOUR = {"weights": {"bits": 4}}


@parametrize_with_checks([KeepWorst()], recipe=FOUR)
def test_conformance(step, check):
    check(step)


def run(**step):
    """Widths of the layers by name, and the numbers of their weights."""
    recipe = {**FOUR, "pass": [{"use": "acme.keep-worst", **step}]}
    result = quantize(mobilenet(), recipe, feeds(mobilenet(), 4))
    bits = {y.name: result.plan[y.weight].bits for y in result.graph.layers}
    return bits, {y.name: int(np.prod(y.shape)) for y in result.graph.layers}


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_the_share_is_kept_to(share):
    bits, sizes = run(share=share)
    kept = sum(size for name, size in sizes.items() if bits[name] == 8)
    left = [size for name, size in sizes.items() if bits[name] == 4]
    room = share * sum(sizes.values()) - kept
    assert room >= 0 and all(size > room for size in left)


def test_a_larger_share_keeps_more():
    kept = [sum(bits == 8 for bits in run(share=share)[0].values()) for share in (0.0, 0.5, 1.0)]
    assert kept[0] == 0 < kept[1] < kept[2]


def test_a_share_above_1_is_told():
    with pytest.raises(OnnxqError, match=r"share = 2\.0 must be 0 to 1"):
        run(share=2.0)
