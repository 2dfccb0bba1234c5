"""bound-accumulator: every layer fits, at a price that the report names."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, audit_model, hookimpl, load, quantize, runtimes
from onnxq_plugins.job import Pass
from onnxq_plugins.layers.problem import white_inputs
from onnxq_plugins.spec import from_range
from tests.zoo import ZOO, Net, cnn, feeds, mlp, mobilenet, run, some

TARGETS = ("ort-cpu", "ort-cpu-avx2", "openvino")
NETWORKS = (
    *("cnn", "mobilenet", "grouped", "mlp", "transformer"),
    *("conv1d", "no_bias", "dead_channels", "odd_channels", "resnet20"),
)


def recipe(bits, weights=8, before=(), **more):
    return {"weights": {"bits": weights, **more}, "pass": [*before, {"use": "bound-accumulator", "bits": bits}]}


def told(result):
    return next(step["result"] for step in result.report["steps"] if step["pass"] == "bound-accumulator")


@pytest.mark.parametrize(
    ("name", "target"),
    some(
        itertools.product(NETWORKS, TARGETS),
        *itertools.product(("mobilenet", "mlp"), TARGETS),
        *itertools.product(("grouped", "transformer", "no_bias", "dead_channels", "odd_channels"), TARGETS[1:2]),
    ),
)
def test_every_layer_fits(name, target):
    model = ZOO[name]()
    weights = 4 if target == "openvino" else 8
    result = quantize(model, recipe(14, weights), feeds(model, 4), target=target)
    audit = audit_model(result.model)
    found = [y for y in audit.layers if y.constant_weight and y.accumulator is not None]
    assert len(found) == sum(y.constant_weight for y in audit.layers) and max(y.accumulator for y in found) <= 14
    seen = told(result)
    assert not seen["left_alone"] and seen["fit"] + len(seen["bounded"]) == len(found)
    assert all(y["before"] > 14 >= y["after"] and y["outputs"] for y in seen["bounded"].values())
    assert all(np.isfinite(y).all() for feed in feeds(model, 2) for y in run(result.model, feed))
    assert json.loads(json.dumps(result.report)) == result.report


@pytest.mark.parametrize("name", ["cnn", "mobilenet", "grouped", "mlp"])
def test_what_fits_is_left_as_it_is(name):
    model, data = ZOO[name](), feeds(ZOO[name](), 4)
    plain = quantize(model, {"pass": []}, data)
    free = quantize(model, recipe(32), data)
    assert not told(free)["bounded"]
    for tensor, spec in plain.plan.items():
        if spec.codes is not None:
            np.testing.assert_array_equal(free.plan[tensor].codes, spec.codes)
            assert free.plan[tensor].shift is None
    need = max(y.accumulator for y in audit_model(plain.model).layers)
    tight = quantize(model, recipe(need - 1), data)
    for tensor, spec in tight.plan.items():
        assert np.array_equal(spec.scale, plain.plan[tensor].scale)
    changed = told(tight)["bounded"]
    assert changed and all(y["outputs"] > 0 and y["before"] == need for y in changed.values())


def test_outputs_that_fit_keep_learned_codes_and_shifts():
    model = mlp()
    before = [{"use": "ranges"}, {"use": "round", "method": "gptq"}]
    learned = quantize(model, {"pass": before}, feeds(model, 8))
    need = max(y.accumulator for y in audit_model(learned.model).layers)
    result = quantize(model, recipe(need - 1, before=before), feeds(model, 8))
    kept = changed = 0
    for name, spec in learned.plan.items():
        if spec.codes is not None:
            axis = 1 - int(np.argmax(np.array(spec.scale.shape) > 1))
            same = (result.plan[name].codes == spec.codes).all(axis=axis)
            np.testing.assert_array_equal(result.plan[name].shift[same], spec.shift[same])
            kept, changed = kept + int(same.sum()), changed + int((~same).sum())
    assert kept and changed == sum(y["outputs"] for y in told(result)["bounded"].values())


def test_the_bias_takes_the_mean_error():
    net = Net(["N", 16])
    x = net.op("Relu", net.gemm("x", 16, 24))
    model = net.model(net.gemm(x, 24, 8))
    data = feeds(model, 64)
    result = quantize(model, recipe(15), data)
    assert len(told(result)["bounded"]) == 2
    outputs = [runtimes.outputs(runtimes.session(m), data)[0] for m in (model, result.model)]
    bias = np.abs(np.mean(outputs[0] - outputs[1], axis=0)).max()
    assert bias < 0.15 * np.abs(outputs[0] - outputs[1]).mean()  # what the layer before adds is left


def test_what_it_costs_is_told():
    model = cnn()
    found = [told(quantize(model, recipe(bits, 4), feeds(model, 16)))["bounded"] for bits in (15, 13)]
    assert all(
        found[1][name]["loss_relative_to_nearest"] >= y["loss_relative_to_nearest"] >= 1 for name, y in found[0].items()
    )


def test_without_data_the_weights_count():
    @dataclass(frozen=True)
    class Fixed(Pass):
        name = "test.fixed"

        def apply(self, job):
            job.plan |= {n: from_range(-3.0, 3.0, s) for n, s in job.plan.items() if not job.graph.is_constant(n)}

    class Plugin:
        @hookimpl
        def onnxq_passes(self):
            return [Fixed]

    result = quantize(mlp(), recipe(14, before=[{"use": "test.fixed"}]), None, plugins=[Plugin()])
    assert len(told(result)["bounded"]) == 3
    assert {y.accumulator for y in audit_model(result.model).layers} == {14}
    assert all(spec.shift is None for spec in result.plan.values())


def test_white_inputs_inputs_are_blocks_of_the_identity():
    layer = load(mlp()).layers[1]
    assert white_inputs(layer, 4608).h.shape == (1, 24, 24)
    assert white_inputs(layer, 16).h.shape == (6, 4, 4) and white_inputs(layer, 16).mean.shape == (6, 4)


def test_multipliers_and_float_layers_are_left_and_told():
    model = mobilenet()
    result = quantize(model, recipe(15, 4, sub_block=2), feeds(model, 4))
    left = told(result)["left_alone"]
    assert left and all("multipliers" in why for why in left.values())
    assert any("multipliers" in note and f"left {len(left)} layer" in note for note in result.report["notes"])
    wide = {y.name for y in audit_model(result.model).layers if y.accumulator > 15}
    assert wide == set(left)
    stored = quantize(model, recipe(15), feeds(model, 4), target="storage")
    assert len(told(stored)["left_alone"]) == 8 and any("in float" in note for note in stored.report["notes"])
    only = quantize(mlp(), {**recipe(15, block=16), "activations": {"bits": 32}}, None)
    assert all("float inputs" in why for why in told(only)["left_alone"].values()) and told(only)["left_alone"]


@pytest.mark.parametrize("field", [{"bits": 8}, {"bits": 33}, {"positions": 0}, {"limit": 1}])
def test_senseless_settings_are_refused(field):
    with pytest.raises(OnnxqError, match=next(iter(field))):
        quantize(cnn(), {"pass": [{"use": "bound-accumulator", **field}]}, feeds(cnn(), 2))
