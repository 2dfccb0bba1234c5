"""The four hooks of a plugin. Mark implementations with `onnxq_plugins.hookimpl`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from onnx import ModelProto

    from onnxq_plugins.job import Job, Pass
    from onnxq_plugins.targets import Target

hookspec = pluggy.HookspecMarker("onnxq_plugins")
hookimpl = pluggy.HookimplMarker("onnxq_plugins")


@hookspec
def onnxq_passes() -> list[type[Pass]]:  # type: ignore[empty-body]
    """The passes a plugin brings. Their order means nothing: recipes order passes."""


@hookspec
def onnxq_targets() -> list[Target]:  # type: ignore[empty-body]
    """The targets a plugin brings."""


@hookspec(firstresult=True)
def onnxq_run_pass(step: Pass, job: Job) -> dict[str, Any]:  # type: ignore[empty-body]
    """Run one pass and return what it reports. Wrap it (``wrapper=True``) to observe, time, guard or veto."""


@hookspec
def onnxq_exported(job: Job, model: ModelProto, path: Path | None) -> None:
    """A model was made, and written to `path` if that is given (it is not if it misses what the user insists on): convert,
    sign or upload it."""
