"""The programs of docs/edge.md run, each where its runtime is installed, and give onnxruntime's class."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import onnxq_plugins as onnxq
from onnxq_plugins import runtimes
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.plugins import find_plugins
from tests.edge.test_runtimes import QNN_PYTHON, WEB_MODULES, needs

PAGE = Path(__file__).parents[2] / "docs" / "edge.md"
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL))
TARGETS = {"onnxruntime": "ort-cpu", "opencv": "qoperator", "tract": "portable"}


@pytest.mark.parametrize("name", SECTIONS)
def test_the_program_of_a_runtime_gives_the_class(name, tmp_path):
    needs(name)
    target = TARGETS.get(name, name)
    samples = digits_split()["calibration_images"][:, None]
    result = onnxq.quantize(digits_model_path(), "int8", samples[:16], target=target, check=False)
    result.save(tmp_path / f"model.{target}.onnx")
    sample = np.ascontiguousarray(samples[20])
    np.save(tmp_path / "sample.npy", sample)
    sample.tofile(tmp_path / "sample.f32")
    ((language, code),) = re.findall(r"```(python|js)\n(.*?)```", SECTIONS[name], re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 12
    if language == "js":
        (tmp_path / "node_modules").symlink_to(Path(WEB_MODULES) / "node_modules")
        program, command = tmp_path / "program.mjs", shutil.which("node")
    else:
        program, command = tmp_path / "program.py", QNN_PYTHON or sys.executable if name == "qnn" else sys.executable
    program.write_text(code, "utf-8")
    done = subprocess.run([command, program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    expected = runtimes.session(digits_model_path()).run(None, {"image": sample})[0].argmax()
    assert int(done.stdout.split()[-1]) == expected


def test_every_runtime_of_a_target_is_on_the_page():
    text = PAGE.read_text("utf-8")
    for target in find_plugins().targets.values():
        if target.runtime is not None:
            assert f"| `{target.runtime.name}` | `{target.name}` |" in text, target.name
