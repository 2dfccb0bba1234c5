"""Requests for integer multipliers."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import OnnxqError
from onnxq_plugins.export import qdq
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.passes import SubLayer
from onnxq_plugins.spec import expand
from tests.jobs import make_job
from tests.zoo import Net, cnn, mlp, mobilenet

TWO_LEVEL = {"weights": {"bits": 4, "block": "tensor", "sub_block": [4, 4]}}
VECTORS = {"weights": {"bits": 4, "block": "channel", "sub_block": [1, 4]}}


def weights(seed, shape, spread=1.0):
    """Weights whose rows and columns are of different size."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=shape) * np.exp(spread * rng.normal(size=(*shape[:-1], 1)))
    return w * np.exp(spread * rng.normal(size=(*[1] * (len(shape) - 1), shape[-1])))


def asked(model, recipe):
    """The requests of all planned layers by their operator and number."""
    job = make_job(model, recipe, n=1)
    return job, {y.name: job.plan[y.weight] for y in job.graph.layers if y.weight in job.plan}


def test_eight_bit_layers_have_no_multipliers():
    job, found = asked(cnn(), {**TWO_LEVEL, "layer": [{"position": "first", "weights": {"bits": 8}}]})
    first, *rest = (found[y.name] for y in job.graph.layers)
    assert first.sub_block is None and not first.pow2 and all(spec.sub_block for spec in rest) and rest


@pytest.mark.parametrize("pow2", [False, True])
def test_layers_that_are_no_finer_divided_have_no_multipliers(pow2):
    for recipe, kept in ((VECTORS, False), (TWO_LEVEL, True)):
        job, found = asked(mobilenet(), {"weights": {**recipe["weights"], "pow2": pow2}})
        depthwise = [found[y.name] for y in job.graph.layers if y.kind == "depthwise"]
        assert depthwise and all(bool(spec.sub_block) == kept and spec.pow2 == (kept and pow2) for spec in depthwise)
        assert any(found[y.name].sub_block for y in job.graph.layers if y.kind == "dense")


def test_one_number_is_a_vector_of_inputs():
    plans = [asked(wide_mlp(), {"weights": {"bits": 4, "sub_block": sub}})[1] for sub in (16, [16], [1, 16])]
    assert all({n: s.sub_block for n, s in plan.items()} == {n: s.sub_block for n, s in plans[0].items()} for plan in plans)
    assert any(spec.sub_block and 16 in spec.sub_block for spec in plans[0].values())


def wide_mlp():
    net = Net(["N", 40])
    return net.model(net.gemm(net.op("Relu", net.gemm("x", 40, 33, trans_b=0)), 33, 7))


def test_none_in_a_rule_takes_multipliers_away():
    _, whole = asked(cnn(), TWO_LEVEL)
    _, ruled = asked(cnn(), {**TWO_LEVEL, "layer": [{"op": "Gemm", "weights": {"sub_block": "none"}}]})
    lost = {name for name in whole if whole[name].sub_block and not ruled[name].sub_block}
    assert len(lost) == 1 and "gemm" in lost.pop() and any(spec.sub_block for spec in ruled.values())


@pytest.mark.parametrize(
    ("target", "bits", "top"), [("ort-cpu-avx2", 4, 9), ("ort-cpu-avx2", 3, 21), ("ort-cpu", 4, 15), ("ort-cpu", 3, 15)]
)
def test_codes_times_multipliers_stay_within_the_target(target, bits, top):
    recipe = {"target": target, "weights": {"bits": bits, "block": "tensor", "sub_block": [4, 4], "max_multiplier": 15}}
    wide = {**recipe, "weights": {**recipe["weights"], "max_multiplier": 127}}
    for table, wanted in ((recipe, min(top, 15)), (wide, (64 if "avx2" in target else 127) // (2 ** (bits - 1) - 1))):
        job, found = asked(mlp(), table)
        assert {spec.max_multiplier for spec in found.values()} == {wanted}
        SubLayer().apply(job)
        complete(job)
        model = qdq.export(job.graph, job.plan, job.target)
        assert model.graph.node
        for layer in job.graph.layers:
            spec = job.plan[layer.weight]
            assert spec.multiplier.max() <= wanted
            assert np.abs(spec.codes * expand(spec.multiplier, layer.shape, spec.sub_block)).max() <= job.target.max_code


@pytest.mark.parametrize("top", [0, 128, -3])
@pytest.mark.parametrize("in_rule", [False, True])
def test_multipliers_out_of_range_are_refused_with_the_range(top, in_rule):
    weights_ = {"max_multiplier": top}
    with pytest.raises(OnnxqError, match=r"max_multiplier = -?\d+ is out of range; use 1\.\.127"):
        make_job(mlp(), {"layer": [{"weights": weights_}]} if in_rule else {"weights": weights_}, n=1)
