"""The audit says what runs in float, and how much that is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import runtimes
from tests.zoo import cnn, feeds, mlp, mobilenet, rows, transformer

# ---- what runs in float ---------------------------------------------------------------------------------------------------


def test_products_of_two_activations_that_stay_float_are_told(onnxq):
    model = transformer()
    products = {
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and not {t.name for t in model.graph.initializer} & set(node.input)
    }
    onnx.save(model, "m.onnx")
    name = model.graph.input[0].name
    np.savez("d.npz", **{name: rows(model, 4)})
    code, out, err = onnxq("quantize", "m.onnx", "--data", "d.npz", "-o", "q.onnx")
    assert code == 0 and f"{len(products)} products of two activations stay float" in out
    assert f"products of two activations that run in float: {len(products)}, " in err and "% of the multiply-adds" in err
    _, out, _ = onnxq("audit", "q.onnx")
    assert out.count('[[layer]] op = "Attention" quantize = true') == len(products)
    Path("r.toml").write_text('[[layer]]\nop = "Attention"\nquantize = true\n')
    _, out, err = onnxq("quantize", "m.onnx", "--data", "d.npz", "-r", "r.toml", "-o", "q2.onnx")
    assert "product" not in out + err


def test_the_share_of_products_is_that_of_a_run():
    from onnxq_plugins.graph import load
    from onnxq_plugins.search.quantizers import multiply_adds, share_of_work

    model = transformer()
    graph, feed = load(model), feeds(model, 1)[0]
    products = [n for n in graph.nodes if n.op == "MatMul" and not any(graph.is_constant(t.name) for t in n.inputs)]
    layers = sum(multiply_adds(graph, feed).values())
    shown = graph.model()
    del shown.graph.output[:]
    wanted = [name for n in products for name in (n.inputs[0].name, n.outputs[0].name)]
    shown.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
    ran = dict(zip(wanted, runtimes.session(shown).run(None, feed), strict=True))
    work = sum(ran[n.inputs[0].name].shape[-1] * ran[n.outputs[0].name].size for n in products)
    assert products and share_of_work(graph, [n.name for n in products]) == pytest.approx(work / (work + layers))
    assert share_of_work(graph, []) == 0 and share_of_work(graph, ["no such node"]) is None


def test_the_share_of_products_of_unknown_rank_is_unknown():
    from onnxq_plugins.graph import load
    from onnxq_plugins.search.quantizers import share_of_work

    h = helper.make_node("Reshape", ["x", "shape"], ["h"], "reshape")
    product, layer = (helper.make_node("MatMul", *names) for names in ((["h", "h"], ["p"], "product"), (["p", "w"], ["y"])))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4]),
        helper.make_tensor_value_info("shape", TensorProto.INT64, None),
    ]
    output = helper.make_empty_tensor_value_info("y")
    output.type.tensor_type.elem_type = TensorProto.FLOAT
    weight = numpy_helper.from_array(np.ones((4, 16), np.float32), "w")
    graph = helper.make_graph([h, product, layer], "g", inputs, [output], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert share_of_work(load(model), ["product"]) is None


# ---- audit ----------------------------------------------------------------------------------------------------------------


def test_an_audit_against_another_model_is_refused(onnxq):
    onnx.save(cnn(), "m.onnx")
    onnx.save(mlp(), "other.onnx")
    code, _, err = onnxq("audit", "m.onnx", "--against", "other.onnx")
    assert code == 2 and "give the float model that this one was made from" in err and "check that" not in err
    code, _, err = onnxq("audit", "m.onnx", "--runtime", "openvino", "--against", "m.onnx")
    assert code == 2 and "leave them out beside --runtime openvino" in err


def test_shifts_for_other_targets_are_not_blamed(onnxq):
    model = mobilenet()
    for t in model.graph.initializer:  # channels of unequal ranges, so that there is something to shift
        if len(t.dims) == 4:
            w = onnx.numpy_helper.to_array(t)
            t.CopyFrom(
                onnx.numpy_helper.from_array(
                    (w * np.geomspace(1, 0.01, len(w)).reshape(-1, 1, 1, 1)).astype(np.float32), t.name
                )
            )
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=rows(model, 8))
    Path("r.toml").write_text('target = "per-tensor"\n[weights]\nblock = "tensor"\n[[pass]]\nuse = "shift-equalize"\n')
    code, out, _ = onnxq("quantize", "m.onnx", "-r", "r.toml", "--data", "d.npz", "-o", "q.onnx")
    convs = sum(n.op_type == "Conv" for n in model.graph.node)
    assert code == 0 and f"{convs}/{convs} Conv" in out and " quantized for per-tensor; " in out
    assert "run in float in onnxruntime" in out
    _, out, _ = onnxq("audit", "q.onnx")
    assert "shifts its channels, as target per-tensor needs" in out and "is read in float by" not in out


def test_what_to_change_comes_first_and_the_profile_says_its_shapes(onnxq, monkeypatch):
    from onnxq_plugins.cli import audit

    model = cnn()
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=rows(model, 8))
    code, *_ = onnxq("quantize", "m.onnx", "--data", "d.npz", "-o", "q.onnx", "--no-check")
    assert code == 0
    asked = []
    monkeypatch.setattr(audit, "what_to_change", lambda found, placed: asked.append(placed) or ("this", "that"))
    code, out, _ = onnxq("audit", "q.onnx", "--against", "m.onnx")
    assert code == 0 and out.startswith("what to change:\n1. this\n2. that\n")
    shapes = f"x {[d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]}"
    assert f"where the time goes, on {shapes}" in out and out.rstrip().endswith(f"timed on {shapes}")
    assert "QLinearConv" in out.partition("where the time goes")[2] and "quantized: " in out and "float kernels" in out
    code, out, _ = onnxq("audit", "m.onnx", "--data", "d.npz")
    assert code == 0 and "where the time goes" in out and "float kernels" not in out
    assert asked == [True, None]  # the recipe in the file tells
    monkeypatch.setattr(audit, "what_to_change", lambda *_: ())
    _, out, _ = onnxq("audit", "q.onnx")
    assert "what to change" not in out and "where the time goes" not in out
