"""Operators of other domains come from libraries that every session loads, and pass through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import onnxq_plugins as onnxq
from onnxq_plugins import parallel, runtimes
from onnxq_plugins.runtimes import custom_ops
from onnxq_plugins.testing.models import Net, cnn, run


@pytest.fixture(autouse=True)
def unregistered(monkeypatch):
    monkeypatch.setattr(custom_ops, "_libraries", [])
    monkeypatch.setattr(parallel, "_setup", [])


def parted(domain: str = "ai.onnx.contrib") -> onnx.ModelProto:
    """A network in which an operator of another domain parts values into negative and positive ones."""
    net = Net((None, 3, 8, 8))
    model = net.model(net.conv(net.op("Relu", net.conv("x", 3, 8)), 8, 4))
    node = next(n for n in model.graph.node if n.op_type == "Relu")
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8, 8, 8]) for n in ("low", node.output[0])]
    node.CopyFrom(helper.make_node("NegPos", node.input, ["low", *node.output], "part", domain=domain))
    model.graph.value_info.extend(shapes)
    model.opset_import.add(domain=domain, version=1)
    return model


def test_an_unknown_operator_is_named_with_its_domain_and_the_option(onnxq):
    onnx.save(parted("my.ops"), "m.onnx")
    np.savez("d.npz", x=np.ones((2, 3, 8, 8), np.float32))
    for command in (
        ("quantize", "m.onnx", "--data", "d.npz"),
        ("check", "int8", "m.onnx"),
        ("audit", "m.onnx"),
        ("compare", "m.onnx", "m.onnx", "--data", "d.npz"),
    ):
        code, _, err = onnxq(*command)
        assert code == 2 and err.count("\n") == 1 and "operator 'NegPos' of domain 'my.ops' is unknown" in err, err
        assert "--custom-ops" in err


def test_every_session_and_every_worker_loads_the_library(monkeypatch, tmp_path):
    loaded = []
    monkeypatch.setattr(ort.SessionOptions, "register_custom_ops_library", lambda options, path: loaded.append(path))
    small = cnn()
    library = tmp_path / "ops.so"
    library.touch()
    onnxq.register_custom_ops(library, str(library))
    assert loaded == [str(library)]  # tried once
    runtimes.session(small, threads=2)
    assert loaded == [str(library)] * 2
    monkeypatch.setattr(custom_ops, "_libraries", [])  # as in another process
    list(parallel.run_all([lambda: runtimes.session(small, threads=2)], 1))
    assert loaded == [str(library)] * 4 and custom_ops._libraries == [str(library)]


def test_what_is_no_library_is_refused(onnxq):
    Path("text.so").write_text("no library")
    for name, words in (("none.so", "do not exist"), ("text.so", "cannot be loaded")):
        code, _, err = onnxq("check", "int8", "--custom-ops", name)
        assert code == 2 and words in err and name in err


def test_unknown_operators_pass_through():
    extensions = pytest.importorskip("onnxruntime_extensions", reason="needs onnxruntime-extensions")
    onnxq.register_custom_ops(extensions.get_library_path())
    model, rng = parted(), np.random.default_rng(0)
    data = [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(8)]
    result = onnxq.quantize(model, "int8", data)
    assert [n.name for n in result.model.graph.node if n.domain == "ai.onnx.contrib"] == ["part"]
    exact, made = (np.concatenate([run(m, feed)[0] for feed in data]) for m in (model, result.model))
    assert np.square(exact).sum() > 100 * np.square(exact - made).sum()
    assert all(layer.quantized for layer in onnxq.audit_model(result.model).layers)
