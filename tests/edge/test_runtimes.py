"""Files in the runtimes that are installed here: each says itself what ran, and is compared with onnxruntime."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxq_plugins as onnxq
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.edge.known import BUILTIN, told
from onnxq_plugins.runtimes.kernels import coded, from_profile
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Runtime

QNN_PYTHON = os.environ.get("ONNXQ_QNN_PYTHON", "")  # a Python that has onnxruntime-qnn
WEB_MODULES = os.environ.get("ONNXQ_WEB_MODULES", "")  # a folder whose node_modules has onnxruntime-web
OLD_PYTHON = os.environ.get("ONNXQ_OLD_PYTHON", "")  # a Python that has onnxruntime 1.17
SETTINGS: dict[str, dict[str, Any]] = {  # onnxruntime with settings is asked as others are
    "onnxruntime": {"seconds": 100},
    "qnn": {"python": QNN_PYTHON},
    "web": {"modules": WEB_MODULES},
}


def needs(name: str) -> None:
    """Skip where a runtime is not installed."""
    modules = {"openvino": "openvino", "tract": "tract", "opencv": "cv2"}
    if name in modules:
        pytest.importorskip(modules[name], reason=f"needs {name}")
    if name == "qnn" and not (QNN_PYTHON or importlib.util.find_spec("onnxruntime_qnn")):
        pytest.skip("needs onnxruntime-qnn; ONNXQ_QNN_PYTHON names a Python that has it")
    if name == "web" and not (shutil.which("node") and WEB_MODULES):
        pytest.skip("needs node and onnxruntime-web; ONNXQ_WEB_MODULES names the folder of its node_modules")


def digits(n: int = 4) -> dict[str, np.ndarray]:
    return {"image": digits_split()["calibration_images"][:n, None]}


def fixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """With a batch of one sample."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return model


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("edge") / "digits.onnx"
    result = onnxq.quantize(digits_model_path(), "int8", digits(32)["image"], target="ort-cpu")
    onnx.save(fixed(result.model), str(file))
    return file


# ---- what every runtime says of the same file -----------------------------------------------------------------------------

LAYERS = {  # how it runs the layers of an integer QDQ model
    "onnxruntime": "integer",
    "openvino": "integer",
    "qnn": "integer",
    "web": "integer",
    "tract": "fake",
    "opencv": "fake",
}


def test_every_runtime_is_tested():
    assert {runtime.name for runtime in BUILTIN} >= set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_runtime_tells_how_layers_ran_and_is_compared(name, quantized):
    needs(name)
    audit = onnxq.audit(quantized, runtime=name, data=digits(), settings=SETTINGS.get(name), samples=2)
    proof = audit.proof
    assert proof is not None and proof.runtime == name and proof.samples == 2
    assert len(audit.layers) == 18 and all(row.quantized == (LAYERS[name] == "integer") for row in audit.layers)
    assert all(row.why for row in audit.layers if not row.quantized)
    assert proof.decibels > 25 and proof.agreement == 100
    assert proof.identical == (name in ("onnxruntime", "web"))
    assert (proof.inspection.milliseconds is None) == (name == "qnn")


def test_qnn_takes_a_float_output_to_the_cpu_and_tells_why(quantized):
    needs("qnn")
    found = onnxq.audit(quantized, runtime="qnn", data=digits(1), settings=SETTINGS["qnn"]).proof.inspection
    (row,) = (each for each in found.operators if each.where == "CPU" and each.kind != "moves")
    assert row.name == "classifier" and "FullyConnected" in row.why
    assert found.facts["partitions"] == 1 and found.facts["on the CPU"] == 1


def test_without_samples_random_numbers_show_the_operators(quantized):
    audit = onnxq.audit(quantized, runtime="onnxruntime", settings={"seconds": 100})
    assert audit.proof.random and audit.proof.agreement is None and audit.proof.identical
    assert "on 1 random sample" in repr(audit)


