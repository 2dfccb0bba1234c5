"""`onnxq new-plugin`: a complete plugin package, made of the files in `template/`."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from string import Template

from onnxq_plugins.errors import OnnxqError

TEMPLATE = Path(__file__).parent / "template"  # names end in .in; "module" in them stands for the package's name
_WORD = "[a-z0-9]+"


def new_plugin(name: str, folder: Path = Path()) -> Path:
    """Write folder/name with a working pass, its tests and a README, or nothing at all. Returns the new folder.

    name   vendor and word, such as acme-clip: package acme_clip with the pass acme.clip

    Raises OnnxqError if the name will not do or the folder exists or cannot be written.
    """
    if not re.fullmatch(rf"[a-z][a-z0-9]*(-{_WORD})+", name):
        raise OnnxqError(
            f"plugin name '{name}' must be lower-case words joined by hyphens, the vendor first, such as acme-clip."
        )
    made = folder / name
    if made.exists() or made.is_symlink():
        raise OnnxqError(f"'{made}' exists already; choose another name, or remove it.")
    from onnxq_plugins import __version__

    values = {
        "name": name,
        "module": name.replace("-", "_"),
        "pass_name": name.replace("-", ".", 1),
        "version": __version__,
        "class_name": "".join(word.capitalize() for word in name.split("-")),
    }
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder))
        try:
            for source in sorted(TEMPLATE.rglob("*.in")):
                path = draft / str(source.relative_to(TEMPLATE)).replace("module", values["module"]).removesuffix(".in")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(Template(source.read_text("utf-8")).substitute(values), "utf-8")
            os.chmod(draft, (draft / "tests").stat().st_mode)  # a temporary folder is its owner's alone
            os.rename(draft, made)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise OnnxqError(f"'{made}' cannot be written: {error.strerror}; run this in another folder.") from error
    return made
