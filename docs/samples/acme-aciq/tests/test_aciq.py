"""The conformance kit, and what the formula promises."""

import numpy as np
from onnxq_plugins import quantize
from onnxq_plugins.testing import parametrize_with_checks
from onnxq_plugins.testing.models import Net, feeds

from acme_aciq import Aciq


@parametrize_with_checks([Aciq()], recipe={"weights": {"bits": 4}})
def test_conformance(step, check):
    check(step)


def laplace(bits, **step):
    """The scale of Laplace-distributed weights, with and without the pass, and what it told."""
    net = Net(["N", 400])
    weight = np.random.default_rng(0).laplace(size=(400, 8))
    model = net.model(net.op("MatMul", "x", net.constant(weight)))
    recipe = {"weights": {"bits": bits, "block": "tensor"}}
    plain = quantize(model, recipe, feeds(model, 4))
    made = quantize(model, {**recipe, "pass": [{"use": "acme.aciq", **step}]}, feeds(model, 4))
    both = [spec for result in (plain, made) for spec in result.plan.values()]
    scales = [spec.scale for spec in both if spec.codes is not None]
    return weight, scales, made.report["steps"][0]["told"]["clipped_share_of_blocks"]


def test_the_formula_finds_the_least_error():
    weight, (_, scale), _ = laplace(bits=4)

    def error(step):
        return np.mean((weight - step * np.clip(np.rint(weight / step), -7, 7)) ** 2)

    assert error(scale) < 1.1 * min(error(step) for step in np.linspace(0.2, 2.0, 60))


def test_wide_codes_keep_their_outliers():
    _, (plain, made), told = laplace(bits=6)
    assert plain == made and not told
