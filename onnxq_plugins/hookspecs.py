"""The seven hooks of a plugin. Mark implementations with `onnxq_plugins.hookimpl`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from onnx import ModelProto

    from onnxq_plugins.graph import Layer
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


@hookspec
def onnxq_recipes() -> dict[str, Path]:  # type: ignore[empty-body]
    """The recipes a plugin brings: names like ``vendor.name``, and their files. `onnxq recipes` lists them, ``-r`` finds
    them, and `onnxq auto` tries them behind its own, if their target runs here or was asked for."""


@hookspec
def onnxq_remedies(cause: Any, layer: Layer | None, job: Job) -> list[Any]:  # type: ignore[empty-body]
    """What may reduce a layer's error: `onnxq_plugins.Remedy` values, behind those that the `onnxq_plugins.Cause` has.
    Called for each cause that a diagnosis finds; `layer` is None where it is about an activation or another constant.
    `diagnose --try` and `auto` try them."""


@hookspec
def onnxq_exporting(job: Job, model: ModelProto) -> ModelProto:  # type: ignore[empty-body]
    """A model was made, and is not written yet: change it, and return it. What is returned is checked and audited. Plugins
    are called one after another, each with what the one before returned; not for models of 1 GB and more, whose constants
    are written beside them: a note says so."""


@hookspec(firstresult=True)
def onnxq_run_pass(step: Pass, job: Job) -> dict[str, Any]:  # type: ignore[empty-body]
    """Run one pass and return what it reports. Wrap it (``wrapper=True``) to observe, time, guard or veto."""


@hookspec
def onnxq_exported(job: Job, model: ModelProto, path: Path | None) -> None:
    """A model was made, and written to `path` if that is given (it is not if it misses what the user insists on): convert,
    sign or upload it."""