def test_another_python_is_asked(quantized):
    audit = onnxq.audit(quantized, runtime="onnxruntime", data=digits(), settings={"python": sys.executable})
    assert audit.proof.identical and len(audit.layers) == 18


def test_onnxruntime_of_another_version(tmp_path):
    if not OLD_PYTHON:
        pytest.skip("ONNXQ_OLD_PYTHON names a Python with an older onnxruntime")
    file = tmp_path / "m.onnx"
    onnxq.quantize(digits_model_path(), "int8", digits(32)["image"], target="portable", output=file, check=False)
    proof = onnxq.audit(file, runtime="onnxruntime", data=digits(), settings={"python": OLD_PYTHON}).proof
    assert proof.agreement == 100 and proof.inspection.counts()["integer"] >= 18


# ---- what is told of operators --------------------------------------------------------------------------------------------


def test_what_reads_codes_and_writes_codes_is_coded():
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["x"]),
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
        helper.make_node("QuantizeLinear", ["z", "s"], ["p"]),
        helper.make_node("Softmax", ["y"], ["out"], name="softmax"),
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("q", TensorProto.UINT8, [1])], [])
    assert {"conv", "relu"} <= coded(graph) and "softmax" not in coded(graph)


@pytest.mark.parametrize(
    ("op", "first", "kind"),
    [
        ("QLinearConv", "uint8", "integer"),
        ("MaxPool", "int8", "integer"),
        ("Conv", "float", "fake"),
        ("Softmax", "float", "float"),
        ("MatMulNBits", "float", "fake"),
        ("Transpose", "float", "moves"),
        ("Add", "int64", "moves"),
    ],
)
def test_events_of_a_profile_are_operators(op, first, kind):
    args = {"op_name": op, "input_type_shape": [{first: [1]}]}
    events = [{"cat": "Node", "name": f"{op}_token_7_kernel_time", "args": args}] * 2
    assert [(each.name, each.kind) for each in from_profile(events, {"Conv"})] == [(op, kind)]


# ---- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qnn", "tract", "opencv", "openvino", "web"])
def test_a_runtime_that_is_not_installed_is_one_sentence(name, quantized, monkeypatch, tmp_path):
    modules = {"tract": "tract", "opencv": "cv2", "openvino": "openvino", "qnn": "onnxruntime_qnn"}
    monkeypatch.setitem(sys.modules, modules.get(name, ""), None)
    if name == "qnn":
        monkeypatch.setattr(importlib.util, "find_spec", lambda *args: None)
    settings = {"modules": str(tmp_path)} if name == "web" else {}
    with pytest.raises(onnxq.OnnxqError, match=r"install") as raised:
        onnxq.audit(quantized, runtime=name, data=digits(1), settings=settings)
    assert len(raised.value.problems) == 1 and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["onnxruntime", "qnn"])
