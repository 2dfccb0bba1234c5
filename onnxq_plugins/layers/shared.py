"""Weights that several layers share, such as those of an unrolled recurrence.

On import each layer gets a weight of its own (law L7), and weights whose codes are equal are one again on export. So that
they stay equal, and take as long as one, they are solved once: on what their layers read in all, in the float network, since
the inputs that the quantized one will give to later layers are not known when the first is solved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

import numpy as np

from onnxq_plugins.calibration import Gram
from onnxq_plugins.data.samples import spread
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job
from onnxq_plugins.layers.complete import scale_floor
from onnxq_plugins.layers.problem import Problem, correct_biases
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.spec import QuantSpec

_USES = 8  # layers of a weight whose inputs are looked at


def shared_weights(job: Job, layers: Iterable[Layer]) -> list[list[Layer]]:
    """Groups of two and more planned layers with equal weights, that are planned alike."""
    groups: dict[tuple[object, ...], list[list[Layer]]] = {}
    planned = Planned.of(job)
    for layer in layers:
        weight, spec = job.graph.constant(layer.weight), job.plan[layer.weight]
        key = (
            layer.op,
            layer.shape,
            layer.groups,
            layer.out_axis,
            weight.reshape(-1)[:4].tobytes(),
            bool(planned.input(layer)),
        )
        known = groups.setdefault(key, [])
        for group in known:
            first = group[0]
            if _alike(spec, job.plan[first.weight]) and np.array_equal(weight, job.graph.constant(first.weight)):
                group.append(layer)
                break
        else:
            known.append([layer])
    return [group for known in groups.values() for group in known if len(group) > 1]


def joint_problem(job: Job, layers: list[Layer], positions: int, limit: int, shift: bool) -> Problem:
    """The problem of a weight that layers share: its scales serve the bias of each of them."""
    problem = Problem.of(job, layers[0], joint_gram(job, layers, positions, limit), shift)
    floors = [scale_floor(job, layer, job.plan[layer.weight]) for layer in layers]
    return replace(problem, floor=np.max(floors, axis=0))


def plan_jointly(job: Job, layers: list[Layer], spec: QuantSpec, shift: bool) -> None:
    """Plan the solved entry of a shared weight for all its layers; biases make up for mean errors where `shift` is set."""
    job.plan |= {layer.weight: replace(spec, shift=None) for layer in layers}
    if shift:
        correct_biases(job, layers)


def joint_gram(job: Job, layers: list[Layer], positions: int, limit: int) -> Gram:
    """What layers of one weight read in the float network, over about as many patches as one layer has; of at most `_USES`
    of them, spread evenly."""
    uses = [layers[n] for n in spread(len(layers), _USES)]
    grams = job.calibration.grams(uses, -(-positions // len(uses)), limit).values()
    count = sum(one.count for one in grams)
    h, mean = np.zeros_like(next(iter(grams)).h), np.zeros_like(next(iter(grams)).mean)
    for one in grams:
        h += one.count / count * one.h
        mean += one.count / count * one.mean
    return Gram(h, mean, count)


def _alike(one: QuantSpec, other: QuantSpec) -> bool:
    """True if two entries say the same."""
    return all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
