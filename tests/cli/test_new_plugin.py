"""Real plugin packages, from the template or the documentation's samples: installed, tested and run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxq_plugins import OnnxqError, quantize
from onnxq_plugins.cli import new_plugin as module
from onnxq_plugins.cli.new_plugin import new_plugin
from onnxq_plugins.testing.models import cnn
from tests.zoo import slowly

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "docs" / "samples"


class Environment:
    """A virtual environment that sees the packages of this one, and this checkout.

    packages   are installed from their folders, as their authors do; `wheels` from wheels made of them, as users do
    """

    def __init__(self, folder: Path, packages: list[Path], wheels: list[Path]) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        outer = sysconfig.get_path("purelib")
        inner = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
        (Path(inner) / "parent.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        # the extra "test" installs hatchling; without it pip fetches it
        has_builder = all(importlib.util.find_spec(name) for name in ("hatchling", "editables"))
        alone = ["--quiet", "--no-deps", *(["--no-build-isolation"] if has_builder else [])]
        made = folder / "wheels"
        steps = [
            ["wheel", *alone, "-w", str(made), *map(str, wheels)],
            ["install", *alone, *(part for package in packages for part in ("-e", str(package)))],
        ]
        for arguments in steps:
            if self.run(folder, "-m", "pip", *arguments, check=has_builder).returncode:
                pytest.skip("hatchling is not installed, and pip reaches no package index")
        self.run(folder, "-m", "pip", "install", *alone, *map(str, sorted(made.iterdir())))

    def run(self, folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment.pop("PYTEST_ADDOPTS", None)
        process = subprocess.run(
            [str(self.python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert not check or process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
        return process


SHORT = "not (odd_graphs or targets or twice or not_harmful or float_function or repeatable)"


def without_guests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The file that the recipe int8 makes where no plugin is installed."""
    monkeypatch.setattr("onnxq_plugins.plugins.entry_points", lambda group: ())
    quantize(folder / "m.onnx", "int8", folder / "x.npy", output=folder / "alone.onnx", check=False)
    return (folder / "alone.onnx").read_bytes()


@pytest.mark.parametrize("tests", [SHORT, *slowly("")])
def test_packages_install_pass_their_tests_run_from_a_recipe_and_appear_in_a_trace(tests, tmp_path, monkeypatch):
    """A new plugin and the samples of the documentation, in one environment."""
    new = new_plugin("acme-shrink", tmp_path)
    assert new == tmp_path / "acme-shrink" and [p.name for p in tmp_path.iterdir()] == ["acme-shrink"]
    assert not [p for p in new.rglob("*") if p.is_file() and "$" in p.read_text("utf-8")]
    samples = [
        Path(shutil.copytree(file.parent, tmp_path / file.parent.name, ignore=shutil.ignore_patterns("__pycache__")))
        for file in sorted(SAMPLES.glob("*/pyproject.toml"))
    ]
    assert [sample.name for sample in samples] == ["acme-aciq", "acme-edge", "acme-keep", "acme-side"]
    templates = [new, new_plugin("acme-npu", tmp_path, "target")]
    packages = [*templates, *samples]
    environment = Environment(tmp_path / "venv", templates, samples)
    for package in packages:
        environment.run(package, "-m", "ruff", "check", ".")
    places = (
        "import acme_aciq, acme_edge, acme_keep, acme_side as s; print(acme_aciq.__file__, acme_edge.__file__, s.__file__)"
    )
    assert environment.run(tmp_path, "-c", places).stdout.count("site-packages") == 3

    folders = [f"{package.name}/tests" for package in packages]
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.conftest", "-k", tests]
    assert " passed" in environment.run(tmp_path, "-m", "pytest", *options, *folders).stdout

    onnx.save(cnn(), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(4, 3, 12, 12)).astype(np.float32))
    command = "-m onnxq_plugins.cli quantize m.onnx --data x.npy -r acme-shrink/recipe.toml -o q.onnx --verify"
    environment.run(tmp_path, *command.split())
    metadata = {p.key: p.value for p in onnx.load(tmp_path / "q.onnx").metadata_props}
    assert "acme.shrink" in metadata["onnxq.recipe"] and "acme-shrink==0.1.0" in metadata["onnxq.versions"]

    command = "-m onnxq_plugins.cli quantize m.onnx --data x.npy -r int8 --target acme.npu -o npu.onnx"
    environment.run(tmp_path, *command.split())
    assert json.loads((tmp_path / "npu.acme.json").read_text())["soc"] == 2
    npu = onnx.load(tmp_path / "npu.onnx")
    zeros = {t.name: onnx.numpy_helper.to_array(t) for t in npu.graph.initializer}
    quantizers = [node for node in npu.graph.node if node.op_type == "QuantizeLinear"]
    assert quantizers and all(zeros[n.input[2]].dtype == np.int8 and zeros[n.input[2]] == 0 for n in quantizers)

    command = "-m onnxq_plugins.cli quantize m.onnx --data x.npy -r int8 -o guests.onnx --no-check"
    environment.run(tmp_path, *command.split())
    assert (tmp_path / "guests.onnx").read_bytes() == without_guests(tmp_path, monkeypatch)

    trace = environment.run(tmp_path, "-m", "onnxq_plugins.cli", "plugins", "--trace", "-r", "acme-keep/recipe.toml").stdout
    assert "onnxq_run_pass(step=acme.keep-worst" in trace and "acme-edge [wrapper], the pass itself" in trace
    assert "onnxq_exported(" in trace and "by acme-edge ->" in trace


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
def test_bad_names_are_refused(name, tmp_path):
    with pytest.raises(OnnxqError, match="such as acme-clip"):
        new_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_or_folder_is_kept(tmp_path):
    (tmp_path / "acme-clip").mkdir()
    (tmp_path / "acme-file").write_text("mine")
    for name in ("acme-clip", "acme-file"):
        with pytest.raises(OnnxqError, match=f"{name}' exists already"):
            new_plugin(name, tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["acme-clip", "acme-file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    class Full(module.Template):
        def substitute(self, *args, **kwargs):
            if "tests" in self.template or "recipe" in self.template:
                raise error
            return super().substitute(*args, **kwargs)

    monkeypatch.setattr(module, "Template", Full)
    with pytest.raises(OnnxqError if isinstance(error, OSError) else KeyboardInterrupt):
        new_plugin("acme-clip", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OnnxqError, match="cannot be written: No such file or directory"):
        new_plugin("acme-clip", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["acme-npu", "acme-npu-lite", "acme-3d"])
def test_a_target_of_any_name_is_valid_python(name, tmp_path):
    package = new_plugin(name, tmp_path, "target")
    for file in package.rglob("*.py"):
        compile(file.read_text("utf-8"), str(file), "exec")
    assert f'"{name.replace("-", ".", 1)}"' in (package / name.replace("-", "_") / "__init__.py").read_text("utf-8")
    assert not [p for p in package.rglob("*") if p.is_file() and "$" in p.read_text("utf-8")]


def test_the_command_prints_the_next_steps(tmp_path, monkeypatch, capsys):
    from onnxq_plugins.cli.new_plugin import new_plugin_command

    monkeypatch.chdir(tmp_path)
    new_plugin_command("acme-two-words")
    assert "cd acme-two-words" in capsys.readouterr().out
    assert "AcmeTwoWords" in Path("acme-two-words/acme_two_words/__init__.py").read_text()
    assert json.dumps("acme.two-words") in Path("acme-two-words/recipe.toml").read_text()
    assert Path("acme-two-words").stat().st_mode == Path("acme-two-words/tests").stat().st_mode
