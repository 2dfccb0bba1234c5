"""What a job answers to a pass, and changes for it."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins import channel_groups, runtimes
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import request
from tests.jobs import LAYERED, make_job
from tests.zoo import ZOO, cnn, feeds, mobilenet, transformer


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("bits", [8, 4])
def test_requests_for_layers_are_those_of_the_first_plan(name, bits):
    job = make_job(ZOO[name](), {"weights": {"bits": bits, "sub_block": [1, 8]}})
    first = request(job.graph, job.recipe, job.target).plan
    for layer in job.graph.layers:
        asked, planned = job.request_for(layer), first.get(layer.weight)
        if planned is not None and layer.op != "ConvTranspose":
            assert asked is not None and asked.to_dict() == planned.to_dict()
        assert job.input_of(layer) == Planned.of(job).input(layer)


def test_rules_for_layers_count():
    names = [layer.name for layer in make_job(cnn()).graph.layers]
    rules = [
        {"match": names[1], "weights": {"bits": 4}},
        {"position": "last", "quantize": False},
        {"position": "first", "weights": {"block": "tensor"}},
    ]
    job = make_job(cnn(), {"layer": rules})
    first, second, *_, last = job.graph.layers
    assert job.request_for(first).block is None and job.request_for(second).bits == 4 and job.request_for(last) is None
    assert job.request_for(second, bits=2).bits == 2


def test_readers_are_seen_through_what_moves_values_in_the_order_of_the_graph():
    job = make_job(transformer())
    order = [str(node.name) for node in job.graph.nodes]
    for layer in job.graph.layers:
        names = job.readers(layer.result)
        assert names == sorted(names, key=order.index)
        assert not any(job.graph.is_shape_only(n) for n in job.graph.nodes if n.name in names)


def run(job, n=2, model=None):
    weights = {}
    return runtimes.outputs(runtimes.session(job.graph.model(weights), weights=weights), feeds(model or mobilenet(), n))


def test_a_sum_and_a_split_keep_the_function_and_the_request():
    job = make_job(mobilenet())
    before = run(job)
    layer = next(y for y in job.graph.layers if y.kind == "dense" and y.op == "Conv")
    weight, spec = job.graph.constant(layer.weight), job.plan[layer.weight]
    half = (weight / 2).astype(np.float32)
    first, second = job.replace_with_sum(layer, [half, weight - half])
    assert layer.weight not in job.plan
    assert all(job.plan[part.weight].to_dict() == spec.to_dict() for part in (first, second))
    channels = np.arange(first.channels)
    parts = job.split(first, [channels[:3], channels[3:]])
    assert all(part.weight in job.plan for part in parts) and first.weight not in job.plan
    job.drop_unused()
    np.testing.assert_allclose(run(job)[0], before[0], rtol=1e-4, atol=1e-5)


def test_channels_are_rescaled():
    job = make_job(cnn())
    before = run(job, model=cnn())
    group = channel_groups(job.graph, "rescale")[0]
    touched = job.graph.constant(group.weights[0].tensor).copy()
    job.rescale(group, np.linspace(0.5, 2, group.size))
    after = run(job, model=cnn())
    assert not np.array_equal(touched, job.graph.constant(group.weights[0].tensor))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-4, atol=1e-5)


def test_what_is_dropped_leaves_the_plan():
    job = make_job(cnn())
    layer = job.graph.layers[0]
    node = job.graph.producer(layer.output)
    after = job.graph.consumers(layer.result)[0]
    job.graph.set_input(after, 0, job.graph.inputs[0])
    assert node is not None and layer.weight in job.plan
    job.drop_unused()
    assert layer.weight not in job.graph and layer.weight not in job.plan and layer.result not in job.plan
