"""What tests of single rooms run on: jobs without an engine, and tensors of models."""

from __future__ import annotations

import numpy as np
import onnx

from onnxq_plugins import measure, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import graph_inputs, open_data
from onnxq_plugins.graph import load
from onnxq_plugins.job import Job, Outcome, Report
from onnxq_plugins.plan import requests
from onnxq_plugins.plugins import find_plugins
from tests.zoo import feeds

LAYERED = [
    "cnn",
    "mobilenet",
    "grouped",
    "inception",
    "mlp",
    "transformer",
    "written_out",
    "conv1d",
    "no_bias",
    "dead_channels",
    "odd_channels",
    "shared_weights",
    "control_flow",
    "prelu",
    "resnet20",
]


def make_job(model: onnx.ModelProto, recipe: dict | None = None, n: int = 6, workers: int = 1) -> Job:
    """What the first pass of a recipe receives: a plan of requests, and statistics of `n` random samples."""
    plugins = find_plugins()
    loaded = plugins.recipe(recipe or {})
    target = plugins.target(loaded.target)
    graph = load(model, flatten=target.flatten)
    request = requests.request(graph, loaded, target)
    calibration = Calibration(graph, open_data(feeds(model, n), graph_inputs(graph)), workers=workers)
    report = Report(floats=dict(request.floats))
    return Job(graph, request.plan, calibration, target, loaded, np.random.default_rng(0), workers, report)


def distance(model: onnx.ModelProto, result: Outcome, samples: list) -> float:
    """dB between a model and what was made of it, the mean over the outputs."""
    reference, outputs = (runtimes.outputs(runtimes.session(m), samples) for m in (model, result.model))
    return float(np.mean([measure.sqnr(a, b) for a, b in zip(reference, outputs, strict=True)]))


def fetch(model: onnx.ModelProto, name: str, samples: list) -> list[np.ndarray]:
    """A tensor of every sample; the model runs as written, so that nothing is fused away."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    if name not in {i.name for i in model.graph.input}:
        del model.graph.output[:]
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        runner = runtimes.session(model, optimize=False)
        return [runner.run(None, s)[0] for s in samples]
    return [s[name] for s in samples]
