"""Vela's own reports of small files."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.formats.tflite import write
from onnxq_plugins.runtimes import vela
from onnxq_plugins.runtimes.vela import VELA
from tests.formats.quantized import Maker

LOG = """
Warning (supported operators) operator: QUANTIZE, ofm: 'x/quantize'
Reason: Operation has tensor with unsupported DataType Float32 (input)
Feature-map dataTypes must be one of {"INT16"}

Warning (supported operators) operator: DEQUANTIZE, ofm: 'y'
Reason: Unsupported opType

Network summary for net
"""


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def tools():
    for module in ("ai_edge_litert", "flatbuffers", "ethosu"):
        pytest.importorskip(module, reason="needs the extra ethos-u")


def file_of(folder, settings, op="Relu"):
    m = Maker()
    y = m.op("Conv", [m.input(noise(1, 3, 10, 10)), m.weight(noise(8, 3, 3, 3, seed=1)), m.constant(noise(8, seed=2))])
    y = m.op(op, [y])
    path = folder / "net.tflite"
    path.write_bytes(write(m.model([y]), settings))
    return path


def test_everything_on_the_npu(tmp_path, tools):
    found = VELA.inspect(file_of(tmp_path, {"io": "int8", "layout": "native"}), [], {})
    assert {each.where for each in found.operators} == {"NPU"}
    assert {each.kind for each in found.operators} <= {"integer", "moves"}
    assert found.facts["operators on the CPU"] == 0 and found.facts["cycles"] > 0 and found.facts["SRAM kB"] > 0
    assert found.outputs == () and found.milliseconds is None


def test_what_stays_on_the_cpu_is_told_with_vela_s_reason(tmp_path, tools):
    found = VELA.inspect(file_of(tmp_path, {}, "Erf"), [], {"accelerator": "ethos-u65-256"})
    left = {each.op: each for each in found.operators if each.where == "CPU"}
    assert left["Dequantize"].why == "Unsupported opType"
    assert "unsupported DataType Float32" in left["Exp"].why and left["Exp"].kind == "float"
    assert found.facts["operators on the CPU"] == len([e for e in found.operators if e.where == "CPU"]) > 0
    assert found.facts["accelerator"] == "Ethos_U65_256"


def test_what_vela_cannot_compile_is_one_sentence(tmp_path, tools):
    (tmp_path / "bad.tflite").write_bytes(b"nothing of the kind")
    with pytest.raises(OnnxqError, match="Vela cannot compile"):
        VELA.inspect(tmp_path / "bad.tflite", [], {})
    with pytest.raises(OnnxqError, match="ethos-u1"):
        VELA.inspect(file_of(tmp_path, {}), [], {"accelerator": "ethos-u1"})


def test_reasons_are_read_from_the_log():
    assert vela._reasons(LOG) == {
        "x/quantize": "Operation has tensor with unsupported DataType Float32: "
        'Feature-map dataTypes must be one of {"INT16"}',
        "y": "Unsupported opType",
    }


def test_a_missing_vela_is_told_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OnnxqError, match=r"Vela is not installed; pip install 'onnxq-plugins\[ethos-u\]'"):
        VELA.inspect(tmp_path / "net.tflite", [], {})
