"""The bytes of a model: short names, nothing twice, nothing that follows from the rest; and that nothing else changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxq_plugins import OnnxqError, Result, audit_model, quantize, runtimes
from onnxq_plugins.export.compact import alike, compact
from onnxq_plugins.graph.bodies import all_graphs
from onnxq_plugins.report.diagnosis import diagnose
from tests.test_branches import branching, samples
from tests.zoo import ZOO, Net, cnn, examples, feeds, mobilenet, run, shared_weights, some

CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
LONG = "/backbone/features/0/conv/Conv_output_0"


def both(model: onnx.ModelProto, recipe="int8", n: int = 6, **options) -> tuple[Result, Result]:
    """A result with short names, and one that keeps the user's."""
    given = options.pop("data", None) or feeds(model, n)
    first, second = (quantize(model, recipe, given, workers=1, names=names, **options) for names in ("short", "keep"))
    return first, second


def tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all tensors and constants, in bodies, too."""
    return {
        name
        for part in all_graphs(model.graph)
        for name in (
            *(n for node in part.node for n in (*node.input, *node.output)),
            *(each.name for each in (*part.input, *part.output, *part.initializer, *part.value_info)),
        )
        if name
    }


def ports(model: onnx.ModelProto) -> set[str]:
    return {value.name for value in (*model.graph.input, *model.graph.output)}


def kernels(model: onnx.ModelProto, folder: Path) -> Counter:
    """The operators of onnxruntime's optimized graph with their attributes."""
    runtimes.session(model, dump=folder / "optimized.onnx")
    nodes = onnx.load(str(folder / "optimized.onnx")).graph.node
    plain = (n for n in nodes if n.op_type != "If")  # its bodies hold names
    return Counter((n.op_type, *sorted(a.SerializeToString() for a in n.attribute)) for n in plain)


# ---- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(sorted(ZOO), "mobilenet", "transformer", "control_flow", "shared_weights"))
def test_only_names_differ(name, tmp_path):
    model = ZOO[name]()
    short, keep = both(model)
    feed = feeds(model, 1, seed=1)[0]
    for optimize in (True, False):
        runners = [runtimes.session(result.model, optimize=optimize) for result in (short, keep)]
        for a, b in zip(*(runner.run(None, feed) for runner in runners), strict=True):
            np.testing.assert_array_equal(a, b)
    assert kernels(short.model, tmp_path) == kernels(keep.model, tmp_path)
    assert [vars(row) for row in audit_model(short.model).layers] == [vars(row) for row in audit_model(keep.model).layers]
    assert short.summary.split(" | ")[0] == keep.summary.split(" | ")[0]
    assert short.report.size("quantized") == short.model.ByteSize() < keep.model.ByteSize()
    assert alike(short.model, keep.model)


@pytest.mark.parametrize("make", [mobilenet, branching], ids=["mobilenet", "branching"])
def test_tensors_are_short_and_the_users_operators_keep_their_names(make):
    model = make()
    short, keep = both(model, data=samples(8) if make is branching else None)
    inner = tensors(short.model) - ports(short.model)
    assert max(map(len, inner)) <= 2
    assert ports(short.model) == ports(keep.model) == ports(model)
    names = [node.name for node in short.model.graph.node if node.name]
    assert len(names) == len(set(names))
    assert {n.name for n in model.graph.node} & {n.name for n in keep.model.graph.node} <= set(names)
    assert not any(n.name for part in all_graphs(short.model.graph) for n in part.node if n.op_type in CONVERSIONS)
    onnx.checker.check_model(short.model, full_check=True)


def test_layers_in_branches_keep_their_names():
    short, keep = both(branching(), data=samples(8))
    assert {row["inside"] for row in short.report.layers if "inside" in row}
    assert [row["name"] for row in short.report.layers] == [row["name"] for row in keep.report.layers]
    assert [y.name for y in audit_model(short.model).layers] == [y.name for y in audit_model(keep.model).layers]


def test_kept_names_are_those_of_the_user():
    model = mobilenet()
    kept = both(model)[1].model
    written = {o for n in model.graph.node for o in n.output}
    assert len(written & tensors(kept)) > len(written) // 2
    assert kept.graph.value_info == [] or {v.name for v in kept.graph.value_info} <= tensors(kept)


def test_a_result_knows_what_its_tensors_are_called():
    model = mobilenet()
    short, keep = both(model)
    assert not keep.names
    makers = {o: n for n in short.model.graph.node for o in n.output}
    for layer in short.graph.layers:
        if layer.output not in ports(model):
            assert makers[short.names[layer.output]].name == layer.name
    assert set(short.names.values()) <= tensors(short.model) - ports(model)


