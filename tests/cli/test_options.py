"""Options: their panels in --help, groups that several commands share, and what becomes of them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import onnxq_plugins
from onnxq_plugins import cli, quantize
from onnxq_plugins.cli.options import OptionGroup, flatten
from onnxq_plugins.export.provenance import recipe_of
from tests.data.pictures import write_png

IMAGES = ("resize", "crop", "size", "letterbox", "padding", "bgr", "range", "mean", "std", "state", "layout")


def test_options_reach_the_engine(ready, monkeypatch):
    passed = {}

    def spy(model, recipe, data, **options):
        passed.update(options, recipe=recipe, data=data)
        return quantize(model, recipe, data, **{**options, "track": onnxq_plugins.calibration.statistics.silent})

    monkeypatch.setattr(cli.quantization, "quantize", spy)
    ran = ready(
        "quantize",
        "model.onnx",
        "--data",
        "data.npz",
        "--samples",
        2,
        "--seed",
        5,
        "--workers",
        1,
        "--cache",
        "c",
        "--verify",
        "--set",
        "ranges.method=mse",
        "--mean",
        "0.5",
        "--resize",
        9,
    )
    assert ran.code == 0
    expected = {
        "samples": 2,
        "seed": 5,
        "workers": 1,
        "cache": Path("c"),
        "verify": True,
        "float32": False,
        "target": None,
        "data": "data.npz",
        "recipe": "int8",
    }
    assert {key: passed[key] for key in expected} == expected
    assert passed["settings"] == ["data.resize=9", "data.mean=[0.5]", "ranges.method=mse"]
    assert any(Path("c").iterdir())


def test_a_callable_as_data(ready):
    Path("my_data.py").write_text(
        "import numpy as np\n\ndef make():\n    for n in range(3):\n"
        "        yield {'x': np.full((1, 3, 12, 12), n, np.float32)}\n"
    )
    ran = ready("quantize", "model.onnx", "--data", "my_data:make", "--report", "report.json")
    assert ran.code == 0, ran.err


def test_a_folder_of_images_as_data(ready):
    Path("pictures").mkdir()
    for n in range(5):
        write_png(f"pictures/{n}.png", 20, 16)
    Path("pictures/notes.txt").write_text("not an image")
    ran = ready(
        "quantize",
        "model.onnx",
        "--data",
        "pictures",
        "--resize",
        14,
        "--crop",
        12,
        "--mean",
        "0.485,0.456,0.406",
        "--std",
        "0.229,0.224,0.225",
        "--samples",
        3,
    )
    assert ran.code == 0, ran.err


def test_images_as_detectors_want_them(ready):
    Path("pictures").mkdir()
    for n in range(8):
        write_png(f"pictures/{n}.png", 20, 16, seed=n)
    size = ("--size", "12x12", "--letterbox", "--padding", 0, "--bgr", "--range", 255)
    ran = ready("quantize", "model.onnx", "--data", "pictures", *size, "-o", "q.onnx")
    assert ran.code == 0 and "RGB/255" not in ran.err, ran.err
    data = recipe_of("q.onnx")[0]["data"]
    assert data == {"size": [12, 12], "letterbox": True, "padding": 0, "bgr": True, "range": 255.0}


def test_version(onnxq):
    assert onnxq("--version").out == f"onnxq-plugins {onnxq_plugins.__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(onnxq, command):
    ran = onnxq(command, "--help")
    assert ran.code == 0
    assert len(ran.out) > 100
    assert command in onnxq("--help").out


def test_options_of_quantize_are_in_panels(onnxq):
    lines = onnxq("quantize", "--help").out.splitlines()
    panels: dict[str, list[str]] = {}
    for line in lines:
        if title := re.match(r"╭─ (\w+) ─", line):
            options = panels.setdefault(title[1], [])
        elif option := re.match(r"│ (--[\w-]+)", line):
            options.append(option[1])
    assert panels == {
        "Arguments": [],
        "Options": ["--help"],
        "Data": [f"--{name}" for name in ("data", "samples", "labels", *IMAGES)],
        "Recipe": ["--recipe", "--set", "--exclude", "--target", "--seed", "--float32"],
        "Output": ["--output", "--report", "--test", "--save-plan", "--overrides", "--names", "--keep"],
        "Search": ["--curve", "--metric", "--min-sqnr", "--min-speed", "--class-axis", "--plan"],
        "Work": ["--no-check", "--workers", "--cache", "--custom-ops", "--dask", "--processes", "--verify", "--trace"],
    }


def test_a_group_of_options_is_one_parameter_of_a_command():
    """Also where the group has an option without a default, which follows one that has."""

    @dataclass(frozen=True)
    class Size(OptionGroup):
        width: Annotated[int, typer.Option()]
        tall: Annotated[bool, typer.Option("--tall")] = False

    calls = []

    def draw(path: Annotated[Path, typer.Argument()], color: str = "red", *, size: Size, names: list[str] | None = None):
        """Draw."""
        calls.append((path, color, size, names))

    draw.__annotations__["size"] = Size  # a local class is no global for get_type_hints
    draw.__annotations__ |= {"path": Annotated[Path, typer.Argument()], "color": str, "names": list[str] | None}
    app = typer.Typer()
    app.command()(flatten(draw))
    runner = CliRunner()
    assert runner.invoke(app, ["a.png", "--width", "3", "--tall", "--names", "b"]).exit_code == 0
    assert runner.invoke(app, ["--width", "4", "--color", "blue", "a.png"]).exit_code == 0
    assert calls[0] == (Path("a.png"), "red", Size(3, True), ["b"])
    assert calls[1][:3] == (Path("a.png"), "blue", Size(4))
    assert runner.invoke(app, ["a.png"]).exit_code == 2  # --width is missing
    assert "size" not in inspect.signature(flatten(draw)).parameters and flatten(draw).__doc__ == "Draw."


@pytest.mark.parametrize(
    ("options", "note"), [([], "images were read as RGB/255"), (["--mean", "0.5", "--std", "0.25"], "")]
)
def test_notes_on_images(ready, options, note):
    Path("pictures").mkdir()
    for n in range(8):
        write_png(f"pictures/{n}.png", seed=n)
    ran = ready("quantize", "model.onnx", "--data", "pictures", *options)
    assert ran.code == 0 and (note in ran.err if note else "note" not in ran.err)


def test_image_options_beside_arrays_get_a_note(ready):
    ran = ready("quantize", "model.onnx", "--data", "data.npz", "--mean", "0.5")
    assert ran.code == 0 and "--mean apply to folders of images only" in ran.err


def test_weight_only_needs_no_data(ready):
    ran = ready(
        "quantize", "model.onnx", "--set", "activations.bits=32", "--set", "weights.bits=4", "--set", "weights.block=32"
    )
    assert ran.code == 0 and "bias-correct was skipped" in ran.err
