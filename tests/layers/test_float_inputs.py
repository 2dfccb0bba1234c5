"""Float inputs of weight-only layers, which onnxruntime rounds to 8 bits where that costs little."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from onnxq_plugins import measure, quantize, runtimes
from onnxq_plugins.calibration import Calibration
from onnxq_plugins.data import graph_inputs, open_data
from onnxq_plugins.job import Job
from onnxq_plugins.layers.float_inputs import keep_inputs_float
from onnxq_plugins.runtimes.onnxruntime import audit_model
from onnxq_plugins.search.quantizers import Width
from onnxq_plugins.search.widths import Widths
from tests.jobs import make_job
from tests.networks import network, weight

BLOCK = 32
LARGE = 300.0  # times the other channels, as of large language models


def recipe(bits: int = 4, **more: object) -> dict[str, object]:
    return {"weights": {"bits": bits, "block": BLOCK}, "activations": {"bits": 32}, **more}


def uneven(shape: tuple[int, int], large: float = LARGE) -> np.ndarray:
    """A weight [inputs, outputs] that makes up for a large input channel in each block."""
    values = weight(shape[::-1]).T.copy()
    values[::BLOCK] /= large
    return values


def two_layers(op: str = "MatMul", width: int = 64) -> onnx.ModelProto:
    """The first layer reads channels of very different size, the second what Tanh evened out."""
    first = uneven((width, 48))
    constants = {"w": first.T if op == "Gemm" else first, "b": (48,), "v": (48, 16)}
    inner = ("Gemm", ["x", "w", "b"], ["a"], {"transB": 1}) if op == "Gemm" else ("MatMul", ["x", "w"], ["a"], {})
    shape = ["N", width] if op == "Gemm" else ["N", 5, width]
    return network([inner, ("Tanh", ["a"], ["t"], {}), ("MatMul", ["t", "v"], ["y"], {})], shape, constants)


def samples(model: onnx.ModelProto, count: int = 8, large: float = LARGE, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shape = [d.dim_value or 4 for d in model.graph.input[0].type.tensor_type.shape.dim]
    values = rng.standard_normal((count, *shape)).astype(np.float32)
    values[..., ::BLOCK] *= large
    return [{"x": x} for x in values]


def job_of(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]], bits: int = 4) -> Job:
    job = make_job(model, recipe(bits))
    return replace(job, calibration=Calibration(job.graph, open_data(feeds, graph_inputs(job.graph))))


def both(model: onnx.ModelProto, feeds: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The output as the file says, and as onnxruntime computes it."""
    plain, optimized = (runtimes.outputs(runtimes.session(model, optimize=on), feeds)[0] for on in (False, True))
    return np.asarray(plain), np.asarray(optimized)


@pytest.mark.parametrize(("op", "bits", "width"), [("MatMul", 4, 64), ("MatMul", 8, 72), ("Gemm", 4, 72), ("Gemm", 8, 64)])
def test_inputs_of_very_different_size_stay_float(op, bits, width):
    model = two_layers(op, width)
    result = quantize(model, recipe(bits), samples(model), workers=1)
    first, second = result.report.layers
    assert first["kernel"] in ("MatMul", "FusedGemm") and second["kernel"] == "MatMulNBits"
    assert first["why_float_kind"] == "float-inputs" and "why_float" not in second
    assert any(note.startswith(f"1 weight-only layer ('{first['name']}') computes in float") for note in result.report.notes)
    assert f"stored in {bits} bits, computes float" in result.summary
    alone = quantize(model, recipe(bits, layer=[{"match": second["name"], "quantize": False}]), samples(model), workers=1)
    assert measure.sqnr(*both(alone.model, samples(model, seed=1))) > 80


@pytest.mark.parametrize("bits", [4, 8])
def test_ordinary_inputs_leave_the_kernel_as_it_is(bits):
    model = two_layers()
    result = quantize(model, recipe(bits), samples(model, large=1.0), workers=1)
    assert [row["kernel"] for row in result.report.layers] == ["MatMulNBits"] * 2
    assert sum("rounds inputs to 8 bits" in note for note in result.report.notes) == (bits == 8)  # 4 bits cost far more


def test_without_data_a_note_names_the_option():
    (note,) = [note for note in quantize(two_layers(), recipe()).report.notes if "MatMulNBits" in note]
    assert (
        note.startswith("2 weight-only layers run")
        and "without data" in note
        and "session.qdq_matmulnbits_accuracy_level" in note
    )


