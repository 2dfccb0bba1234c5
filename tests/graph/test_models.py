"""What a float model may be passed as: to `load`, `quantize` and `auto` alike."""

from __future__ import annotations

import io
import sys
from types import ModuleType

import onnx
import pytest

import onnxq_plugins as onnxq
from onnxq_plugins.testing.models import cnn, feeds

MODEL = cnn()


class Program:  # as torch's ONNXProgram
    model_proto = MODEL


def intermediate(monkeypatch) -> object:
    """An object as onnx_ir's Model, and a module that converts it."""
    module = ModuleType("onnx_ir")
    kind = type("Model", (), {"__module__": "onnx_ir._core"})
    monkeypatch.setattr(module, "to_proto", lambda model: MODEL if isinstance(model, kind) else None, raising=False)
    monkeypatch.setitem(sys.modules, "onnx_ir", module)
    return kind()


def test_models_of_every_kind_are_the_same_model(monkeypatch, tmp_path):
    onnx.save(MODEL, tmp_path / "m.onnx")
    expected = onnxq.load(MODEL).model().graph
    content = MODEL.SerializeToString()
    for model in (
        tmp_path / "m.onnx",
        str(tmp_path / "m.onnx"),
        content,
        bytearray(content),
        Program(),
        intermediate(monkeypatch),
    ):
        assert onnxq.load(model).model().graph == expected
    result = onnxq.quantize(content, "int8", feeds(MODEL, 4))
    assert result.original == MODEL and onnxq.quantize(Program(), "int8", feeds(MODEL, 4)).original == MODEL
    assert not onnxq.auto(content, feeds(MODEL, 4), recipes=["int8"]).trials[0].why


@pytest.mark.parametrize(
    "wrong", [None, MODEL.graph, io.BytesIO(), 3, [MODEL], b"", b"no model"], ids=lambda x: type(x).__name__
)
def test_what_is_no_model_is_refused_with_what_to_give(wrong):
    for call in (
        lambda: onnxq.load(wrong),
        lambda: onnxq.quantize(wrong, "int8", feeds(MODEL, 1)),
        lambda: onnxq.auto(wrong, feeds(MODEL, 1), recipes=["int8"]),
    ):
        with pytest.raises(onnxq.OnnxqError, match=r"; give the .*\.onnx file") as error:
            call()
        assert isinstance(wrong, bytes) or f"type {type(wrong).__name__} " in str(error.value)
