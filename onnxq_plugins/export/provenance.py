"""How a model was made, in its metadata: recipe, seed, versions of the plugins."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.reading import read
from onnxq_plugins.job import Recipe
from onnxq_plugins.runtimes.examples import SHAPES_KEY


def sign(
    model: onnx.ModelProto,
    recipe: Recipe,
    seed: int,
    distributions: Iterable[str],
    versions: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write into a model's metadata what is needed to reproduce it.

    distributions   that its passes and its target come from
    versions        of distributions, where known
    shapes          of the first sample, for whoever times the model
    """
    names = sorted({*distributions, "onnxq-plugins"})
    values = {
        "onnxq.recipe": recipe.to_json(),
        "onnxq.seed": str(seed),
        "onnxq.versions": " ".join(f"{name}=={versions.get(name) or version_of(name)}" for name in names),
    }
    if shapes:
        values[SHAPES_KEY] = json.dumps(shapes)
    sign_again(model, values)


def sign_again(model: onnx.ModelProto, values: Mapping[str, str]) -> None:
    """Write entries into a model's metadata, in place of those that it has under these keys."""
    others = [p for p in model.metadata_props if p.key not in values]
    del model.metadata_props[:]
    model.metadata_props.extend(others)
    for key, value in values.items():
        model.metadata_props.add(key=key, value=value)


def recipe_of(path: str | Path) -> tuple[dict[str, Any], int]:
    """The recipe (plain values) and the seed that made a model. Raises OnnxqError if its metadata have none."""
    metadata = {p.key: p.value for p in read(Path(path)).metadata_props}
    try:
        recipe, seed = json.loads(metadata["onnxq.recipe"]), int(metadata.get("onnxq.seed", 0))
    except (KeyError, ValueError) as error:
        raise OnnxqError(
            f"model '{path}' has no recipe in its metadata; give a model made by onnxq, or a recipe with -r."
        ) from error
    return recipe, seed


def version_of(distribution: str) -> str:
    """The installed version of a distribution, "unknown" if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
