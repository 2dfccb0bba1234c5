"""What every pass must do, and what this one is for."""

from onnxq_plugins import diagnose, quantize
from onnxq_plugins.testing import parametrize_plugin, parametrize_with_checks
from onnxq_plugins.testing.models import feeds, outliers

import acme_side
from acme_side import SidePath


@parametrize_with_checks([SidePath(), SidePath(channels=2, factor=2.0)])
def test_conformance(step, check):
    check(step)


@parametrize_plugin(acme_side)
def test_the_plugin(check):
    check()


def quantized(*passes):
    return quantize(outliers(), {"pass": [*passes, {"use": "ranges"}]}, feeds(outliers(), 8))


def test_outliers_no_longer_widen_the_grid():
    plain, split = quantized(), quantized({"use": "acme.side-path"})
    assert split.check.sqnr > plain.check.sqnr + 6
    paths = {name: reason for name, reason in split.report.floats.items() if reason.kind == "pass"}
    assert len(paths) == 2 and all("side path of" in reason for reason in paths.values())
    assert "2/2 MatMul" in split.summary  # the side paths do not count


def test_what_reaches_no_further_than_the_factor_stays_as_it_is():
    split = quantized({"use": "acme.side-path", "factor": 1000.0})
    assert split.model.graph == quantized().model.graph


def test_a_diagnosis_proposes_it():
    found = diagnose(quantized(), attempts=1)
    remedies = [remedy.text for layer in found.layers for remedy in layer.remedies]
    assert "outlier channels in a float side path" in remedies


def test_its_recipe_is_known_by_name():
    steps = quantize(outliers(), "acme.side", feeds(outliers(), 4)).report.steps
    assert any(step["pass"] == "acme.side-path" and step["result"]["layers"] for step in steps)