@pytest.mark.parametrize("width", [64, 72])
def test_predicted_noise_is_that_of_the_kernel(width):
    """The weight's codes are exact, so that rounded inputs are the only error."""
    values = np.random.default_rng(0).integers(-7, 8, (width, 24)).astype(np.float32)
    values[::BLOCK] = 7  # in each block: all scales are 1
    model = network([("MatMul", ["x", "w"], ["y"], {})], ["N", width], {"w": values})
    feeds = samples(model, 16, large=20.0)
    job = job_of(model, feeds)
    (rounding,) = job.calibration.input_rounding(job.graph.layers, BLOCK).values()
    rows = np.concatenate([feed["x"] for feed in feeds])
    np.testing.assert_allclose(rounding.power, np.square(rows, dtype=np.float64).sum(axis=0), rtol=1e-5)
    exact, rounded = both(quantize(model, recipe()).model, feeds)
    assert rounding.signal == pytest.approx(float(np.square(exact, dtype=np.float64).sum()), rel=1e-3)
    assert rounding.noise == pytest.approx(float(np.square(exact - rounded, dtype=np.float64).sum()), rel=0.02)


def test_inputs_that_may_be_rounded_beside_4_bits_may_not_beside_8():
    model = network([("MatMul", ["x", "w"], ["y"], {})], ["N", 64], {"w": uneven((64, 24), 12.0)})
    job = job_of(model, samples(model, large=12.0))
    (layer,) = job.graph.layers
    for bits, decoded in ((4, False), (8, True)):
        spec = replace(job.plan[layer.weight], bits=bits)
        marked = keep_inputs_float(job, {layer.weight: spec})[layer.weight]
        assert marked.decoded == decoded
        assert keep_inputs_float(job, {layer.weight: replace(spec, decoded=not decoded)})[layer.weight].decoded == decoded
        assert keep_inputs_float(job, {layer.weight: marked})[layer.weight] is marked


def test_inputs_that_are_not_finite_say_nothing():
    layers = [("Log", ["x"], ["a"], {}), ("MatMul", ["a", "w"], ["y"], {}), ("MatMul", ["x", "v"], ["z"], {})]
    model = network(layers, ["N", 64], {"w": (64, 24), "v": uneven((64, 24))}, outputs=("y", "z"))
    rows = quantize(model, recipe(), samples(model), workers=1).report.layers
    assert {row["name"]: row["kernel"] for row in rows} == {"matmul_1": "MatMulNBits", "matmul_2": "MatMul"}


def test_a_search_measures_what_it_ships():
    model = two_layers()
    job = job_of(model, samples(model), 8)
    widths = Widths(job, [Width(4, 8), Width(8, 8)], samples(model)[0])
    assert job.calibration.data is not None
    widths.round("nearest", job.calibration.data)
    for bits in (4, 8):
        kernels = [entry.kernel for entry in audit_model(widths.exported((Width(bits, 8),) * 2)).layers]
        assert kernels == ["MatMul", "MatMulNBits"]
    step = {"use": "mixed-precision", "candidates": ["W4A8", "W8A8"], "limit": 0.8}
    result = quantize(model, recipe(8, **{"pass": [step]}), samples(model), workers=1)
    assert result.report.layers[0]["why_float_kind"] == "float-inputs"


def test_between_integer_layers_it_computes_float_too():
    """onnxruntime would round a float weight between codes by itself, once more and per tensor."""
    constants = {"w": weight((48, 48)), "v": uneven((48, 48)), "u": weight((48, 16))}
    constants["w"][:, ::BLOCK] *= LARGE
    names = ["x", "a", "c", "y"]
    layers = [("MatMul", [x, w], [y], {}) for x, w, y in zip(names, constants, names[1:], strict=False)]
    model = network(layers, ["N", 48], constants)
    rule = {"match": "matmul_1*", "weights": {"bits": 4, "block": BLOCK}, "activations": {"bits": 32}}
    result = quantize(model, {"layer": [rule]}, samples(model, large=1.0), workers=1)
    assert [row["kernel"] for row in result.report.layers][1] == "MatMul"
    assert [entry.quantized for entry in audit_model(result.model).layers] == [True, False, True]
