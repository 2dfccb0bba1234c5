"""What is no model, no data, no setting or no path is a sentence, from every public function."""

from __future__ import annotations

import numpy as np
import pytest

import onnxq_plugins as onnxq
from onnxq_plugins import OnnxqError
from tests.zoo import cnn, feeds, mlp

MODEL, FEEDS = cnn(), feeds(cnn(), 8)


def quantize(model=MODEL, recipe="int8", data=FEEDS, **options):
    return onnxq.quantize(model, recipe, data, check=False, **options)


NO_MODELS = (3, None, np.zeros(3), [1], "", "gone.onnx", "a\0b", object())
NO_DATA = (3, object(), [], "", "gone.npz", ["a"], [None], lambda: FEEDS)
OPTIONS = {
    "output": (3, "", "a\0b", "gone/a.onnx"),
    "target": (3, ["ort-cpu"], "moon"),
    "seed": ("x", 1.5, -1),
    "samples": ("x", -1),
    "workers": ("x",),
    "cache": (3, __file__),
    "settings": (3, [3], "x"),
    "exclude": (3, [3], ["nowhere"]),
    "plugins": (3, [3], ["reorder"]),
    "labels": (3, object()),
    "state": (3,),
    "metric": (3, "x"),
    "min_sqnr": ("x", float("nan")),
    "min_speed": ("x", -1),
    "class_axis": ("x",),
    "names": (3, "long"),
}
CALLS = {
    **{f"quantize model {m!r:.20}": lambda m=m: quantize(m) for m in NO_MODELS},
    **{f"audit model {m!r:.20}": lambda m=m: onnxq.audit(m) for m in NO_MODELS},
    **{f"audit_model {m!r:.20}": lambda m=m: onnxq.audit_model(m) for m in NO_MODELS},
    **{f"compare model {m!r:.20}": lambda m=m: onnxq.compare(MODEL, m, FEEDS) for m in NO_MODELS},
    **{f"auto model {m!r:.20}": lambda m=m: onnxq.auto(m, FEEDS) for m in NO_MODELS},
    **{f"load {m!r:.20}": lambda m=m: onnxq.load(m) for m in NO_MODELS},
    **{f"quantize data {d!r:.20}": lambda d=d: quantize(data=d) for d in NO_DATA},
    **{f"audit data {d!r:.20}": lambda d=d: onnxq.audit(MODEL, data=d) for d in NO_DATA},
    **{f"compare data {d!r:.20}": lambda d=d: onnxq.compare(MODEL, MODEL, d) for d in NO_DATA},
    **{f"quantize {k} {v!r:.20}": lambda k=k, v=v: quantize(**{k: v}) for k, values in OPTIONS.items() for v in values},
    "audit against": lambda: onnxq.audit(MODEL, 3),
    "audit runtime": lambda: onnxq.audit(MODEL, runtime=3),
    "audit unknown runtime": lambda: onnxq.audit(MODEL, runtime="moon"),
    "audit shapes": lambda: onnxq.audit(MODEL, shapes=3),
    "compare others": lambda: onnxq.compare(MODEL, mlp(), FEEDS),
    "diagnose": lambda: onnxq.diagnose(3),
    "ort_model": lambda: onnxq.ort_model(3),
    "ort_overrides": lambda: onnxq.ort_overrides(3),
    "ort_arguments": lambda: onnxq.ort_arguments(3),
    "register_custom_ops": lambda: onnxq.register_custom_ops(3),
    "save": lambda: quantize().save(3),
    "save_report": lambda: quantize().save_report(3),
}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_bad_arguments_are_sentences(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OnnxqError) as caught:
        CALLS[call]()
    assert all(text.endswith((".", "?", ")")) for text in caught.value.problems) and not list(tmp_path.iterdir())


def test_several_bad_arguments_are_told_at_once():
    with pytest.raises(OnnxqError) as caught:
        quantize(target=3, seed="x", state=4)
    assert [text.split()[0] for text in caught.value.problems] == ["target", "seed", "state"]


def test_audit_and_compare_are_functions_whose_results_say_what_they_are():
    result = quantize()
    audit = onnxq.audit(result.model, MODEL, data=FEEDS)
    assert (
        audit.summary in repr(audit) and "2/2 Conv as QLinearConv" in repr(audit) and "x the speed of float" in repr(audit)
    )
    assert onnxq.audit(result.model.SerializeToString()).summary == audit.summary == onnxq.audit_model(result.model).summary
    both = onnxq.compare(MODEL, result.model, FEEDS, labels=np.arange(8) % 5)
    assert repr(both) == f"<Comparison: {both.verdict}>" and both.sqnr > 30 and both.top1 is not None and both.samples == 8
    diagnosis = onnxq.diagnose(result, FEEDS)
    assert len(repr(diagnosis)) < 2000 and "dB" in repr(diagnosis)
