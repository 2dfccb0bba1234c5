"""output-noise: more bits where they take most noise for their bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, quantize
from onnxq_plugins.passes import OutputNoise
from tests.jobs import distance, make_job
from tests.zoo import Net, feeds, mobilenet

FOUR = {"weights": {"bits": 4}}


def network():
    """Layers of 8 to 256 channels, each as noisy as the other, most of the weights in the last."""
    net, x, sizes = Net(["N", 8]), "x", (8, 32, 32, 256, 256, 4)
    for rows, columns in itertools.pairwise(sizes):
        x = net.op("Relu", net.gemm(x, rows, columns))
    return net.model(x)


def bits(share, recipe=FOUR, model=None):
    job = make_job(network() if model is None else model, recipe, n=16)
    told = OutputNoise(share=share).apply(job)
    return {layer.name: job.plan[layer.weight].bits for layer in job.graph.layers}, told, job


def test_small_layers_come_first_and_the_bytes_are_kept():
    found, told, job = bits(0.025)
    sizes = {layer.name: int(np.prod(layer.shape)) for layer in job.graph.layers}
    wide = [name for name, width in found.items() if width == 8]
    assert told["widened"] == wide and max(sizes[name] for name in wide) < max(sizes.values())
    assert 4 * sum(sizes[name] for name in wide) <= 0.025 * 8 * sum(sizes.values())
    assert told["predicted_noise"] < 0.8


def test_more_bytes_leave_less_noise_up_to_all_and_none():
    noise = [bits(share)[1]["predicted_noise"] for share in (0.0, 0.02, 0.1, 0.5)]
    assert noise[0] == 1 and noise == sorted(noise, reverse=True) and noise[-1] < 0.02
    assert set(bits(0.0)[0].values()) == {4} and set(bits(0.5)[0].values()) == {8}


def test_units_do_not_matter():
    """A layer whose outputs are a thousand times larger is not noisier."""
    model, scaled = network(), network()
    weights = [t for t in scaled.graph.initializer if len(t.dims) == 2]
    for tensor, factor in ((weights[1], 1000.0), (weights[2], 0.001)):
        tensor.raw_data = (np.frombuffer(tensor.raw_data, np.float32) * np.float32(factor)).tobytes()
    biases = [t for t in scaled.graph.initializer if len(t.dims) == 1]
    if biases:
        biases[1].raw_data = (np.frombuffer(biases[1].raw_data, np.float32) * np.float32(1000)).tobytes()
    assert list(bits(0.025, model=model)[0].values()) == list(bits(0.025, model=scaled)[0].values())


def test_rules_keep_their_bits():
    model = network()
    first = make_job(model).graph.layers[0].name
    found, _, _ = bits(0.5, {**FOUR, "layer": [{"match": first, "weights": {"bits": 4}}]})
    assert found[first] == 4 and sorted(found.values())[1:] == [8] * (len(found) - 1)


def test_outputs_gain_what_is_predicted():
    model = mobilenet()
    samples, others = feeds(model, 16), feeds(model, 24)[16:]
    one, two = (
        distance(model, quantize(model, {**FOUR, "pass": steps}, samples, workers=1), others)
        for steps in ([], [{"use": "output-noise", "share": 0.1}])
    )
    assert two > one + 0.5


def test_without_data_it_says_so():
    result = quantize(
        network(), {**FOUR, "activations": {"bits": 32}, "target": "storage", "pass": [{"use": "output-noise"}]}
    )
    assert any("output-noise was skipped" in note for note in result.report.notes)


@pytest.mark.parametrize("wrong", [{"bits": 2}, {"share": 1.5}])
def test_parameters_that_make_no_sense_are_refused(wrong):
    with pytest.raises(OnnxqError, match=next(iter(wrong))):
        quantize(network(), {"pass": [{"use": "output-noise", **wrong}]}, feeds(network(), 2))
