"""The index of plugins of others."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from onnxq_plugins.cli.listed import index_file, listed

SAMPLES = Path(__file__).parents[2] / "docs" / "samples"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("aciq", ["acme.aciq"]),
        ("1810.05723", ["acme.aciq"]),
        ("Outlier FLOAT", ["acme.side-path"]),
        ("target", ["acme.edge"]),
    ],
)
def test_words_are_looked_for_in_all_texts(words, names, onnxq):
    assert [entry.name for entry in listed(words)] == names
    ran = onnxq("plugins", "--search", words)
    assert ran.code == 0 and names[0] in ran.out and "pip install ./docs/samples/" in ran.out
    assert ran.out.count("\n") == 2


def test_without_a_word_all_are_listed(onnxq):
    assert onnxq("plugins", "--search").out.count("pip install") == len([*listed()]) > 2


def test_what_is_not_there_is_told(onnxq):
    ran = onnxq("plugins", "--search", "nothing of this kind")
    assert ran.code == 2 and "no plugin of the index is about 'nothing of this kind'" in ran.err
    assert "leave one out" in onnxq("plugins", "--search", "--trace").err


def test_entries_are_what_the_samples_bring():
    """Each sample is listed, with its own package, and each entry says what it is."""
    projects = {file.parent.name: tomllib.loads(file.read_text())["project"] for file in SAMPLES.glob("*/pyproject.toml")}
    assert {entry.package for entry in listed()} == {project["name"] for project in projects.values()}
    for entry in listed():
        folder = SAMPLES.parents[1] / entry.install
        module = next(folder.glob("*/__init__.py")).read_text()
        assert f'"{entry.name}"' in module and entry.kind in ("pass", "target") and len(entry.about) < 120


def test_the_index_comes_with_the_package():
    project = tomllib.loads((SAMPLES.parents[1] / "pyproject.toml").read_text())
    inside = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert inside["docs/plugins.toml"] == "onnxq_plugins/plugins.toml" and index_file().is_file()
