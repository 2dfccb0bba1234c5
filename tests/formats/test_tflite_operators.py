"""Each operator of a .tflite file beside onnxruntime on the QDQ model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.formats.quantized import Maker, kinds, lite, run, steps
from tests.zoo import examples

pytest.importorskip("ai_edge_litert", reason="needs the extra litert")
pytest.importorskip("flatbuffers", reason="needs the extra litert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tflite")


def noise(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def close(maker, output, folder, ops=(), most=1.01, kind="integer"):
    distance, inspection = steps(maker, output, folder)
    assert distance <= most
    if ops:
        assert kinds(inspection, *ops) == {kind}, [(e.op, e.kind) for e in inspection.operators]
    return inspection


@examples(60)
@given(data=st.data())
def test_convolutions_of_any_shape(folder, data):
    rank, groups = data.draw(st.sampled_from([1, 2, 2, 2])), data.draw(st.sampled_from([1, 1, 2, 4]))
    inputs = groups * data.draw(st.sampled_from([1, 1, 2, 3]))
    outputs = groups * data.draw(st.integers(1, 3))
    kernel = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    strides = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    dilations = data.draw(st.sampled_from([[1] * rank, [2] * rank]))
    pads = data.draw(st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=2 * rank, max_size=2 * rank)))
    auto = data.draw(st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"])) if pads is None else "NOTSET"
    if max(strides) > 1 or auto.startswith("SAME"):  # onnxruntime has no dilations there
        dilations = [1] * rank
    sizes = data.draw(st.lists(st.integers(7, 11), min_size=rank, max_size=rank))
    after = data.draw(st.sampled_from(["", "Relu", "Clip6", "Clip"]))
    m = Maker(data.draw(st.sampled_from(["uint8", "int8"])))
    x = m.input(noise(data.draw(st.integers(1, 2)), inputs, *sizes))
    w = m.weight(noise(outputs, inputs // groups, *kernel, seed=1), data.draw(st.sampled_from([0, None])))
    bias = [m.constant(noise(outputs, seed=2))] if data.draw(st.booleans()) else []
    attrs = {"strides": strides, "dilations": dilations, "group": groups, "auto_pad": auto}
    y = m.node("Conv", [x, w, *bias], **attrs, **({} if pads is None else {"pads": pads}))
    if after == "Relu":
        y = m.node("Relu", [y])
    elif after:
        low, high = (0.0, 6.0) if after == "Clip6" else (-0.5, 1.0)
        y = m.node("Clip", [y, m.constant(np.float32(low)), m.constant(np.float32(high))])
    close(m, m.encoded(y, m.values(y)), folder, ("CONV_2D", "DEPTHWISE_CONV_2D"))


@examples(25)
@given(data=st.data())
def test_transposed_convolutions_of_any_shape(folder, data):
    rank, groups = data.draw(st.sampled_from([1, 2, 2])), data.draw(st.sampled_from([1, 1, 2]))
    inputs, outputs = groups * data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    kernel = data.draw(st.lists(st.integers(2, 4), min_size=rank, max_size=rank))
    strides = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    dilations = data.draw(st.sampled_from([[1] * rank, [1] * rank, [2] * rank]))
    pads = data.draw(st.lists(st.integers(0, 1), min_size=2 * rank, max_size=2 * rank))
    extra = [data.draw(st.integers(0, s - 1)) for s in strides]
    m = Maker()
    x = m.input(noise(1, inputs, *data.draw(st.lists(st.integers(3, 6), min_size=rank, max_size=rank))))
    w = m.weight(noise(inputs, outputs, *kernel, seed=1), data.draw(st.sampled_from([1, None])) if groups == 1 else None)
    bias = m.constant(noise(outputs * groups, seed=2))
    attrs = {"strides": strides, "pads": pads, "group": groups, "dilations": dilations, "output_padding": extra}
    close(m, m.op("ConvTranspose", [x, w, bias], **attrs), folder, ("TRANSPOSE_CONV",))


@pytest.mark.parametrize("op", ["Gemm", "GemmT", "MatMul2", "MatMul3", "vector"])
def test_products_with_constant_matrices(folder, op):
    m = Maker()
    x = m.input(noise(*{"MatMul3": (2, 5, 12), "vector": (12,)}.get(op, (4, 12))))
    if op.startswith("Gemm"):
        turned = op == "GemmT"
        w = m.weight(noise(*((6, 12) if turned else (12, 6)), seed=1), 0 if turned else 1)
        y = m.op("Gemm", [x, w, m.constant(noise(6, seed=2))], transB=int(turned), alpha=0.5, beta=2.0)
    else:
        product = m.node("MatMul", [x, m.weight(noise(12, 6, seed=1), 1)])
        y = m.op("Add", [product, m.constant(noise(6, seed=2))])
    inspection = close(m, y, folder, ("FULLY_CONNECTED",))
    assert "ADD" not in {each.op for each in inspection.operators}


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("type", ["uint8", "int16"])
def test_products_of_activations(folder, turn, type):
    m = Maker(type)
    x, y = m.input(noise(2, 3, 5, 8)), m.input(noise(2, 3, 7, 8, seed=1) if turn else noise(2, 3, 8, 7, seed=1))
    if turn:
        y = m.node("Transpose", [y], perm=[0, 1, 3, 2])
    distance, inspection = steps(m, m.op("MatMul", [x, y]), folder, {"products": "int8"})
    assert distance <= 1.01 and kinds(inspection, "BATCH_MATMUL") == {"integer"}
    assert "TRANSPOSE" not in {each.op for each in inspection.operators}


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("other", ["same", "row", "channel", "scalar", "constant"])
@pytest.mark.parametrize("type", ["uint8", "int16"])
def test_arithmetic(folder, op, other, type):
    m = Maker(type)
    x = m.input(noise(2, 3, 4, 5))
    shape = {"same": (2, 3, 4, 5), "row": (5,), "channel": (1, 3, 1, 1), "constant": (3, 1, 1)}.get(other, ())
    if other == "scalar":
        y = m.constant(np.float32(1.7))
    else:
        y = m.weight(noise(*shape, seed=1), None) if other == "constant" else m.input(noise(*shape, seed=1))
    if other == "constant" and type == "int16":
        pytest.skip("8-bit constants beside 16-bit activations are computed in floats")
    close(m, m.op(op, [x, y]), folder, (op.upper(),))


@examples(40)
@given(data=st.data())
def test_pooling_of_any_shape(folder, data):
    rank, op = data.draw(st.sampled_from([1, 2, 2])), data.draw(st.sampled_from(["MaxPool", "AveragePool"]))
    kernel = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    strides = data.draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    pads = [data.draw(st.integers(0, k // 2)) for k in kernel * 2]
    m = Maker()
    x = m.input(noise(1, 3, *data.draw(st.lists(st.integers(7, 10), min_size=rank, max_size=rank))))
    attrs = {"kernel_shape": kernel, "strides": strides, "pads": pads, "ceil_mode": data.draw(st.integers(0, 1))}
    if op == "AveragePool":
        attrs["count_include_pad"] = data.draw(st.integers(0, 1))
    # a mean is rounded on the input's grid, which may be coarser than the output's
    y = m.op(op, [x], **attrs)
    most = 1.01 if op == "MaxPool" else 0.6 * float(m.grids[x][0] / m.grids[y][0]) + 1.01
    close(m, y, folder, most=most)


@pytest.mark.parametrize("op", ["Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "Sigmoid", "Tanh", "Softmax", "Gelu"])
def test_activations_run_on_codes(folder, op):
    m = Maker()
    x = m.input(noise(1, 6, 5, 4, scale=3))
    more = [m.constant(np.float32(-1.0)), m.constant(np.float32(2.5))] if op == "Clip" else []
    more = [m.weight(np.abs(noise(6, 1, 1, seed=1)), None)] if op == "PRelu" else more
    y = m.op(op, [x, *more], **({"axis": -1} if op == "Softmax" else {}))
    names = {"Sigmoid": "LOGISTIC", "HardSwish": "HARD_SWISH", "LeakyRelu": "LEAKY_RELU"}
    ops = () if op in ("Relu", "Clip") else (names.get(op, op.upper()),)
    close(m, y, folder, ops, most=2.01 if op in ("Sigmoid", "Tanh", "Softmax", "HardSwish") else 1.01)


def test_a_softmax_on_a_fine_grid_is_computed_in_floats(folder):
    """LiteRT's own grid for a Softmax has steps of 1/256: nothing is left of probabilities of some hundred tokens."""
    m = Maker()
    x = m.input(noise(2, 300))
    close(m, m.op("Softmax", [x], axis=-1), folder, ("SOFTMAX",), kind="fake")


