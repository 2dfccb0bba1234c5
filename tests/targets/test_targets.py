"""Every form of a layer that a target allows takes the kernel that the target names, and docs/targets.md says so."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import onnx
import onnxruntime
import pytest

from benchmarks import targets
from onnxq_plugins import OnnxqError, measure, quantize, runtimes
from onnxq_plugins.targets import BUILTIN
from tests.zoo import feeds, resnet20, slowly

PAGE = Path(__file__).parents[2] / "docs" / "targets.md"
ALIKE = {"MatMulIntegerToFloat": "QLinearMatMul"}  # where what follows is float


@pytest.mark.parametrize("ends", ["narrowest", *slowly("both")])
@pytest.mark.parametrize("target", BUILTIN, ids=lambda target: target.name)
def test_every_form_takes_the_kernel_of_its_rule_and_the_page_tells_it(target, ends, monkeypatch):
    """At its narrowest weights in every run, which take the kernels that the widest take too."""
    settings = targets.settings
    if ends == "narrowest":
        monkeypatch.setattr(targets, "settings", lambda *form: itertools.islice(settings(*form), 1))
    targets.rows.cache_clear()
    for row in targets.rows(target):
        assert row.onnxruntime and "unknown" not in row.onnxruntime, row
        ran = {ALIKE.get(kernel, kernel) for kernel in row.onnxruntime}
        if target.here:
            assert ran == {row.rule.kernel}, row
        if row.rule.activations == 16 or row.rule.storage == "float":
            assert all("Q" not in kernel and "Integer" not in kernel for kernel in ran), row
        if row.openvino is not None and row.rule.storage != "float":
            kept = (" u8", " i8") if row.rule.activations else (" u4", " i4", " u8", " i8")
            assert all(kernel.endswith(kept) for kernel in row.openvino), row
    text = PAGE.read_text("utf-8")
    (made_with,) = re.findall(r"^Made with onnxruntime (\S+) ", text, re.MULTILINE)
    if made_with != onnxruntime.__version__:
        pytest.skip(f"rules hold, but docs/targets.md was made with onnxruntime {made_with}, and this is another")
    if target.name in targets.IN_OPENVINO and not targets.openvino_installed():
        pytest.skip("rules hold; the page has a column for OpenVINO, which is not installed here")
    assert targets.section(target) in text, "run: python -m benchmarks.targets > docs/targets.md"


@pytest.mark.parametrize("target", BUILTIN, ids=lambda target: target.name)
def test_symmetric_activations_are_signed_codes_where_a_target_has_them_and_else_a_sentence(target):
    """All ranges mirror each other, and the network is right."""
    model = resnet20()
    samples = feeds(model, 8)
    options = {"target": target.name, "settings": {"activations.symmetric": True}, "check": False}
    recipe = {"weights": {"block": "tensor"}}
    if not target.either:
        with pytest.raises(OnnxqError, match=r"set activations\.symmetric = false") as caught:
            quantize(model, recipe, samples, **options)
        assert len(caught.value.problems) == 1
        return
    result = quantize(model, recipe, samples, **options)
    activations = [spec for spec in result.plan.values() if spec.codes is None]
    assert len(activations) > 5 and all(spec.symmetric and spec.zero_point == 0 for spec in activations)
    zeros = [node.input[2] for node in result.model.graph.node if node.op_type == "QuantizeLinear"]
    types = {t.name: t.data_type for t in result.model.graph.initializer}
    assert zeros and {types[name] for name in zeros} == {onnx.TensorProto.INT8}
    reference, outputs = (runtimes.outputs(runtimes.session(m), samples)[0] for m in (model, result.model))
    assert measure.sqnr(reference, outputs) > 30
