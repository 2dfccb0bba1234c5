"""Passes of onnx-ir: they compose, leave their input alone, and the float function stays where it is to stay."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, OnnxqWarning, Pass, audit_model, hookimpl
from onnxq_plugins.measure import drift
from tests.zoo import cnn, feeds, mobilenet, no_layer, resnet20, run, transformer

onnx_ir = pytest.importorskip("onnx_ir", reason="needs onnx-ir: pip install 'onnxq-plugins[ir]'")
from onnx_ir.passes import PassError, Sequential  # noqa: E402
from onnx_ir.passes.common import RemoveUnusedNodesPass  # noqa: E402

from onnxq_plugins import ir  # noqa: E402


def proto(model):
    return onnx_ir.to_proto(model)


def test_quantization_composes_with_other_passes():
    model = onnx_ir.from_proto(cnn())
    before = proto(model).SerializeToString(deterministic=True)
    step = ir.QuantizePass("int8", feeds(cnn(), 8))
    done = Sequential(RemoveUnusedNodesPass(), ir.Fuse(), step, RemoveUnusedNodesPass())(model)
    assert done.modified and audit_model(proto(done.model)).counts() == {"QLinearConv": 2, "QGemm": 1}
    assert "QLinearConv" in step.result.summary
    assert proto(model).SerializeToString(deterministic=True) == before


def test_an_error_is_ours_or_the_cause_of_a_sequences():
    step = ir.QuantizePass("int8", None)
    with pytest.raises(OnnxqError, match="data"):
        step(onnx_ir.from_proto(cnn()))
    with pytest.raises(PassError) as caught:
        Sequential(step)(onnx_ir.from_proto(cnn()))
    assert isinstance(caught.value.__cause__, OnnxqError)


@pytest.mark.parametrize("model", [cnn, mobilenet, resnet20, transformer, no_layer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["Fuse", "Centre", "Equalize", "Reorder"])
def test_rewrites_keep_the_float_function(model, name):
    model = model()
    samples = feeds(model, 8)
    step = ir.Fuse() if name == "Fuse" else getattr(ir, name)(samples)
    rewritten = proto(step(onnx_ir.from_proto(model)).model)
    assert [v.name for v in rewritten.graph.output] == [v.name for v in model.graph.output]
    assert not any(node.op_type == "DequantizeLinear" for node in rewritten.graph.node)
    for feed in samples[:2]:
        assert drift(run(model, feed), run(rewritten, feed)) < 1e-4


def test_rewrites_do_something():
    model, samples = mobilenet(), feeds(mobilenet(), 8)
    ops = [n.op_type for n in proto(ir.Fuse()(onnx_ir.from_proto(model)).model).graph.node]
    assert "BatchNormalization" not in ops

    def weights(step):
        tensors = proto(step(onnx_ir.from_proto(model)).model).graph.initializer
        return sorted(onnx.numpy_helper.to_array(t).tobytes() for t in tensors)

    plain = weights(ir.Fuse())
    for step in (ir.Equalize(samples, gain=1.0), ir.Reorder(), ir.Centre(samples, positions=1)):
        assert weights(step) != plain


def test_only_exact_rewrites():
    for name in ("round", "bias-correct"):
        with pytest.raises(OnnxqError, match="is no exact rewrite"):
            ir.RewritePass(name)
    with pytest.raises(OnnxqError, match="not a known pass"):
        ir.RewritePass("nothing")
    with pytest.raises(OnnxqError, match="unknown key 'strength'"):
        ir.Equalize(strength=3)


def test_models_come_back_as_they_were_given(tmp_path):
    model, samples = cnn(), feeds(cnn(), 8)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    program = SimpleNamespace(model_proto=model)  # as torch.onnx.export returns it
    forms = [onnx_ir.from_proto(model), program, model, model.SerializeToString(), path, str(path)]
    made = [ir.quantize(form, "int8", samples) for form in forms]
    kinds = [onnx_ir.Model, onnx_ir.Model, onnx.ModelProto, bytes, type(path), type(path)]
    assert [isinstance(one, kind) for one, kind in zip(made, kinds, strict=True)] == [True] * len(kinds)
    assert made[4] == made[5] == tmp_path / "m.quantized.onnx"
    protos = [proto(made[0]), proto(made[1]), made[2], onnx.load_from_string(made[3]), onnx.load(made[4])]
    outputs = [run(one, samples[0])[0] for one in protos]
    assert all(np.array_equal(outputs[0], one) for one in outputs[1:])


@pytest.mark.filterwarnings(f"default::{OnnxqWarning.__module__}.OnnxqWarning")
def test_what_misses_its_goal_is_no_result():
    with pytest.raises(OnnxqError, match="1000"):
        ir.quantize(cnn(), {}, feeds(cnn(), 8), min_speed=1000.0)


def test_a_guests_rewrite():
    @dataclass(frozen=True)
    class Nothing(Pass):
        name: ClassVar[str] = "guest.nothing"
        stage: ClassVar = "rewrite"

        def apply(self, job):
            return {}

    class Plugin:
        @hookimpl
        def onnxq_passes(self):
            return [Nothing]

    step = ir.RewritePass("guest.nothing", plugins=[Plugin()])
    assert proto(step(onnx_ir.from_proto(cnn())).model).graph.node
