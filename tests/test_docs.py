"""What the documentation shows, runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import onnxq_plugins as onnxq
from onnxq_plugins.cli import app, costs, main
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import builtin_recipes, parse
from onnxq_plugins.testing import CHECKS
from tests.zoo import LONG_CHECKS, slowly, some

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def test_python_example_of_the_readme(tmp_path, monkeypatch):
    (code,) = blocks(ROOT / "README.md", "python")
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(digits_model_path().read_bytes())
    samples = digits_split()["calibration_images"][:, None]
    exec(code.replace('"input"', '"image"'), {"samples": samples})
    assert Path("model.int8.onnx").is_file()


@pytest.fixture
def acme(monkeypatch):
    """The smallest plugin, as the page on plugins has it."""
    module = types.ModuleType("acme")
    monkeypatch.setitem(sys.modules, "acme", module)
    exec(blocks(ROOT / "docs" / "write-a-plugin.md", "python")[0], module.__dict__)
    return module


def test_the_smallest_plugin_has_11_lines_and_works(acme, tmp_path, monkeypatch):
    smallest, example, *_ = blocks(ROOT / "docs" / "write-a-plugin.md", "python")
    assert sum(bool(line.strip()) for line in smallest.splitlines()) == 11
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(digits_model_path().read_bytes())
    np.savez("samples.npz", image=digits_split()["calibration_images"][:8])
    told: dict[str, onnxq.Result] = {}
    exec(example, told)
    bits = [spec.bits for spec in told["result"].plan.values() if spec.codes is not None]
    assert bits.count(8) == 1 and bits.count(4) == len(bits) - 1 > 0


@pytest.mark.parametrize("name", some(CHECKS, *(name for name in CHECKS if name not in LONG_CHECKS)))
def test_the_smallest_plugin_conforms(acme, name):
    made: dict[str, Callable[..., None]] = {}
    exec(next(b for b in blocks(ROOT / "docs" / "write-a-plugin.md", "python") if "parametrize" in b), made)
    (mark,) = made["test_keep_last"].pytestmark
    step, check = next(case.values for case in mark.args[1] if case.id == f"acme.keep-last-{name.removeprefix('check_')}")
    made["test_keep_last"](step, check)


def test_the_lines_that_add_operators_are_those_of_the_sample():
    page = blocks(ROOT / "docs" / "write-a-plugin.md", "python")[2]
    sample = (ROOT / "docs" / "samples" / "acme-side" / "acme_side" / "__init__.py").read_text("utf-8")
    for line in (
        'graph.add_node("Gather", "", [name, at], axis=-1)',
        'graph.add_node("Add", "", [own, side.outputs[0]], [output])',
    ):
        assert line in page and line in sample
    for call in set(re.findall(r"job\.(\w+)\(", (ROOT / "docs" / "write-a-plugin.md").read_text("utf-8"))):
        assert hasattr(onnxq.Job, call), call


def test_every_check_is_documented():
    text = (ROOT / "docs" / "write-a-plugin.md").read_text("utf-8")
    assert re.findall(r"^\| `(check_\w+)` ", text, re.MULTILINE) == list(CHECKS)
    assert all(check.__doc__ and "Why:" in check.__doc__ for check in CHECKS.values())


def test_recipe_example_is_valid():
    whole, changes = blocks(ROOT / "docs" / "recipes.md", "toml")
    made = parse(tomllib.loads(whole), find_plugins().passes)
    assert [step.name for step in made.passes] == ["ranges"] and len(made.layers) == 2
    extended = find_plugins().recipe(tomllib.loads(changes))
    assert {"ranges", "reorder", "equalize"} <= {step.name for step in extended.passes}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_links_exist(page):
    text = page.read_text("utf-8")
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    used = set(re.findall(r"^onnxq ([\w-]+)", text, re.MULTILINE)) | set(re.findall(r"`onnxq ([\w-]+)", text))
    assert used <= known
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target


def test_what_a_release_says_of_itself():
    """The changelog begins with the version; extras that anything names exist, and so do the Pythons that are promised."""
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert first and first[1] == onnxq.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    sources = [*PAGES, *(ROOT / "onnxq_plugins").rglob("*.py"), *(ROOT / "docs" / "examples").glob("*")]
    named = {name for file in sources for name in re.findall(r"onnxq-plugins\[(\w+)\]", file.read_text("utf-8"))}
    assert {"ir", "olive", "openvino", "report"} <= named <= set(project["optional-dependencies"])
    pythons = {found for line in project["classifiers"] for found in re.findall(r":: (3\.\d+)$", line)}
    (tried,) = re.findall(r"for version in (.*); do", (ROOT / ".ci" / "release").read_text("utf-8"))
    assert pythons == set(tried.split()) and f">={min(pythons)}" == project["requires-python"]


def test_every_hook_pass_target_and_recipe_is_documented():
    text = "\n".join(page.read_text("utf-8") for page in [*PAGES, ROOT / "CHANGELOG.md"])
    plugins = find_plugins()
    hooks = [name for name in dir(__import__("onnxq_plugins.hookspecs").hookspecs) if name.startswith("onnxq_")]
    for name in [*plugins.passes, *plugins.targets, *hooks, *builtin_recipes()]:
        assert name in text, name


def test_numpy_is_not_needed_to_read_a_result():
    """The report is plain values; np scalars would break json.dumps for the user."""
    result = onnxq.quantize(digits_model_path(), "int8", digits_split()["calibration_images"][:4])
    todo = [result.report]
    while todo:
        value = todo.pop()
        assert not isinstance(value, np.generic)
        todo += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []


def type_in(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of a console."""
    monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, line


