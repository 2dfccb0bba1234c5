"""What LiteRT's interpreter says of files."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.formats.tflite import write
from onnxq_plugins.runtimes.litert import LITERT
from tests.formats.quantized import Maker, lite


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def tools():
    for module in ("ai_edge_litert", "flatbuffers"):
        pytest.importorskip(module, reason="needs the extra litert")


def test_integer_fake_and_float_are_told_apart(tmp_path, tools):
    m = Maker()
    x = m.op("Conv", [m.input(noise(1, 3, 8, 8)), m.weight(noise(4, 3, 3, 3, seed=1))])
    fake = m.op("Erf", [x])
    after = m.op("Add", [fake, x])
    free = m.node("Exp", [m.input(noise(4, 4), quantized=False)])
    found = lite(m.model([after, free]), m.inputs, tmp_path)
    kinds = {}
    for each in found.operators:
        kinds.setdefault(each.op, set()).add(each.kind)
    assert kinds["CONV_2D"] == {"integer"} and kinds["ABS"] == {"fake"} and kinds["QUANTIZE"] == {"moves"}
    assert kinds["EXP"] == {"fake", "float"} and kinds["ADD"] == {"integer", "fake"}
    assert {each.where for each in found.operators if each.op == "CONV_2D"} == {"XNNPACK"}
    assert all(each.why for each in found.operators if each.kind in ("fake", "float"))
    assert found.milliseconds > 0


def test_without_samples_nothing_is_run(tmp_path, tools):
    m = Maker()
    (tmp_path / "net.tflite").write_bytes(write(m.model([m.op("Relu", [m.input(noise(2, 3))])])))
    found = LITERT.inspect(tmp_path / "net.tflite", [], {})
    assert found.outputs == () and found.milliseconds is None and found.operators


def test_a_file_without_a_signature_has_its_tensors_names(tmp_path, tools):
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    m = Maker()
    y = m.node("Relu", [m.input(noise(2, 3), quantized=False)])
    model = schema.ModelT.InitFromPackedBuf(write(m.model([y])))
    model.signatureDefs, model.metadata = None, None
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    (tmp_path / "net.tflite").write_bytes(bytes(builder.Output()))
    found = LITERT.inspect(tmp_path / "net.tflite", [m.inputs], {"seconds": 0.0})
    assert np.array_equal(found.outputs[0][y], np.maximum(m.inputs["x0"], 0))


@pytest.mark.parametrize("module", ["ai_edge_litert.interpreter", "ai_edge_litert.schema_py_generated"])
def test_a_missing_litert_is_told_with_the_command(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    m = Maker()
    model = m.model([m.node("Relu", [m.input(noise(2, 3))])])
    with pytest.raises(OnnxqError, match=r"not installed; pip install 'onnxq-plugins\[litert\]'"):
        write(model) if module.endswith("generated") else LITERT.inspect(tmp_path / "net.tflite", [], {})
