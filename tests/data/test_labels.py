"""Labels that cannot be right are refused before any output."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq_plugins import quantize, runtimes
from tests.zoo import labelled


@pytest.mark.parametrize("command", ["quantize", "auto", "compare"])
@pytest.mark.parametrize(
    ("spoil", "phrase"),
    [
        (
            lambda y, n: np.where(np.arange(len(y)) == 3, n, y),
            "label {n} of sample 3, but output '{out}' has {n} classes, 0..{m}",
        ),
        (lambda y, n: y * 0 + n, "count from 1: subtract 1"),
        (lambda y, n: np.where(np.arange(len(y)) == 3, -1, y), "label -1"),
        (lambda y, n: np.eye(n)[y], "one-hot"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_any_output(onnxq, command, spoil, phrase):
    model, x, y = labelled()
    shape = runtimes.session(model).get_outputs()[0]
    onnx.save(model, "m.onnx")
    np.save("y.npy", spoil(y, shape.shape[-1]))
    np.savez("d.npz", x=x)
    given = {"quantize": ["-o", "q.onnx"], "auto": ["-o", "q.onnx"], "compare": ["m.onnx"]}[command]
    code, out, err = onnxq(command, "m.onnx", *given, "--data", "d.npz", "--labels", "y.npy")
    n = shape.shape[-1]
    assert code == 2 and not out and not Path("q.onnx").exists()
    assert phrase.format(n=n, m=n - 1, out=shape.name) in err


def test_labels_of_a_metric_of_ones_own_are_its_own_affair():
    model, x, y = labelled()
    quantize(model, "int8", {"x": x}, labels=y + 100, metric=lambda a, b, labels: 0.0, workers=1)
    quantize(model, "int8", {"x": x}, labels=np.stack([y, y], 1), workers=1)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_float_model_at_chance_is_told(onnxq, wrong):
    model, x, y = labelled(wrong=wrong)
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=x, labels=y)
    _, _, err = onnxq("compare", "m.onnx", "m.onnx", "--data", "d.npz")
    assert ("'m.onnx' gets 0.0% of 40 labels right" in err) == wrong
    _, _, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--test", "d.npz", "-r", "int8", "--max-drop", "50")
    assert ("gets 0.0% of 40 labels right" in err) == wrong
    step = {"use": "mixed-precision", "metric": "top1", "method": "nearest", "curve": 2, "samples": 80}
    result = quantize(model, {"pass": [step]}, {"x": np.repeat(x, 2, 0)}, labels=np.repeat(y, 2), workers=1)
    assert any("gets 0.0% of 40 labels right" in note for note in result.report["notes"]) == wrong
    np.savez("d.npz", x=x[:20], labels=y[:20])
    assert "guessing" not in onnxq("compare", "m.onnx", "m.onnx", "--data", "d.npz")[2]
