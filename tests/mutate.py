"""Broken models, made of good ones: every number is one way to break one, the same in every run.

    python -m tests.mutate FOLDER FIRST COUNT

runs `onnxq quantize` on so many of them, each in this process, and prints one line of JSON for each: number, exit code, what
was written on standard error, files left behind. A process of its own, since a native crash would take the tests with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from tests import zoo

Rng = np.random.Generator
MODELS = (
    "cnn",
    "mlp",
    "mobilenet",
    "transformer",
    "control_flow",
    "written_out",
    "conv_transpose",
    "conv1d",
    "no_layer",
    "resnet20",
    "prelu",
    "shared_weights",
)
RECIPES = {
    "int8": ["-r", "int8"],
    "int8-data-free": ["-r", "int8-data-free"],
    "weight-only": ["-r", "int8", "--set", "activations.bits=32", "--target", "storage"],
    "equalize": ["-r", "int8-per-tensor"],
    "rounded": ["-r", "int4-rounded", "--set", "round.seconds=0"],
}
MEMORY = 6 * 2**30  # address space of the process that runs broken models


def broken(number: int, folder: Path) -> Path:
    """Write broken model `number`, with the files it needs, and its data (`data.npz`) into a folder."""
    rng = np.random.default_rng(number)
    model = zoo.ZOO[MODELS[rng.integers(len(MODELS))]]()
    feeds = zoo.feeds(model, 4)
    np.savez(folder / "data.npz", **zoo.batch(feeds))
    if rng.random() < 0.25:
        content = _bytes(bytearray(model.SerializeToString()), rng)
    else:
        for _ in range(rng.integers(1, 4)):
            mutation = MUTATIONS[rng.integers(len(MUTATIONS))]
            with contextlib.suppress(TypeError, ValueError, OverflowError, AttributeError, DecodeError):
                mutation(model, rng)
        try:
            content = model.SerializeToString()
        except Exception:  # protobuf refuses lone surrogates and the like
            content = b""
    (folder / "beside.bin").write_bytes(rng.bytes(64))
    (folder / "model.onnx").write_bytes(content)
    return folder / "model.onnx"


def _bytes(content: bytearray, rng: Rng) -> bytes:
    """Truncated, flipped, overwritten, cut."""
    how, size = rng.integers(4), len(content)
    if how == 0:
        return bytes(content[: rng.integers(size)])
    a, b, n = (int(v) for v in rng.integers(size, size=3))
    n = n % 64 + 1
    if how == 1:
        for at in rng.integers(size, size=rng.integers(1, 8)):
            content[at] ^= 1 << int(rng.integers(8))
    elif how == 2:
        content[a : a + n] = content[b : b + n]
    else:
        del content[a : a + n]
    return bytes(content)


# ---- mutations of messages -------------------------------------------------------------------------------------------


def _pick(items: object, rng: Rng) -> object:
    return items[rng.integers(len(items))] if len(items) else None


def drop(model: onnx.ModelProto, rng: Rng) -> None:
    """Without a node, an initializer, an input, an output."""
    part = _pick((model.graph.node, model.graph.initializer, model.graph.input, model.graph.output), rng)
    if len(part):
        del part[int(rng.integers(len(part)))]


def repeat(model: onnx.ModelProto, rng: Rng) -> None:
    """A node, an initializer, an input, an output twice."""
    part = _pick((model.graph.node, model.graph.initializer, model.graph.input, model.graph.output), rng)
    if len(part):
        part.add().CopyFrom(_pick(part, rng))


def attribute(model: onnx.ModelProto, rng: Rng) -> None:
    """An attribute less, or with another value or type."""
    nodes = [n for n in model.graph.node if n.attribute]
    if not nodes:
        return
    node = _pick(nodes, rng)
    chosen = _pick(node.attribute, rng)
    odd = int(_pick((0, -1, 1, 2, 7, 99, -(2**62), 2**62, 2**31), rng))
    how = rng.integers(6)
    if how == 0:
        node.attribute.remove(chosen)
    elif how == 1 and len(chosen.ints):
        chosen.ints[int(rng.integers(len(chosen.ints)))] = odd
    elif how == 2 and len(chosen.ints):
        del chosen.ints[int(rng.integers(len(chosen.ints))) :]
    elif how == 3:
        chosen.type = int(rng.integers(15))
    elif how == 4:
        chosen.name = str(_pick(("", "axis", "group", "nonsense", "kernel_shape", "transA", "transB", "perm"), rng))
    elif chosen.type == AttributeProto.FLOAT:
        chosen.f = float(_pick((np.nan, np.inf, -1.0, 0.0, 1e38), rng))
    else:
        chosen.i = odd


def add_attribute(model: onnx.ModelProto, rng: Rng) -> None:
    """An attribute that may or may not belong there."""
    name, value = _pick(
        (
            ("transA", 1),
            ("transB", 1),
            ("group", 3),
            ("group", 0),
            ("axis", 9),
            ("alpha", float("nan")),
            ("training_mode", 1),
            ("auto_pad", "SAME_UPPER"),
            ("pads", [1]),
            ("strides", [0, 0]),
            ("dilations", [2**40, 1]),
            ("kernel_shape", [3]),
            ("axes", [0, 0]),
        ),
        rng,
    )
    if len(model.graph.node):
        node = _pick(model.graph.node, rng)
        node.attribute.append(helper.make_attribute(name, value))


def dims(model: onnx.ModelProto, rng: Rng) -> None:
    """An initializer whose shape does not fit its data, or its operator."""
    if not len(model.graph.initializer):
        return
    tensor = _pick(model.graph.initializer, rng)
    how = rng.integers(5)
    if how == 0 and len(tensor.dims):
        tensor.dims[int(rng.integers(len(tensor.dims)))] = int(_pick((0, -1, 1, 2**20, 2**40, 2**62), rng))
    elif how == 1:
        tensor.dims.append(1)
    elif how == 2:
        del tensor.dims[:]
    elif how == 3:
        shape = list(tensor.dims)[::-1]
        del tensor.dims[:]
        tensor.dims.extend(shape)
    else:  # consistent, but of another size
        shape = [int(n) for n in rng.integers(0, 6, size=len(tensor.dims))]
        tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), tensor.name))


def values(model: onnx.ModelProto, rng: Rng) -> None:
    """An initializer with odd values, of an odd type, or with too few bytes."""
    if not len(model.graph.initializer):
        return
    tensor = _pick(model.graph.initializer, rng)
    how = rng.integers(5)
    if how == 0:
        tensor.raw_data = tensor.raw_data[: int(rng.integers(len(tensor.raw_data) + 1))]
    elif how == 1:
        tensor.data_type = int(rng.integers(26))
    elif how == 2:
        tensor.float_data.extend([1.0, 2.0])
    elif how == 3:
        try:
            array = numpy_helper.to_array(tensor).copy()
        except Exception:
            return
        if array.dtype == np.float32 and array.size:
            array.reshape(-1)[rng.integers(array.size)] = _pick((np.nan, np.inf, 3e38, -1e-45), rng)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    else:
        kind = _pick((np.float64, np.int64, np.float16, np.int8, bool), rng)
        try:
            array = numpy_helper.to_array(tensor).astype(kind)
        except Exception:
            return
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def external(model: onnx.ModelProto, rng: Rng) -> None:
    """An initializer that is to be read from a file that is not there, too short, or outside the folder."""
    if not len(model.graph.initializer):
        return
    tensor = _pick(model.graph.initializer, rng)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    place = str(
        _pick(
            (
                "nowhere.bin",
                "../outside.bin",
                "/etc/passwd",
                "beside.bin",
                "",
                ".",
                "model.onnx",
                "a\0b",
                "/dev/zero",
                "x" * 5000,
            ),
            rng,
        )
    )
    tensor.external_data.add(key="location", value=place)
    if rng.random() < 0.6:
        tensor.external_data.add(key="offset", value=str(_pick((0, -1, 60, 2**63, "x", 2**40, ""), rng)))
        tensor.external_data.add(key="length", value=str(_pick((0, -1, 64, 2**63, "x", 2**40), rng)))


def rename(model: onnx.ModelProto, rng: Rng) -> None:
    """Another name, none, or one that is taken, for what an operator reads or writes: cycles and duplicates among them."""
    if not len(model.graph.node):
        return
    node, other = _pick(model.graph.node, rng), _pick(model.graph.node, rng)
    name = str(_pick(("", "nobody", *other.output, *other.input), rng))
    part = _pick((node.input, node.output), rng)
    if len(part):
        part[int(rng.integers(len(part)))] = name


def rename_value(model: onnx.ModelProto, rng: Rng) -> None:
    part = _pick((model.graph.input, model.graph.output, model.graph.initializer), rng)
    if len(part):
        other = _pick(model.graph.node, rng) if len(model.graph.node) else None
        _pick(part, rng).name = str(_pick(("", "x", *(other.output if other is not None else ())), rng))


def arity(model: onnx.ModelProto, rng: Rng) -> None:
    """An operator with an input or output more or less."""
    if not len(model.graph.node):
        return
    node = _pick(model.graph.node, rng)
    part = _pick((node.input, node.output), rng)
    if rng.random() < 0.5 and len(part):
        del part[int(rng.integers(len(part)))]
    else:
        part.append(str(_pick(("", "nobody", "x", *node.output), rng)))


def operator(model: onnx.ModelProto, rng: Rng) -> None:
    """Another operator, an unknown one, or one of another domain."""
    if not len(model.graph.node):
        return
    node = _pick(model.graph.node, rng)
    if rng.random() < 0.3:
        node.domain = str(_pick(("com.microsoft", "nobody", "ai.onnx", "ai.onnx.ml"), rng))
    else:
        node.op_type = str(
            _pick(
                (
                    "",
                    "Nonsense",
                    "Conv",
                    "Gemm",
                    "MatMul",
                    "Add",
                    "Relu",
                    "Softmax",
                    "Loop",
                    "If",
                    "Constant",
                    "Reshape",
                    "Clip",
                    "ConvTranspose",
                    "BatchNormalization",
                    "Identity",
                    "Split",
                    "Concat",
                    "Gather",
                    "ConstantOfShape",
                    "Range",
                    "Tile",
                    "Expand",
                    "NonZero",
                    "SequenceEmpty",
                    "RandomNormal",
                    "Pad",
                    "Resize",
                    "LSTM",
                    "Einsum",
                    "Mul",
                ),
                rng,
            )
        )


def shapes(model: onnx.ModelProto, rng: Rng) -> None:
    """An input or output of another rank, size or type."""
    part = _pick((model.graph.input, model.graph.output), rng)
    if not len(part):
        return
    value = _pick(part, rng)
    how, kind = rng.integers(6), value.type.tensor_type
    if how == 0:
        value.ClearField("type")
    elif how == 1:
        kind.ClearField("shape")
    elif how == 2:
        kind.elem_type = int(rng.integers(26))
    elif how == 3:
        kind.shape.dim.add().dim_value = int(_pick((0, 1, 2**40), rng))
    elif how == 4 and len(kind.shape.dim):
        _pick(kind.shape.dim, rng).dim_value = int(_pick((0, -1, 1, 7, 2**31, 2**62), rng))
    else:
        value.type.CopyFrom(helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [2])))


def versions(model: onnx.ModelProto, rng: Rng) -> None:
    """Opsets and IR versions that are too old, too new, none, or two."""
    how = rng.integers(4)
    if how == 0:
        model.ir_version = int(_pick((0, 1, 3, 99, 2**40), rng))
    elif how == 1:
        del model.opset_import[:]
    elif how == 2:
        model.opset_import.add(domain=str(_pick(("", "ai.onnx", "nobody"), rng)), version=int(_pick((1, 13, 17, 99), rng)))
    elif len(model.opset_import):
        model.opset_import[0].version = int(_pick((-1, 0, 6, 7, 9, 11, 13, 22, 26, 27, 2**40), rng))


def constant(model: onnx.ModelProto, rng: Rng) -> None:
    """Operators on constants alone, which import folds: some enormous."""
    big = int(_pick((2, 2**20, 2**33, 2**50), rng))
    model.graph.initializer.append(numpy_helper.from_array(np.array([big], np.int64), f"mutant{len(model.graph.node)}"))
    op = str(_pick(("ConstantOfShape", "Range", "Expand", "Tile"), rng))
    name = model.graph.initializer[-1].name
    inputs = {"ConstantOfShape": [name], "Range": [name, name, name], "Expand": [name, name], "Tile": [name, name]}[op]
    model.graph.node.insert(0, helper.make_node(op, inputs, [f"{name}_made"]))
    if len(model.graph.node) > 1 and rng.random() < 0.5:
        node = _pick(model.graph.node[1:], rng)
        if len(node.input):
            node.input[-1] = f"{name}_made"
    else:
        model.graph.output.append(helper.make_empty_tensor_value_info(f"{name}_made"))


def body(model: onnx.ModelProto, rng: Rng) -> None:
    """A control-flow operator with a broken body, or a function that calls itself."""
    if rng.random() < 0.5:
        inner = helper.make_graph(
            [helper.make_node("Relu", [str(_pick(("x", "nobody", ""), rng))], ["inner"])],
            "body",
            [],
            [helper.make_empty_tensor_value_info("inner")],
        )
        for _ in range(int(_pick((0, 1, 6), rng))):
            node = helper.make_node("If", ["c"], ["inner"], then_branch=inner, else_branch=inner)
            inner = helper.make_graph([node], "body", [], [helper.make_empty_tensor_value_info("inner")])
        model.graph.node.append(helper.make_node("If", ["c"], ["mutant_if"], then_branch=inner))
        if rng.random() < 0.5:
            model.graph.output.append(helper.make_empty_tensor_value_info("mutant_if"))
    else:
        function = model.functions.add(name="Self", domain="nobody")
        function.opset_import.add(domain="", version=17)
        function.opset_import.add(domain="nobody", version=1)
        function.input.append("a")
        function.output.append("b")
        function.node.append(helper.make_node("Self", ["a"], ["b"], domain="nobody"))
        model.opset_import.add(domain="nobody", version=1)
        if len(model.graph.node):
            model.graph.node.append(helper.make_node("Self", ["x"], ["mutant_self"], domain="nobody"))
            model.graph.output.append(helper.make_empty_tensor_value_info("mutant_self"))


MUTATIONS: tuple[Callable[[onnx.ModelProto, Rng], None], ...] = (
    drop,
    repeat,
    attribute,
    add_attribute,
    dims,
    values,
    external,
    rename,
    rename_value,
    arity,
    operator,
    shapes,
    versions,
    constant,
    body,
)


# ---- the process that runs them --------------------------------------------------------------------------------------


def run(number: int, folder: Path) -> dict[str, object]:
    """Quantize one broken model through the command line; what came of it."""
    from onnxq_plugins import cli, runtimes

    folder.mkdir()
    (folder / "out").mkdir()
    model = broken(number, folder)
    recipe = list(RECIPES.values())[number % len(RECIPES)]
    output = folder / "out" / "made.onnx"
    sys.argv = [
        "onnxq",
        "quantize",
        str(model),
        "-o",
        str(output),
        "--workers",
        "1",
        *recipe,
        "--data",
        str(folder / "data.npz"),
    ]
    told = folder / "stderr"
    kept = os.dup(2)
    with open(told, "wb") as stream:
        os.dup2(stream.fileno(), 2)
        try:
            cli.main()
            code: object = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        except BaseException:
            traceback.print_exc()
            code = "raised"
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
    left = sorted(p.name for p in (folder / "out").iterdir())
    runs = True
    if code == 0:
        try:
            runtimes.session(output)
        except Exception:
            runs = False
    return {"number": number, "code": code, "stderr": told.read_text("utf-8", "replace"), "left": left, "runs": runs}


def main() -> None:
    folder, (firsts, counts) = Path(sys.argv[1]), (map(int, sys.argv[start::2]) for start in (2, 3))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for number in (number for first, count in zip(firsts, counts, strict=True) for number in range(first, first + count)):
        results.write(f"{number}\n")
        results.flush()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = run(number, folder / str(number))
        found["grew"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        results.write(json.dumps(found) + "\n")
        results.flush()


if __name__ == "__main__":
    main()
