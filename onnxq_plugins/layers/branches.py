"""The layers inside branches of an If: each branch is quantized like a model of its own, and put back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import onnx

from onnxq_plugins.calibration.branches import Branch, BranchFeeds, branches, put_back
from onnxq_plugins.data import DataOptions
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.bodies import all_graphs
from onnxq_plugins.job import FLOAT, Job, Outcome, Quality, Recipe, Report


@dataclass
class Inside:
    """What the report says of branches that were quantized.

    layers, constants   rows of theirs
    operators           names of all operators in them
    results             (If, side) -> what quantizing it left
    """

    layers: list[dict[str, Any]] = field(default_factory=list)
    constants: list[dict[str, Any]] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)
    results: dict[tuple[str, str], Outcome] = field(default_factory=dict)

    def put(self, model: onnx.ModelProto, branch: Branch, quantized: onnx.ModelProto, report: Report) -> None:
        """Put a quantized branch into a model, and its rows beside the others."""
        put_back(model, branch, quantized)
        self.operators |= {node.name for graph in all_graphs(branch.model.graph) for node in graph.node}
        self.layers += [{**row, "inside": branch.words} for row in report.layers]
        self.constants += report["constants"]


def quantize_branches(job: Job, model: onnx.ModelProto, quantize: Callable[..., Outcome]) -> Inside:
    """Quantize the layers inside the branches of an If, and put them into a model. Of branches that no sample takes the
    weights are stored in codes, where the target decodes them.

    quantize   (model, recipe, samples) -> what `onnxq_plugins.quantize` returns
    """
    inside = Inside()
    for branch in branches(job.graph):
        recipe = _recipe(job.recipe, branch)
        feeds = None if job.calibration.data is None else BranchFeeds(job.graph, branch, job.calibration.data)
        taken = feeds is None or next(iter(feeds), None) is not None
        if not taken:
            job.note(f"no sample takes {branch.words}: what is in it computes float")
            floats = replace(recipe.activations, bits=FLOAT, symmetric=False)
            recipe, feeds = replace(recipe, activations=floats, passes=(), quality=Quality()), None
        try:
            result = quantize(branch.model, recipe, feeds)
        except OnnxqError as error:
            job.note(f"{branch.words} stays float: {error}")
            continue
        inside.put(model, branch, result.model, result.report)
        inside.results[branch.node, branch.side] = result
        for note in result.report.notes if taken else ():
            job.note(f"{branch.words}: {note}")
    return inside


def _recipe(recipe: Recipe, branch: Branch) -> Recipe:
    """A recipe with what it says of the operators of a branch, or of all."""
    names = {node.name for node in branch.model.graph.node}
    rules = tuple(rule for rule in recipe.layers if any(map(rule.names, names)))
    left = tuple(p for p in recipe.exclude if any(map(Recipe(exclude=(p.removeprefix("!"),)).excludes, names)))
    return replace(recipe, layers=rules, data=DataOptions(), exclude=left)