@pytest.fixture
def brief(quick, monkeypatch, tmp_path):
    """Latencies and costs of kernels in a moment, kept for nobody else."""
    measured = costs.measured
    monkeypatch.setattr(costs, "measured", lambda rounds, **more: measured(2, **{**more, "seconds": 0.02}))
    monkeypatch.setenv("ONNXQ_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("left_out", ["onnxq auto ", *slowly("nothing")])
def test_the_readme_runs_as_it_is_typed(left_out, tmp_path, monkeypatch, brief):
    """Its commands, the one in its table included, on files of the names that it gives them."""
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(digits_model_path().read_bytes())
    data = digits_split()
    np.savez("samples.npz", image=data["calibration_images"])
    np.savez("test.npz", image=data["test_images"], labels=data["test_labels"])
    lines = [line for block in blocks(ROOT / "README.md", "console") for line in block.splitlines()]
    lines += re.findall(r"`(onnxq compare [^`]+)`", (ROOT / "README.md").read_text("utf-8"))
    typed = [line for line in lines if line.startswith("onnxq ")]
    assert len(typed) > 10 and all(line.startswith("pip ") for line in set(lines) - set(typed))
    for line in typed:
        if not line.startswith(left_out):
            type_in(line, monkeypatch)


def test_the_readme_is_short_and_its_figures_are_measured():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.count("\n") <= 120 and "(docs/report.png)" in text
    measured = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (ROOT / "docs" / "benchmarks.md").read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    rows = re.findall(r"^\|.*\(`(\w+)`\) \| (\d+) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) >= 8
    for name, size, theirs, ours in rows:
        own = {row[1]: row for row in measured if row[0] == name and len(row) == 9}
        assert own["float"][5] == size
        for tool, told in (("ort-static", theirs), ("onnxq int8", ours)):
            row = own[tool]
            assert told == f"{row[2].split()[0]} dB, {row[4]}x, {row[5]} kB", name


@pytest.mark.parametrize("left_out", ["onnxq auto ", *slowly("nothing")])  # half of the time; tests/cli/test_auto.py
def test_the_tutorial_runs_as_it_is_typed(left_out, tmp_path, monkeypatch, brief):
    """A recipe goes to the file that its first line names; the line for OpenVINO runs where that is installed."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    left = (left_out,) if importlib.util.find_spec("openvino") else (left_out, "onnxq audit fixed.openvino.onnx")
    for language, code in re.findall(r"```(console|python|toml)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(code, {})
        elif language == "toml":
            Path(code.partition("\n")[0].removeprefix("# ")).write_text(code)
        else:
            for line in (line for line in code.splitlines() if not line.startswith(left)):
                type_in(line, monkeypatch)
    assert Path("fixed.onnx").stat().st_size < 0.25 * Path("onnxq-quickstart/digits.onnx").stat().st_size


def test_the_error_messages_of_the_page_are_those_of_the_code():
    sources = "".join(file.read_text("utf-8") for file in sorted((ROOT / "onnxq_plugins").rglob("*.py")))
    plain = re.sub(r'"\s*f?"', "", sources)  # strings over several lines
    for heading in re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE):
        parts = [part.strip(" '") for part in heading.split("...")]
        assert all(part in plain for part in parts) or heading == "wants float32, the data is uint8", heading


def test_the_site_has_a_page_for_every_pass():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    made, found = site.pages(), find_plugins()
    for name, kind in found.passes.items():
        page = made[f"passes/{name}.md"]
        for f in dataclasses.fields(kind):
            (row,) = (line for line in page.splitlines() if line.startswith(f"| `{f.name}` |"))
            assert row.rstrip("| ").count("|") >= 4, f"{name}.{f.name} is not explained"  # a text, not only its default
        figures = page.partition("\n## Measured\n")[2]
        assert re.search(r"^\|---.*\n\|.*\d", figures, re.MULTILINE), f"{name} has no figures"
        assert "\n**Source:**" in page and "\n```text\n" in page, f"{name} names no source, or no formula"
