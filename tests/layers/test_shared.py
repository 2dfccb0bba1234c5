"""Weights that layers share: solved once, and shared in the result."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import quantize
from onnxq_plugins.layers.problem import Problem, solvable
from onnxq_plugins.layers.shared import _USES, joint_gram, shared_weights
from onnxq_plugins.runtimes.onnxruntime import audit_model
from tests.jobs import make_job
from tests.zoo import Net, feeds, run

STEPS = 12


def unrolled(steps: int = STEPS):
    """h <- tanh(W h + x), written out."""
    net = Net(["N", 16])
    weight, bias, h = net.weight(16, 16, fan_in=16), net.weight(16), "x"
    for _ in range(steps):
        h = net.op("Tanh", net.op("Add", net.op("Gemm", h, weight, bias, transB=1), "x"))
    return net.model(net.gemm(h, 16, 5))


def test_equal_weights_that_are_planned_alike_are_found():
    job = make_job(unrolled())
    layers = solvable(job)
    assert shared_weights(job, layers) == [layers[:STEPS]]
    job.graph.set_constant(layers[3].weight, 2 * job.graph.constant(layers[3].weight))
    assert shared_weights(job, layers) == [[*layers[:3], *layers[4:STEPS]]]


def test_the_joint_gram_is_the_mean_of_some_as_large_as_one():
    job = make_job(unrolled())
    layers = solvable(job)[:STEPS]
    found = joint_gram(job, layers, 256, 4608)
    used = [layers[n * STEPS // _USES] for n in range(_USES)]
    grams = job.calibration.grams(used)
    np.testing.assert_allclose(found.h, np.mean([grams[y.name].h for y in used], axis=0))
    np.testing.assert_allclose(found.mean, np.mean([grams[y.name].mean for y in used], axis=0))


@pytest.mark.parametrize("sequential", [True, False])
def test_shared_weights_are_solved_once_and_stay_shared(sequential, monkeypatch):
    solved = []
    solve = Problem.solve
    monkeypatch.setattr(Problem, "solve", lambda one, *a: solved.append(one.layer.name) or solve(one, *a))
    model = unrolled()
    step = {"use": "round", "method": "gptq", "sequential": sequential}
    result = quantize(model, {"weights": {"bits": 4}, "pass": [step]}, feeds(model, 16), workers=1)
    assert len(solved) == 2
    specs = [result.plan[y.weight] for y in result.graph.layers[:STEPS]]
    assert all(np.array_equal(spec.codes, specs[0].codes) and np.array_equal(spec.scale, specs[0].scale) for spec in specs)
    stored = [t for t in result.model.graph.initializer if list(t.dims) == [16, 16]]
    assert len(stored) == 1
    assert all(np.isfinite(y).all() for y in run(result.model, feeds(model, 1)[0]))


def test_blocked_codes_that_layers_share_are_decoded_once_at_load():
    net = Net(["N", 64])
    weight, h = net.weight(64, 64, fan_in=64), "x"
    for _ in range(4):
        h = net.op("Tanh", net.op("MatMul", h, weight))
    model = net.model(net.op("MatMul", h, net.weight(64, 32, fan_in=64)))
    result = quantize(model, "int4-weight-only", feeds(model, 8), settings={"round.seconds": 0})
    kernels = [layer.kernel for layer in audit_model(result.model).layers]
    assert kernels.count("MatMulNBits") == 1 and len(kernels) == 5
    assert sum(n.op_type == "DequantizeLinear" for n in result.model.graph.node) == 1
    assert sum("layers share" in note for note in result.report.notes) == 1
