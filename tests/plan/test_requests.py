"""Requests of layers at the width of the recipe and at others."""

from __future__ import annotations

import pytest

from onnxq_plugins import OnnxqError, load, measure, quantize, runtimes
from onnxq_plugins.plan import requests
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.targets import BUILTIN as TARGETS
from onnxq_plugins.targets.npu import NPU
from onnxq_plugins.targets.ort_cpu import ORT_CPU, ORT_CPU_AVX2
from tests.zoo import ZOO, feeds, mobilenet


def recipe_of(values):
    return load_recipe(values, find_plugins().passes, ())


RECIPES = (
    {},
    {"weights": {"bits": 4, "block": "tensor"}},
    {
        "weights": {"bits": 4, "sub_block": 16},
        "layer": [{"position": "first", "weights": {"bits": 8}}, {"match": "conv3", "weights": {"block": "tensor"}}],
    },
    {"weights": {"bits": 4, "block": 32}, "activations": {"bits": 32}},
)


@pytest.mark.parametrize("target", [ORT_CPU, ORT_CPU_AVX2, NPU], ids=lambda t: t.name)
@pytest.mark.parametrize("values", RECIPES)
@pytest.mark.parametrize("name", ["mobilenet", "transformer", "mlp"])
def test_a_request_at_the_width_of_the_recipe_is_that_of_the_plan(name, values, target):
    graph = load(ZOO[name]())
    recipe = recipe_of({k: v for k, v in values.items() if k != "layer" or name == "mobilenet"})
    plan = requests.request(graph, recipe, target).plan
    for i, layer in enumerate(graph.layers):
        if layer.weight in plan:
            stored = plan[layer.weight].decoded  # the target has no kernel for it: 8 bits
            bits = 8 if stored or (i == 0 and recipe.layers) else recipe.weights.bits
            made = requests.weight_request(graph, recipe, target, layer, bits)
            assert made.to_dict() == plan[layer.weight].to_dict()


def test_multipliers_follow_the_width():
    graph = load(mobilenet())
    recipe = recipe_of({"weights": {"bits": 4, "sub_block": 16, "max_multiplier": 127}})
    layer = next(y for y in graph.layers if y.shape[1] > 16)
    made = {bits: requests.weight_request(graph, recipe, ORT_CPU, layer, bits) for bits in range(2, 9)}
    assert {bits: spec.bits for bits, spec in made.items()} == {bits: bits for bits in range(2, 9)}
    assert [made[bits].max_multiplier for bits in (2, 3, 4, 5, 6)] == [127, 42, 18, 8, 4]
    assert made[7].sub_block == made[4].sub_block is not None
    assert made[8].sub_block is None and made[8].block == made[4].block
    narrow = requests.weight_request(graph, recipe, ORT_CPU_AVX2, layer, 4)
    assert narrow.max_multiplier == 9  # 9 * 7 = 63
    assert requests.weight_request(graph, recipe, ORT_CPU_AVX2, layer, 8).bits == 7
    assert requests.weight_request(graph, recipe_of({"activations": {"bits": 32}}), ORT_CPU_AVX2, layer, 8).bits == 8


def test_a_block_that_does_not_fit_is_told():
    graph = load(mobilenet())
    with pytest.raises(OnnxqError, match="block"):
        requests.weight_request(graph, recipe_of({"weights": {"block": [1, 2, 3]}}), ORT_CPU, graph.layers[0], 4)


@pytest.mark.parametrize("target", [t for t in TARGETS if t.integer and t.decodes], ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["cnn", "mobilenet", "resnet20", "transformer"])
def test_weights_without_a_weight_only_kernel_are_stored_and_decoded(name, target):
    """A weight-only recipe makes every model smaller, or says why not."""
    model = ZOO[name]()
    result = quantize(model, {"activations": {"bits": 32}, "weights": {"block": 32}}, None, target=target.name, check=False)
    for layer in result.graph.layers:
        kernel = any(rule.op == layer.op and not rule.activations for rule in target.rules)
        spec = result.plan[layer.weight]
        assert kernel or (spec.decoded and spec.bits == 8)
        assert kernel or result.report.floats[layer.name].kind == "weight-only"
    assert result.report.size("quantized") < result.report.size("float") * 0.7
    feed = feeds(model, 4)
    reference, outputs = (runtimes.outputs(runtimes.session(m), feed)[0] for m in (model, result.model))
    assert measure.sqnr(reference, outputs) > 35
