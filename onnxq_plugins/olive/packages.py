"""Olive's list of passes with ours added. Olive knows no passes but those of one such list, which replaces its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olive.package_config import OlivePackageConfig

_OURS = {
    "module_path": "onnxq_plugins.olive.OnnxqQuantization",
    "supported_providers": ["*"],
    "supported_accelerators": ["*"],
    "supported_precisions": ["*"],
    "supported_algorithms": [],
    "supported_quantization_encodings": ["qdq"],
    "dataset": "dataset_optional",
    "module_dependencies": ["onnxq-plugins"],
}


def package_config(base: str | Path | None = None) -> dict[str, Any]:
    """What `olive run --package-config` takes, and `olive.run(..., package_config=...)`: all passes of the installed Olive,
    and OnnxqQuantization.

    base   another list to add it to, for pipelines that have passes of their own
    """
    known: dict[str, Any] = json.loads(Path(base or OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    return {**known, "passes": {**known.get("passes", {}), "OnnxqQuantization": _OURS}}