@pytest.mark.parametrize(
    "op", ["Exp", "Erf", "Sqrt", "Abs", "HardSigmoid", "Elu", "Selu", "Softplus", "Mish", "Softsign", "Neg"]
)
def test_other_functions_are_computed_in_floats(folder, op):
    m = Maker()
    x = m.input(np.abs(noise(1, 6, 5, 4)) if op == "Sqrt" else noise(1, 6, 5, 4, scale=2))
    close(m, m.op(op, [x]), folder)


@pytest.mark.parametrize(
    "op", ["Gelu", "Erf", "LogSoftmax", "LayerNormalization", "InstanceNormalization", "ReduceL2", "Pow"]
)
def test_functions_of_floats(folder, op):
    m = Maker()
    x = m.input(noise(2, 6, 5, 4, scale=2), quantized=False)
    more = {"LayerNormalization": [(4,), (4,)], "InstanceNormalization": [(6,), (6,)]}.get(op, [])
    inputs = [x, *(m.constant(noise(*shape, seed=1)) for shape in more)]
    inputs += [m.constant(np.float32(2.0))] if op == "Pow" else []
    distance, _ = steps(m, m.node(op, inputs), folder)
    assert distance < 1.0


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("rule", ["asymmetric", "half_pixel", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("sizes", [(10, 8), (7, 11), (3, 2)])
def test_resizing(folder, mode, rule, sizes):
    m = Maker()
    x = m.input(noise(1, 3, 5, 4))
    wanted = m.constant(np.int64([1, 3, *sizes]))
    more = {"nearest_mode": "floor"} if mode == "nearest" else {}
    y = m.op("Resize", [x, "", "", wanted], mode=mode, coordinate_transformation_mode=rule, **more)
    close(m, y, folder, ("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR") if mode == "linear" else ())


@pytest.mark.parametrize("op", ["ReduceMean", "GlobalAveragePool", "ReduceSum", "ReduceMax", "GlobalMaxPool", "ReduceMin"])
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions(folder, op, keep):
    m = Maker()
    x = m.input(noise(2, 3, 4, 5))
    if op.startswith("Global"):
        y = m.op(op, [x])
    else:
        y = m.op(op, [x, m.constant(np.int64([2, 3]))], keepdims=keep)
    close(m, y, folder, ("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN"))


def test_data_that_move(folder):
    """What computes nothing stays on its codes: the output of one operator after the other, behind a convolution."""
    m = Maker()
    conv = m.op("Conv", [m.input(noise(1, 4, 6, 6)), m.weight(noise(8, 4, 3, 3, seed=1))])

    def sized(*numbers):
        return m.constant(np.int64(numbers))

    outputs = [
        m.node("Transpose", [conv], perm=[0, 2, 3, 1]),
        m.node("Transpose", [conv], perm=[3, 1, 0, 2]),
        m.node("Reshape", [conv, sized(1, 2, 4, 16)]),
        m.node("Reshape", [conv, sized(8, 16)]),
        m.node("Flatten", [conv]),
        m.node("Slice", [conv, sized(1, 0), sized(7, 4), sized(1, 2), sized(2, 1)]),
        m.node("Slice", [conv, sized(-1), sized(-9), sized(1), sized(-1)]),
        m.node("Pad", [conv, sized(0, 1, 2, 0, 0, 0, 1, 1)]),
        m.node("Pad", [conv, sized(0, 0, 1, 1, 0, 0, 1, 1)], mode="reflect"),
        m.node("Gather", [conv, sized(3, 1)], axis=1),
        m.node("Gather", [conv, m.constant(np.int64(-1))], axis=2),
        m.node("DepthToSpace", [conv], blocksize=2),
        m.node("DepthToSpace", [conv], blocksize=2, mode="CRD"),
        m.node("SpaceToDepth", [conv], blocksize=2),
        m.node("Unsqueeze", [conv, sized(2)]),
        m.node("Tile", [conv, sized(2, 1, 1, 3)]),
        m.node("Expand", [m.node("ReduceMax", [conv, sized(2)]), sized(1, 8, 5, 4)]),
        *m.node("Split", [conv, sized(3, 5)], outputs=2, axis=1),
    ]
    model = m.model(outputs)
    mine = run(model, m.inputs)
    got = lite(model, m.inputs, folder).outputs[0]
    step = m.grids[conv][0]
    assert {n: np.abs(got[n] - mine[n]).max() <= 1.01 * step for n in outputs} == dict.fromkeys(outputs, True)


@pytest.mark.parametrize("axis", [1, 2])
def test_concatenation_puts_its_inputs_on_one_grid(folder, axis):
    m = Maker()
    x, y = m.input(noise(1, 4, 6, 6)), m.input(noise(1, 4, 6, 6, seed=1, scale=2))
    close(m, m.op("Concat", [x, y], axis=axis), folder)


def test_rows_of_a_table(folder):
    m = Maker()
    ids = m.input(np.int64([[3, 1, 4], [1, 5, 9]]), quantized=False)
    close(m, m.op("Gather", [m.weight(noise(10, 6, seed=1), None), ids]), folder)
    m = Maker()
    ids = m.input(np.int64([[3, 1, 4], [1, 5, 9]]), quantized=False)
    close(m, m.op("Gather", [m.weight(noise(10, 6, seed=1), 0), ids]), folder)


@pytest.mark.parametrize(
    "op", ["Conv", "Depthwise", "Gemm", "ConvTranspose", "Sigmoid", "Tanh", "Softmax", "LeakyRelu", "Concat"]
)
def test_16_bit_activations(folder, op):
    m = Maker("int16")
    x = m.input(noise(1, 4, 6, 6) if op != "Gemm" else noise(3, 8))
    if op in ("Conv", "Depthwise"):
        w = m.weight(noise(4, 1 if op == "Depthwise" else 4, 3, 3, seed=1))
        y = m.op("Conv", [x, w, m.constant(noise(4, seed=2))], group=4 if op == "Depthwise" else 1)
    elif op == "ConvTranspose":
        y = m.op(op, [x, m.weight(noise(4, 3, 2, 2, seed=1), 1), m.constant(noise(3, seed=2))], strides=[2, 2])
    elif op == "Gemm":
        y = m.op(op, [x, m.weight(noise(8, 5, seed=1), 1), m.constant(noise(5, seed=2))])
    elif op == "Concat":
        y = m.op(op, [x, m.input(noise(1, 4, 6, 6, seed=1))], axis=1)
    else:
        y = m.op(op, [x])
    close(m, y, folder, most=8.0)
