"""onnxq auto: what its samples can decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from tests.zoo import labelled


def test_auto_tells_what_its_samples_can_decide(onnxq):
    model, x, _ = labelled(62)
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=x)
    code, out, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--max-drop", "0", "--metric", "agreement")
    assert "one of 31 samples is 3.2 points, more than the drop of 0" in err and " kB" in out
    assert sum(line.startswith(" int8 ") for line in out.splitlines()) == 1 and "int8  drop" not in err  # told once
    _, _, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--max-drop", "5", "-r", "int8", "-r", "nope")
    assert "points" not in err
    _, _, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--test", "./d.npz", "-r", "nope", "-r", "int8")
    assert "models are made with, which flatters" in err and "recipe 'nope' is not possible" in err
    code, _, err = onnxq("auto", "m.onnx", "--data", "d.npz", "--metric", "sqnr", "--min-sqnr", "300")
    assert code == 1 and "no recipe stays at 300 dB" in err and Path("m.auto.onnx").exists()


def test_a_drop_below_zero_is_explained(onnxq, monkeypatch):
    model, x, _ = labelled(20)
    onnx.save(model, "m.onnx")
    np.savez("d.npz", x=x)
    scores = iter([1.0, 3.0])
    Path("mine.py").write_text("scores = iter([1.0, 3.0])\ndef judge(*_):\n    return next(scores)\n")
    monkeypatch.syspath_prepend(Path().absolute())
    _, out, _ = onnxq("auto", "m.onnx", "--data", "d.npz", "--metric", "mine:judge")
    assert "-2.00" in out and "below 0: better than float on these samples" in out and next(scores) == 1
