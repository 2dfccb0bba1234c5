"""Ensembles of an expansion: the networks are what their weights say, what is refused, what is told."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, audit_model, measure, quantize
from onnxq_plugins.graph import load
from onnxq_plugins.passes import ResidualEnsemble
from onnxq_plugins.plan.values import bias_scale
from onnxq_plugins.solvers import expansion as solver
from onnxq_plugins.spec import QuantSpec
from tests.zoo import ZOO, Net, cnn, conv_transpose, feeds, mlp, resnet20, run, some, transformer


def recipe(groups=(2, 2), bits=4, **more):
    return {
        "weights": {"bits": bits},
        "pass": [{"use": "residual-ensemble", "groups": list(groups)}, {"use": "ranges"}],
        **more,
    }


def told(made):
    return next(step["result"] for step in made.report["steps"] if step["pass"] == "residual-ensemble")


@pytest.mark.parametrize(
    ("name", "groups"),
    some(
        itertools.product(["cnn", "mobilenet", "mlp", "inception", "resnet20", "prelu"], [(2, 2), (1, 1, 1)]),
        *[("mobilenet", (2, 2)), ("mlp", (1, 1, 1)), ("inception", (1, 1, 1)), ("prelu", (2, 2))],
    ),
)
def test_networks_run_as_integer_and_their_weights_are_orders(name, groups):
    model, samples = ZOO[name](), feeds(ZOO[name](), 4)
    result = quantize(model, recipe(groups), samples)
    json.dumps(result.report)
    count, graph = len(load(model).layers), load(model)
    assert told(result)["networks"] == len(groups) and told(result)["layers"] == count and not told(result)["left_alone"]
    kernels = [entry for entry in audit_model(result.model).layers if entry.constant_weight]
    assert len(kernels) == count * len(groups) and all(entry.quantized for entry in kernels)
    orders = 0
    for n, size in enumerate(groups):
        orders += size
        for layer in graph.layers:
            names = [layer.weight, *(f"{layer.weight}_net{m + 1}" for m in range(1, n + 1))]
            weight = graph.constant(layer.weight)
            left = np.abs(weight - solver.value([result.plan[name] for name in names]))
            bound = solver.bound(weight, [QuantSpec(4, block=result.plan[layer.weight].block)] * orders, np.array(orders))
            assert (left <= bound * (1 + 1e-4) + 1e-6 * np.abs(weight).max()).all()
    float_weights = {y.weight: result.graph.constant(y.weight) for y in result.graph.layers}
    for layer in graph.layers:
        parts = [float_weights[name] for name in float_weights if name.split("_net")[0] == layer.weight]
        np.testing.assert_allclose(np.sum(parts, axis=0), graph.constant(layer.weight), atol=1e-5)


def test_its_own_error_is_told():
    model, samples = resnet20(), feeds(resnet20(), 6)
    result = quantize(model, recipe((1, 1)), samples)
    own = measure.sqnr([run(model, f)[0] for f in samples], [run(result.float_model, f)[0] for f in samples])
    assert told(result)["ensemble_db"] == pytest.approx(own, abs=0.01) and told(result)["samples"] == 6
    (note,) = [n for n in result.report["notes"] if "residual-ensemble" in n]
    assert f"reaches {own:.1f} dB" in note and result.report["steps"][0]["exact"] is False
    better = quantize(model, recipe((2, 2)), samples)
    assert told(better)["ensemble_db"] > own + 10
    blind = quantize(
        model,
        {"weights": {"bits": 4}, "target": "storage", "activations": {"bits": 32}, "pass": [{"use": "residual-ensemble"}]},
    )
    assert "ensemble_db" not in told(blind) and any(
        "its own error could not be measured" in n for n in blind.report["notes"]
    )


def test_scales_whose_product_underflows():
    """Each further network is so much smaller than the one before that products of its scales would be 0 in the end."""
    net = Net(["N", 16])
    graph = load(net.model(net.gemm("x", 16, 4)))
    tiny = QuantSpec(scale=np.array(1e-30, np.float32), zero_point=np.array(0))
    assert bias_scale(graph.layers[0], tiny, tiny) > 0


def test_layers_that_do_not_fold_are_the_same_in_every_network():
    model, samples = mlp(), feeds(mlp(), 4)
    result = quantize(model, recipe(layer=[{"position": "last", "weights": {"bits": 8}}]), samples)
    (reason,) = told(result)["left_alone"].values()
    assert "do not fold" in reason and told(result)["layers"] == 2
    last = result.graph.layers[-1].name.partition("_net")[0]
    same = [result.plan[y.weight] for y in result.graph.layers if y.name.startswith(last)]
    assert len(same) == 2 and np.array_equal(same[0].codes, same[1].codes)
    steps = [{"use": "vector-scale"}, {"use": "residual-ensemble"}]
    solved = quantize(model, {"weights": {"bits": 4}, "pass": steps}, samples)
    assert told(solved)["networks"] == 1 and all("solved" in why for why in told(solved)["left_alone"].values())
    assert any("still one network" in n for n in solved.report["notes"])


def test_a_softmax_at_the_end_stays_behind_the_sum():
    net = Net(["N", 3, 8, 8])
    x = net.op("Relu", net.conv("x", 3, 8))
    model = net.model(net.op("Softmax", net.head(x, 8), axis=-1))
    result = quantize(model, recipe(), feeds(model, 4))
    ops = [n.op_type for n in result.model.graph.node]
    assert ops.count("Softmax") == 1
    for f in feeds(model, 2):
        assert run(result.model, f)[0].sum() == pytest.approx(1, abs=1e-5)


def test_further_passes_serve_every_network():
    model, samples = conv_transpose(), feeds(conv_transpose(), 4)
    steps = [{"use": "ranges"}, {"use": "residual-ensemble", "groups": [1, 1]}, {"use": "bias-correct"}]
    result = quantize(model, {"weights": {"bits": 4}, "pass": steps}, samples)
    shifted = {name for name, spec in result.plan.items() if spec.shift is not None and np.abs(spec.shift).max() > 1e-7}
    last = {y.weight for y in result.graph.layers if y.name.endswith("_net2") and y.weight in result.plan and y.op == "Conv"}
    assert shifted == last  # the first network lies on its grid


def test_other_operators_are_refused_in_one_sentence():
    model = transformer()
    with pytest.raises(OnnxqError, match=r"LayerNormalization '.*' of a sum.*use residual-expansion"):
        quantize(model, recipe(), feeds(model, 2))
    assert quantize(cnn(), recipe(), feeds(cnn(), 2)).model.graph.node


@pytest.mark.parametrize(
    ("given", "why"), [({"groups": (2,)}, "groups"), ({"groups": (1, 0)}, "groups"), ({"samples": -1}, "samples")]
)
def test_parameters_are_checked(given, why):
    with pytest.raises(ValueError, match=why):
        replace(ResidualEnsemble(), **given)
