"""`onnxq new-plugin`: a complete plugin package, made from the files in `templates/`."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from string import Template
from typing import Annotated, Literal

import typer

from onnxq_plugins.cli.console import echo
from onnxq_plugins.errors import OnnxqError

TEMPLATES = Path(__file__).parent / "templates"  # names end in .in; "module" in them stands for the package's name
Kind = Literal["pass", "target"]
_WORD = "[a-z0-9]+"


def new_plugin(name: str, folder: Path = Path(), kind: Kind = "pass") -> Path:
    """Write folder/name with a working pass or target, its tests and a README, or nothing at all. Returns the new folder.

    name   vendor and word, such as acme-clip: package acme_clip with the pass, or target, acme.clip

    Raises OnnxqError for a name of another form, or if the folder exists or cannot be written.
    """
    if not re.fullmatch(rf"[a-z][a-z0-9]*(-{_WORD})+", name):
        raise OnnxqError(
            f"plugin name '{name}' must be lower-case words joined by hyphens, the vendor first, such as acme-clip."
        )
    package = folder / name
    if package.exists() or package.is_symlink():
        raise OnnxqError(f"'{package}' exists already; choose another name, or remove it.")
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder))
        try:
            _fill(draft, name, kind)
            os.chmod(draft, (draft / "tests").stat().st_mode)  # mkdtemp's folder is private to its owner
            os.rename(draft, package)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise OnnxqError(f"'{package}' cannot be written: {error.strerror}; run this in another folder.") from error
    return package


def _fill(folder: Path, name: str, kind: Kind) -> None:
    """Write the template's files, with the plugin's names, into a folder."""
    from onnxq_plugins import __version__

    values = {
        "name": name,
        "module": name.replace("-", "_"),
        "pass_name": name.replace("-", ".", 1),
        "version": __version__,
        "class_name": "".join(word.capitalize() for word in name.split("-")),
        "constant": name.partition("-")[2].replace("-", "_").upper(),
        "title": "".join(word.capitalize() for word in name.split("-")),
        "vendor": name.partition("-")[0],
    }
    if values["constant"][0].isdigit():  # no name of Python begins so
        values["constant"] = f"TARGET_{values['constant']}"
    for source in sorted((TEMPLATES / kind).rglob("*.in")):
        path = folder / str(source.relative_to(TEMPLATES / kind)).replace("module", values["module"]).removesuffix(".in")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(source.read_text("utf-8")).substitute(values), "utf-8")


def new_plugin_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="vendor and word, such as acme-clip", show_default=False)],
    kind: Annotated[Kind, typer.Option(help="what it brings: a pass, or a target")] = "pass",
) -> None:
    """Write a plugin package into ./NAME: a working pass or target, tests with the conformance kit, README."""
    package = new_plugin(name, kind=kind)
    echo(f"{package} has a {kind}, its tests and a README; next:\n  cd {package}\n  pip install -e '.[test]'\n  pytest")
