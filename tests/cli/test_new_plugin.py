"""Plugin packages for real: made from the template, or samples of the documentation; installed, tested and run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import onnx
import pytest

from onnxq_plugins import OnnxqError
from onnxq_plugins.cli import new_plugin as module
from onnxq_plugins.cli.new_plugin import new_plugin
from onnxq_plugins.testing.models import cnn

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "docs" / "samples"


class Environment:
    """A virtual environment that sees the packages of this one, and this checkout."""

    def __init__(self, folder: Path, *packages: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        here = sysconfig.get_path("purelib")
        there = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        (Path(there) / "parent.pth").write_text(f"import site; site.addsitedir({here!r})\n")
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        # hatchling is there in an environment with the extra "test"; elsewhere pip fetches it
        ready = all(importlib.util.find_spec(name) for name in ("hatchling", "editables"))
        editable = [part for package in packages for part in ("-e", str(package))]
        done = self.run(
            folder,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            *editable,
            *(["--no-build-isolation"] if ready else []),
            check=ready,
        )
        if done.returncode:
            pytest.skip("neither is hatchling installed nor does pip reach a package index")

    def run(self, folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        done = subprocess.run(
            [str(self.python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done


def test_a_new_plugin_installs_passes_its_tests_and_runs_from_a_recipe(tmp_path):
    made = new_plugin("acme-shrink", tmp_path)
    assert made == tmp_path / "acme-shrink" and [p.name for p in tmp_path.iterdir()] == ["acme-shrink"]
    assert not [p for p in made.rglob("*") if p.is_file() and "$" in p.read_text("utf-8")]
    environment = Environment(tmp_path / "venv", made)
    environment.run(made, "-m", "ruff", "check", ".")
    assert " passed" in environment.run(made, "-m", "pytest", "-q", "-p", "no:cacheprovider").stdout
    onnx.save(cnn(), tmp_path / "m.onnx")
    code = "import numpy as np; np.save('x.npy', np.random.default_rng(0).normal(size=(4, 3, 12, 12)).astype('float32'))"
    environment.run(tmp_path, "-c", code)
    environment.run(
        tmp_path,
        "-m",
        "onnxq_plugins.cli",
        "quantize",
        "m.onnx",
        "--data",
        "x.npy",
        "-r",
        str(made / "recipe.toml"),
        "-o",
        "q.onnx",
        "--verify",
    )
    told = {p.key: p.value for p in onnx.load(tmp_path / "q.onnx").metadata_props}
    assert "acme.shrink" in told["onnxq.recipe"] and "acme-shrink==0.1.0" in told["onnxq.versions"]


def test_the_samples_install_pass_their_tests_and_show_in_a_trace(tmp_path):
    copies = [
        Path(shutil.copytree(file.parent, tmp_path / file.parent.name, ignore=shutil.ignore_patterns("__pycache__")))
        for file in sorted(SAMPLES.glob("*/pyproject.toml"))
    ]
    assert [copy.name for copy in copies] == ["acme-edge", "acme-keep"]
    environment = Environment(tmp_path / "venv", *copies)
    for copy in copies:
        environment.run(copy, "-m", "ruff", "check", ".")
    assert (
        " passed"
        in environment.run(
            tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"{copy.name}/tests" for copy in copies)
        ).stdout
    )
    shown = environment.run(tmp_path, "-m", "onnxq_plugins.cli", "plugins", "--trace", "-r", "acme-keep/recipe.toml").stdout
    assert "onnxq_run_pass(step=acme.keep-worst" in shown and "acme-edge [wrapper], the pass itself" in shown
    assert "onnxq_exported(" in shown and "by acme-edge ->" in shown


@pytest.mark.parametrize(
    "name",
    [
        "",
        "acme",
        "Acme-clip",
        "acme_clip",
        "acme-",
        "-clip",
        "1acme-clip",
        "../acme-clip",
        "acme--clip",
        "acme clip",
        "acme-clip\n",
    ],
)
def test_names_that_will_not_do_are_told(name, tmp_path):
    with pytest.raises(OnnxqError, match="such as acme-clip"):
        new_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_exists_is_left_alone(tmp_path):
    (tmp_path / "acme-clip").mkdir()
    (tmp_path / "acme-file").write_text("mine")
    for name in ("acme-clip", "acme-file"):
        with pytest.raises(OnnxqError, match=f"{name}' exists already"):
            new_plugin(name, tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["acme-clip", "acme-file"]


@pytest.mark.parametrize("raised", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays(tmp_path, monkeypatch, raised):
    class Full(module.Template):
        def substitute(self, *args, **kwargs):
            if "tests" in self.template or "recipe" in self.template:
                raise raised
            return super().substitute(*args, **kwargs)

    monkeypatch.setattr(module, "Template", Full)
    with pytest.raises(OnnxqError if isinstance(raised, OSError) else KeyboardInterrupt):
        new_plugin("acme-clip", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_is_told(tmp_path):
    with pytest.raises(OnnxqError, match="cannot be written: No such file or directory"):
        new_plugin("acme-clip", tmp_path / "nowhere")


def test_the_command_says_what_comes_next(tmp_path, monkeypatch, capsys):
    from onnxq_plugins.cli.new_plugin import new_plugin_command

    monkeypatch.chdir(tmp_path)
    new_plugin_command("acme-two-words")
    assert "cd acme-two-words" in capsys.readouterr().out
    assert "AcmeTwoWords" in Path("acme-two-words/acme_two_words/__init__.py").read_text()
    assert json.dumps("acme.two-words") in Path("acme-two-words/recipe.toml").read_text()
    assert Path("acme-two-words").stat().st_mode == Path("acme-two-words/tests").stat().st_mode
