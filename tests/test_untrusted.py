"""A recipe from a stranger imports no code, wherever it names a module; only the command line and Python may."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxq_plugins import OnnxqError, cli, quantize
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.report.curve import point_recipe
from tests import zoo

PASSES = find_plugins().passes
PLACES = [f"{key}.{f}" for key, kind in PASSES.items() for f in kind.__dataclass_fields__]
TABLES = [
    "target",
    "data.path",
    "data.labels",
    "data.layout",
    "weights.block",
    "weights.sub_block",
    "activations.block",
    "pass.use",
    "layer.match",
    "layer.op",
    "plugins",
    "metric",
    "labels",
    "data.metric",
    "data.plugins",
    "pass.metric",
    "recipe",
    "import",
    "hooks",
]
MODEL = zoo.mlp()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory):
    """A module in reach that leaves a mark when it is imported."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted_module.py").write_text(
        f"from pathlib import Path\nPath({str(folder / 'mark')!r}).touch()\ndef planted(*args):\n    return 0.0\n"
    )
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("planted_module", None)


def put(place: str, value: object) -> dict[str, object]:
    """A recipe with a value at a place such as `data.path`, `ranges.method`, `pass.use`, `target`."""
    table, _, key = place.rpartition(".")
    if table == "":
        return {key: value}
    if table in ("pass", "layer"):
        return {table: [{**({"use": "ranges"} if table == "pass" else {}), key: value}]}
    if table in ("data", "weights", "activations"):
        return {table: {key: value}}
    return {"pass": [{"use": table, key: value}]}


VALUES = [f"planted_module{rest}" for rest in (":planted", "", ".planted", ":planted()", ".py")]


@settings(zoo.examples(60), suppress_health_check=list(HealthCheck))
@given(st.sampled_from(TABLES + PLACES), st.sampled_from(VALUES), st.sampled_from([str, list, dict]), st.booleans())
def test_no_place_of_a_recipe_imports(planted: Path, place: str, name: str, kind: type, given_data: bool) -> None:
    value = name if kind is str else [name] if kind is list else {"x": name}
    with contextlib.suppress(OnnxqError):
        quantize(MODEL, put(place, value), zoo.feeds(MODEL, 2) if given_data else None)
    assert "planted_module" not in sys.modules and not (planted / "mark").exists()


def test_every_place_that_takes_text_is_tried(planted: Path) -> None:
    """All places at once, loaded alone: no field may be an import in disguise."""
    for place in TABLES + PLACES:
        for name in VALUES:
            for value in (name, [name], {"x": name}):
                with contextlib.suppress(OnnxqError):
                    load_recipe(put(place, value), PASSES)
    assert "planted_module" not in sys.modules and not (planted / "mark").exists()


def test_nor_do_recipe_files_points_and_metadata(planted: Path, tmp_path: Path) -> None:
    table = {"data": {"path": VALUES[0], "labels": VALUES[0]}, "pass": [{"use": "mixed-precision", "metric": VALUES[0]}]}
    for text, file in ((json.dumps(table), "r.json"), (f'[data]\npath = "{VALUES[0]}"', "r.toml")):
        (tmp_path / file).write_text(text)
        with pytest.raises(OnnxqError):
            quantize(MODEL, tmp_path / file)
    (tmp_path / "p.json").write_text(json.dumps({"recipe": table, "widths": {"a": VALUES[0]}}))
    with pytest.raises(OnnxqError):
        quantize(MODEL, point_recipe(tmp_path / "p.json")[0])
    assert "planted_module" not in sys.modules and not (planted / "mark").exists()


def test_the_command_line_may(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would prove nothing."""
    (tmp_path / "m.onnx").write_bytes(MODEL.SerializeToString())
    np.savez(tmp_path / "d.npz", **zoo.batch(zoo.feeds(MODEL, 2)))
    files = [str(tmp_path / name) for name in ("m.onnx", "q.onnx", "d.npz")]
    files = [str(tmp_path / name) for name in ("m.onnx", "q.onnx", "d.npz")]
    command = ["onnxq", "quantize", files[0], "-o", files[1], "--data", files[2], "--metric", VALUES[0]]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code in (0, None) and (planted / "mark").exists()
    (planted / "mark").unlink()
    sys.modules.pop("planted_module")