def test_a_python_without_the_runtime_is_one_sentence(name, quantized, tmp_path):
    """One that has numpy alone: modules of onnxruntime are hidden from it."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/hide.py "$@"\n')
    (tmp_path / "hide.py").write_text(
        "import runpy, sys\nsys.modules['onnxruntime'] = None\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], "
        "run_name='__main__')\n"
    )
    python.chmod(0o755)
    with pytest.raises(onnxq.OnnxqError, match="not installed in"):
        onnxq.audit(quantized, runtime=name, data=digits(1), settings={"python": str(python)})
    with pytest.raises(onnxq.OnnxqError, match="cannot be started"):
        onnxq.audit(quantized, runtime=name, data=digits(1), settings={"python": "/no/such/python"})


def test_settings_are_checked(quantized):
    with pytest.raises(onnxq.OnnxqError, match=r"has no setting 'soc'; known: .*soc_model"):
        onnxq.audit(quantized, runtime="qnn", settings={"soc": 3})
    with pytest.raises(onnxq.OnnxqError, match="soc_model = 'x' must be of type int"):
        onnxq.audit(quantized, runtime="qnn", settings={"soc_model": "x"})
    assert told(next(each for each in BUILTIN if each.name == "qnn"), {"soc_model": "60"})["soc_model"] == 60


@pytest.mark.parametrize("name", ["onnxruntime", "tract", "opencv", "qnn", "web"])
def test_a_file_that_a_runtime_cannot_load_is_one_sentence(name, tmp_path):
    needs(name)
    from onnx import TensorProto, helper

    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in "xy"]
    graph = helper.make_graph([helper.make_node("Fractal", ["x"], ["y"], domain="acme")], "g", [ports[0]], [ports[1]])
    file = tmp_path / "m.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("acme", 1)]), str(file)
    )
    with pytest.raises(onnxq.OnnxqError, match=r"cannot run 'm.onnx'") as raised:
        onnxq.audit(file, runtime=name, data={"x": np.zeros((2, 4), np.float32)}, settings=SETTINGS.get(name))
    assert len(raised.value.problems) == 1


def test_a_file_of_another_format_goes_to_runtimes_that_read_it(quantized, tmp_path):
    (tmp_path / "m.acme").write_bytes(b"acme")
    seen: list[tuple[Path, int]] = []

    def inspect(file: Path, samples: Any, settings: Mapping[str, Any]) -> Inspection:
        seen.append((file, len(samples)))
        outputs = tuple({"logits": np.zeros((1, 10), np.float32)} for _ in samples)
        return Inspection(outputs, (Executed("classifier", "Dense", "integer"),))

    acme = Runtime("acme", "made up", "pip install acme", inspect, ".acme")
    audit = onnxq.audit(tmp_path / "m.acme", runtime=acme)
    assert audit.proof.decibels is None and seen == [(tmp_path / "m.acme", 0)] and "1 integer" in repr(audit)
    audit = onnxq.audit(tmp_path / "m.acme", quantized, runtime=acme, data=digits(), samples=3)
    assert audit.proof.samples == 3 and audit.proof.decibels == 0 and [row.name for row in audit.layers] == ["classifier"]
    with pytest.raises(onnxq.OnnxqError, match=r"reads .acme files"):
        onnxq.audit(quantized, runtime=acme)
    with pytest.raises(onnxq.OnnxqError, match="give it by --against"):
        onnxq.audit(tmp_path / "m.acme", runtime=acme, data=digits())
    with pytest.raises(onnxq.OnnxqError, match="does not exist"):
        onnxq.audit(tmp_path / "none.acme", runtime=acme)


# ---- command line ---------------------------------------------------------------------------------------------------------


def test_the_command_prints_one_table_for_any_runtime(onnxq, quantized, tmp_path):
    np.savez("d.npz", **digits())
    code, out, err = onnxq(
        "audit", str(quantized), "--runtime", "onnxruntime", "--python", sys.executable, "--data", "d.npz"
    )
    assert code == 0, err
    assert "QLinearConv" in out and "identical to onnxruntime, 100.0% the same class on 4 samples" in out
    code, _, err = onnxq("audit", str(quantized), "--runtime", "tract", "--set", "engine")
    assert code == 2 and "give KEY=VALUE" in err
    code, _, err = onnxq("audit", str(quantized), "--runtime", "moon")
    assert code == 2 and "runtime 'moon' is unknown; known: onnxruntime, openvino" in err


def test_children_need_no_package_of_ours():
    from onnxq_plugins.runtimes.apart import CHILDREN

    for file in CHILDREN.glob("*.py"):
        text = "\n".join(line for line in file.read_text("utf-8").splitlines() if not line.startswith('"""'))
        assert "onnxq_plugins" not in text, file
    if node := shutil.which("node"):
        assert subprocess.run([node, "--check", CHILDREN / "web.mjs"], check=False).returncode == 0
