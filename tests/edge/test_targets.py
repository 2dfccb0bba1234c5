"""What targets promise, proven in their runtimes: on networks of every kind, where the runtime is installed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import onnxq_plugins as onnxq
from onnxq_plugins import runtimes
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.runtimes.web import WEB
from tests.edge.test_runtimes import SETTINGS, needs
from tests.networks import network, weight
from tests.zoo import cnn, conv1d, feeds, grouped, mobilenet, some, transformer

NETWORKS = {"cnn": cnn, "conv1d": conv1d, "grouped": grouped, "mobilenet": mobilenet, "transformer": transformer}


def proof(name, target, runtime, tmp_path, recipe="int8"):
    model = NETWORKS[name]()
    samples = feeds(model, 8)
    file = onnxq.quantize(model, recipe, samples, target=target, check=False).save(tmp_path / "m.onnx")
    return file, onnxq.audit(file, runtime=runtime, data=samples, settings=SETTINGS.get(runtime), samples=2).proof


@pytest.mark.parametrize("recipe", ["int8", {"extends": "int8", "activations": {"bits": 16}}], ids=["w8a8", "w8a16"])
@pytest.mark.parametrize("name", some(NETWORKS, "mobilenet", "transformer"))
def test_qnn_takes_the_whole_network_in_one_partition(name, recipe, tmp_path):
    """No Sum of one operand cuts it, the last layer writes codes, activations are unsigned."""
    needs("qnn")
    _, told = proof(name, "qnn", "qnn", tmp_path, recipe)
    assert told.inspection.facts["partitions"] == 1 and told.inspection.facts["on the CPU"] == 0
    assert {each.op: each.kind for each in told.inspection.operators if each.kind == "fake"} == {}
    assert told.decibels > 15


def test_qnn_takes_shifted_channels(tmp_path):
    needs("qnn")
    _, told = proof("mobilenet", "qnn", "qnn", tmp_path, "int8-per-tensor")
    assert told.inspection.facts["on the CPU"] == 0 and told.decibels > 15


@pytest.fixture(scope="module", params=[8, 16])
def for_qnn(request, tmp_path_factory):
    """The digits network for QNN with activations of 8 and of 16 bits, and their width."""
    needs("qnn")
    samples = digits_split()["calibration_images"][:, None]
    recipe = {"extends": "int8", "activations": {"bits": request.param}}
    result = onnxq.quantize(digits_model_path(), recipe, samples[:32], target="qnn", check=False)
    return result.save(tmp_path_factory.mktemp("qnn") / "digits.onnx"), request.param, samples[32:64]


def test_qnn_gets_unsigned_codes_and_agrees(for_qnn):
    """Signed activations gave other classes without an error in wheels before 2.7."""
    file, bits, samples = for_qnn
    graph = onnx.load(file).graph
    types = {t.name: t.data_type for t in graph.initializer}
    codes = {types[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert codes == {TensorProto.UINT8 if bits == 8 else TensorProto.UINT16}
    told = onnxq.audit(file, digits_model_path(), runtime="qnn", data=samples, settings=SETTINGS["qnn"], samples=0).proof
    assert told.samples == 32 and told.agreement >= 98 and told.decibels > (30 if bits == 8 else 40)


def test_the_chip_that_is_named_is_the_one_that_computes(for_qnn):
    """Chips before architecture 73 compute 16-bit activations less exactly; those of little memory refuse networks that
    others take (MEM_ALLOC), which is why both settings are always passed on."""
    file, bits, samples = for_qnn
    old, new = (
        onnxq.audit(file, runtime="qnn", data=samples, settings={**SETTINGS["qnn"], **chip}, samples=8).proof
        for chip in ({"soc_model": 30, "htp_arch": 68}, {"soc_model": 60, "htp_arch": 73})
    )
    assert old.inspection.facts["partitions"] == new.inspection.facts["partitions"] == 1
    assert new.decibels > old.decibels + (10 if bits == 16 else 0)


@pytest.mark.parametrize("runtime", ["tract", "opencv"])
@pytest.mark.parametrize("name", some(NETWORKS, "mobilenet", "grouped"))
def test_portable_files_load_and_agree(name, runtime, tmp_path):
    needs(runtime)
    file, told = proof(name, "portable", runtime, tmp_path)
    graph = onnx.load(file).graph
    assert not {TensorProto.INT4, TensorProto.UINT4} & {t.data_type for t in graph.initializer}
    assert all(node.domain == "" for node in graph.node) and "Sum" not in {node.op_type for node in graph.node}
    assert told.decibels > 20 and told.agreement in (None, 100)


@pytest.mark.parametrize("name", some(NETWORKS, "cnn"))
def test_convolutions_in_the_browser_are_the_same_to_the_last_bit(name, tmp_path):
    needs("web")
    _, told = proof(name, "web", "web", tmp_path)
    assert told.identical or (name == "transformer" and told.decibels > 40)


def test_what_differs_in_the_browser_is_a_sigmoid_of_floats(tmp_path):
    """Its codes are the same; the kernel that computes exp in WebAssembly rounds otherwise, which shows where scores are
    small."""
    needs("web")
    model = network(
        [
            ("Conv", ["x", "w"], ["h"], {"pads": [1] * 4}),
            ("Relu", ["h"], ["r"], {}),
            ("Conv", ["r", "v", "low"], ["logits"], {}),
            ("Sigmoid", ["logits"], ["scores"], {}),
        ],
        [1, 3, 16, 16],
        {"w": weight((16, 3, 3, 3)), "v": weight((4, 16, 1, 1), 1), "low": np.full(4, -9, np.float32)},
        outputs=("logits", "scores"),
    )
    samples = feeds(model, 8)
    file = onnxq.quantize(model, "int8", samples, target="web", check=False).save(tmp_path / "m.onnx")
    told = WEB.inspect(file, samples, {**WEB.settings, **SETTINGS["web"]})
    here = runtimes.session(file).run(None, samples[0])
    theirs = [told.outputs[0][name] for name in ("logits", "scores")]
    assert np.array_equal(here[0], theirs[0])
    assert 0 < np.abs(here[1] - theirs[1]).max() < 1e-6
