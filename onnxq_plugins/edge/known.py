"""The runtimes that can be asked: those that are built in, and those of installed targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.plugins import Plugins
from onnxq_plugins.runtimes.micro import MICRO
from onnxq_plugins.runtimes.onnxruntime import ONNXRUNTIME
from onnxq_plugins.runtimes.opencv import OPENCV
from onnxq_plugins.runtimes.openvino import OPENVINO
from onnxq_plugins.runtimes.qnn import QNN
from onnxq_plugins.runtimes.runtime import Runtime
from onnxq_plugins.runtimes.tract import TRACT
from onnxq_plugins.runtimes.web import WEB

BUILTIN = (ONNXRUNTIME, OPENVINO, QNN, WEB, TRACT, OPENCV, MICRO)


def known_runtimes(plugins: Plugins) -> dict[str, Runtime]:
    """By name."""
    brought = {target.runtime.name: target.runtime for target in plugins.targets.values() if target.runtime is not None}
    return {runtime.name: runtime for runtime in BUILTIN} | brought


def find_runtime(name: str, plugins: Plugins) -> Runtime:
    """The runtime of that name. Raises OnnxqError listing the known ones."""
    there = known_runtimes(plugins)
    if name not in there:
        raise OnnxqError(f"runtime '{name}' is unknown; {known(name, there)}." + plugins.excuse())
    return there[name]


def told(runtime: Runtime, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a runtime, with what the user gives as text or as values. Raises OnnxqError for a setting that it does
    not have, or a value of another type."""
    problems, values = [], dict(runtime.settings)
    for key, value in settings.items():
        if key not in values:
            problems.append(f"runtime '{runtime.name}' has no setting '{key}'; {known(key, sorted(values))}.")
            continue
        kind = type(values[key])
        try:
            values[key] = kind(value)
        except (TypeError, ValueError):
            problems.append(f"runtime '{runtime.name}': {key} = {value!r} must be of type {kind.__name__}.")
    OnnxqError.check(problems)
    return values
