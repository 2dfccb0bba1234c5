"""onnxruntime-web: onnxruntime compiled to WebAssembly, as browsers run it, asked in node.

Its optimized graph cannot be saved (there is no file system inside), but its profile tells the kernels that ran."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.reading import read
from onnxq_plugins.runtimes.apart import CHILDREN, ask
from onnxq_plugins.runtimes.kernels import coded, from_profile
from onnxq_plugins.runtimes.runtime import Inspection, Runtime
from onnxq_plugins.spec import Array

_INSTALL = "npm install onnxruntime-web"


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    node = shutil.which(str(settings["node"]))
    if node is None:
        raise OnnxqError(
            f"onnxruntime-web is asked in node, and '{settings['node']}' is not there; install Node.js 18 or newer, then "
            f"{_INSTALL} in a folder that --set modules=FOLDER names."
        )
    modules = _modules(str(settings["modules"]))
    program: list[str | Path] = [node, CHILDREN / "web.mjs"]
    answer, outputs = ask(program, "onnxruntime-web", file, samples, settings["seconds"], modules=str(modules), times=0.5)
    if answer.get("missing"):
        raise OnnxqError(f"onnxruntime-web is not installed in '{modules}'; {_INSTALL} there, or --set modules=FOLDER.")
    if "error" in answer:
        raise OnnxqError(f"onnxruntime-web {answer.get('version', '')} cannot run '{file.name}': {answer['error'][:300]}")
    operators = from_profile(_events(answer["stdout"]), coded(read(file).graph))
    return Inspection(outputs, tuple(operators), answer["milliseconds"], {"version": answer["version"]})


def _modules(setting: str) -> Path:
    """The folder that has node_modules, or is named so."""
    folder = Path(setting or os.environ.get("NODE_PATH", "").split(os.pathsep)[0] or ".").resolve()
    return folder.parent if folder.name == "node_modules" else folder


def _events(text: str) -> Iterator[Mapping[str, Any]]:
    """The events of a profile that was printed, one a line."""
    for line in text.splitlines():
        if line.startswith('{"cat"'):
            yield json.loads(line.rstrip().rstrip(","))


WEB = Runtime(
    "web",
    "onnxruntime-web (WebAssembly), as browsers run it; asked in node",
    _INSTALL,
    _inspect,
    settings={"modules": "", "node": "node", "seconds": 600.0},
)
