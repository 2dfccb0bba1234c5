"""What a file has that a target does not, whoever made the file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx
import pytest

from onnxq_plugins import Pass, audit, hookimpl, quantize
from onnxq_plugins.targets import BUILTIN
from onnxq_plugins.targets.misfits import misfits
from onnxq_plugins.testing.models import outliers
from tests.targets.test_hardware import NPU, WITHOUT_GEMM, Brings
from tests.zoo import cnn, feeds, mlp, mobilenet

MODELS = {build.__name__: quantize(build(), "int8", feeds(build(), 4), check=False).model for build in (cnn, mobilenet, mlp)}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("cnn", {"signed": True}, "has uint8 codes of 'x'"),
        ("cnn", {"symmetric": True}, "has a zero point of "),
        ("cnn", {"opsets": (13, 16)}, "has opset 17, not 13 to 16"),
        ("cnn", {"opsets": (18, 0)}, "has opset 17, not 18 to any"),
        ("cnn", {"bias": "float"}, "has coded biases of "),
        ("cnn", {"aligned": 8}, "has coded layers whose channels are no multiples of 8: "),
        ("mobilenet", {"rules": tuple(replace(r, granularity=("tensor",)) for r in NPU.rules)}, "has several scales"),
        ("mlp", {"operators": WITHOUT_GEMM}, "has operators that the target has not: Gemm (3)"),
        ("cnn", {"rules": tuple(replace(r, activations=4) for r in NPU.rules)}, "has uint8 codes of 'x'"),
    ],
)
def test_each_declaration_is_held_against_the_file(name, changes, words):
    assert not misfits(NPU, MODELS[name])
    found = misfits(replace(NPU, **changes), MODELS[name])
    assert len(found) == 1 and found[0].startswith(words)


@pytest.mark.parametrize("target", BUILTIN, ids=lambda target: target.name)
@pytest.mark.parametrize("build", [cnn, mobilenet, outliers])
def test_our_own_files_fit(target, build):
    recipe = "int8-storage" if not target.integer else "int8"
    result = quantize(build(), recipe, feeds(build(), 4), target=target.name, check=False)
    assert not misfits(target, result.model)


def test_the_command_says_what_does_not_fit(onnxq, tmp_path, monkeypatch):
    onnx.save(MODELS["cnn"], tmp_path / "m.onnx")
    ran = onnxq("audit", str(tmp_path / "m.onnx"), "--target", "ort-cpu")
    assert ran.code == 0 and "target 'ort-cpu': opset, operators" in ran.out
    monkeypatch.setattr("onnxq_plugins.cli.audit.find_plugins", lambda: guests)
    from onnxq_plugins.plugins import find_plugins

    guests = find_plugins([Brings(replace(NPU, signed=True, opsets=(13, 13)))])
    ran = onnxq("audit", str(tmp_path / "m.onnx"), "--target", "acme.npu")
    assert ran.code == 1
    assert ran.err.count("is no file for target 'acme.npu': it has ") == 2


# ---- layers in float on purpose -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside(Pass):
    """A float layer of 4 kB beside the first one, times zero."""

    name: ClassVar[str] = "acme.beside"

    def apply(self, job):
        graph = job.graph
        first = graph.layers[0]
        node, output = graph.producer(first.output), graph.tensor(first.output)
        own = graph.add_variable("own", like=output)
        weight = graph.add_constant("beside", np.zeros(first.shape, np.float32))
        side = graph.add_node(node.op, "beside", [first.input, weight], **node.attrs)
        node.outputs[0] = own
        graph.add_node("Add", "", [own, side.outputs[0]], [output])
        job.keep_float(side.name, "because")


class Brought:
    @hookimpl
    def onnxq_passes(self):
        return [Beside]


def test_an_audit_of_the_file_knows_what_is_float_on_purpose(tmp_path):
    path = tmp_path / "m.onnx"
    recipe = {"pass": [{"use": "acme.beside"}, {"use": "ranges"}]}
    result = quantize(outliers(), recipe, feeds(outliers(), 4), output=path, plugins=[Brought()], check=False)
    found = audit(path)
    (row,) = [layer for layer in found.layers if layer.name == "beside"]
    assert row.why == "because" and row.kept and not row.quantized
    assert found.summary.split(" of 5")[0] in result.summary and "/" in found.summary
    plain = audit(quantize(outliers(), {"pass": [{"use": "ranges"}]}, feeds(outliers(), 4), check=False).model)
    assert found.counts() == plain.counts() and not any("beside" in held.name for held in found.constants)
    assert not any(entry.key == "onnxq.float" for entry in quantize(cnn(), {}, feeds(cnn(), 4)).model.metadata_props)


@pytest.mark.parametrize("text", ["[]", "{", "3", '{"a": 1}'])
def test_metadata_of_others_are_no_error(text):
    model = onnx.ModelProto.FromString(MODELS["mlp"].SerializeToString())
    model.metadata_props.add(key="onnxq.float", value=text)
    assert audit(model).summary == audit(MODELS["mlp"]).summary