@pytest.mark.parametrize("name", ["mobilenet", "transformer"])
def test_a_diagnosis_is_about_the_users_tensors(name):
    first, second = (diagnose(result, samples=2).to_dict() for result in both(ZOO[name]()))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_an_unknown_choice_is_refused():
    with pytest.raises(OnnxqError, match=r"names = 'long' is unknown.*short"):
        quantize(cnn(), "int8", feeds(cnn(), 2), names="long")


POOL = ["a", "b", "c", "A", "Z", "aa", "a0", "x", "y", "0", "if", LONG, f"{LONG}_quantized", "b_scale", "a b", "é"]


@given(st.permutations(POOL), st.booleans())
@examples(50)
def test_any_names_can_be_replaced(names, yes):
    """Also by those that other tensors have, and those that bodies read from outside or define themselves."""
    x, h, y, w, bias, decided, body_h, body_c, other_h, one, two = names[:11]
    graphs = [
        helper.make_graph(
            [helper.make_node("Mul", [h, body_c], [mid], "m"), helper.make_node(op, [mid, bias], [out], "n")],
            "body",
            [],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.float32(3), body_c)],
        )
        for op, mid, out in (("Add", body_h, one), ("Sub", other_h, two))
    ]
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", [x, w], [h], "first"),
                helper.make_node("If", [decided], [y], "choice", then_branch=graphs[0], else_branch=graphs[1]),
            ],
            "g",
            [helper.make_tensor_value_info(x, TensorProto.FLOAT, [2, 4])],
            [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
            [
                numpy_helper.from_array(np.arange(16, dtype=np.float32).reshape(4, 4), w),
                numpy_helper.from_array(np.float32([1, 2, 3, 4]), bias),
                numpy_helper.from_array(np.array(yes), decided),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    feed = {x: np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}
    wanted = run(model, feed)
    shown = compact(model, {"first", "choice"})
    assert {x, y} & set(shown) == set() and len(set(shown.values()) | {x, y}) == len(shown) + 2
    assert all(len(name) <= 2 for name in tensors(model) - {x, y})
    assert [n.name for n in model.graph.node] == ["first", "choice"]
    for a, b in zip(wanted, run(model, feed), strict=True):
        np.testing.assert_array_equal(a, b)
    before = model.SerializeToString(deterministic=True)
    compact(model, {"first", "choice"})
    assert model.SerializeToString(deterministic=True) == before


# ---- constants ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["short", "keep"])
@pytest.mark.parametrize("name", some(sorted(ZOO), "mobilenet", "transformer", "shared_weights"))
def test_no_constant_is_there_twice(name, names):
    model = ZOO[name]()
    made = quantize(model, "int8", feeds(model, 4), workers=1, names=names).model
    contents = [(t.data_type, tuple(t.dims), numpy_helper.to_array(t).tobytes()) for t in made.graph.initializer]
    assert len(contents) == len(set(contents))
    assert {t.name for t in made.graph.initializer} <= {i for n in made.graph.node for i in n.input} | ports(made)


def test_a_constant_that_a_body_reads_is_shared_too():
    model = branching()
    bias = next(t for t in model.graph.initializer if t.name == "bias")
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(bias), "twin"))
    model.graph.node.insert(0, helper.make_node("Identity", ["twin"], ["echo"], "echo"))
    model.graph.output.append(helper.make_tensor_value_info("echo", TensorProto.FLOAT, None))
    constants = sorted(model.graph.initializer, key=lambda t: t.name != "twin")  # that of the bodies is the second
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    feed = samples(1)[0]
    wanted = run(model, feed)
    compact(model, ())
    assert sum(list(t.dims) == [48] for t in model.graph.initializer) == 1
    for a, b in zip(wanted, run(model, feed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_constants_that_are_inputs_or_outputs_stay():
    net = Net(["N", 8])
    same = np.ones(8, np.float32)
    y = net.op("Add", net.op("Mul", "x", "k"), "default")
    net.constants += [numpy_helper.from_array(same, name) for name in ("k", "default", "out")]
    model = net.model(y)
    model.graph.input.append(helper.make_tensor_value_info("default", TensorProto.FLOAT, [8]))
    model.graph.output.append(helper.make_tensor_value_info("out", TensorProto.FLOAT, [8]))
    compact(model, ())
    assert {"default", "out"} < {t.name for t in model.graph.initializer}
    feed = {"x": np.ones((2, 8), np.float32), "default": 5 * same}
    values = dict(zip([o.name for o in model.graph.output], run(model, feed), strict=True))
    np.testing.assert_array_equal(values["out"], same)
    np.testing.assert_array_equal(values[y], np.full((2, 8), 6, np.float32))


@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_scales_of_biases_are_computed_where_the_runtime_folds_them(target):
    net = Net(["N", 3, 8, 8])
    small = net.op("Relu", net.conv("x", 3, 4))  # 4 scales take less than an operator
    model = net.model(net.head(net.op("Relu", net.conv(small, 4, 24)), 24, 12))
    made = quantize(model, "int8", feeds(model, 4), target=target, workers=1).model
    values = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    makers = {o: n for n in made.graph.node for o in n.output}
    biases = [makers[n.input[2]] for n in made.graph.node if n.op_type in ("Conv", "Gemm")]
    computed = {values[b.input[0]].size: makers[b.input[1]].op_type for b in biases if b.input[1] in makers}
    assert computed == ({24: "Mul", 12: "Mul"} if target == "ort-cpu" else {})


def test_plain_int8_has_no_codes_of_4_bits():
    """Channels whose codes are small by chance stay with the others, also in a model of a new opset."""
    model = mobilenet(opset=21)
    weight = next(t for t in model.graph.initializer if list(t.dims) == [24, 8, 1, 1])
    values = numpy_helper.to_array(weight).copy()
    values[::2] = 0  # their codes fit any width
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    made = quantize(model, "int8", feeds(model, 4), workers=1).model
    assert not {t.data_type for t in made.graph.initializer} & {TensorProto.INT4, TensorProto.UINT4}


# ---- text and shapes ------------------------------------------------------------------------------------------------------

SCRIPT = (
    '  File "/site-packages/torch/nn/modules/linear.py", line 117\n    def forward(self, x):\n        return F.linear(x)\n'
)
TRACED = "/home/me/torch/nn/modules/conv.py(457): _conv_forward\n/home/me/net.py(12): forward\n"
DYNAMO = 'File "/home/me/net.py", line 12, in forward\n    return self.conv(x)'


@pytest.mark.parametrize("trace", [SCRIPT, TRACED, DYNAMO])
@pytest.mark.parametrize(("before", "after"), [("", ""), ("the stem", ""), ("", "made by hand"), ("a", "see net.py line 3")])
def test_stack_traces_go_and_other_text_stays(trace, before, after):
    model = cnn()
    node = model.graph.node[0]
    node.doc_string = "\n".join(filter(None, [before, trace, after]))
    for key, value in (("pkg.torch.onnx.stack_trace", DYNAMO), ("pkg.torch.onnx.class_hierarchy", "['Net', 'Conv2d']")):
        node.metadata_props.add(key=key, value=value)
    for result in both(model, n=3):
        made = next(n for n in result.model.graph.node if n.name == node.name)
        assert made.doc_string.split("\n") == ([before] * bool(before) + [after] * bool(after) or [""])
        assert [p.key for p in made.metadata_props] == ["pkg.torch.onnx.class_hierarchy"]


@given(st.text(st.sampled_from("ab. \n():1"), max_size=30))
@examples(50)
def test_text_without_a_trace_is_left_alone(text):
    model = cnn()
    model.graph.node[0].doc_string = text
    compact(model, {n.name for n in model.graph.node})
    assert model.graph.node[0].doc_string == text


def test_shapes_that_follow_are_dropped_and_others_stay():
    model = cnn()
    inferred = onnx.shape_inference.infer_shapes(model)
    first, second, third, *_ = inferred.graph.value_info
    del model.graph.value_info[:]
    model.graph.value_info.extend([first, second, third])
    model.graph.value_info[1].doc_string = "features"
    model.graph.value_info[2].type.tensor_type.shape.dim[0].dim_param = "images"
    shown = compact(model, ())
    assert [v.name for v in model.graph.value_info] == [shown[second.name], shown[third.name]]
    assert model.graph.value_info[0].doc_string == "features"


def test_shared_codes_stay_shared():
    made = quantize(shared_weights(), "int8", feeds(shared_weights(), 4), workers=1).model
    makers = {o: n for n in made.graph.node for o in n.output}
    read = [makers[n.input[1]].input[0] for n in made.graph.node if n.op_type == "Conv"]
    assert len(set(read)) < len(read)
