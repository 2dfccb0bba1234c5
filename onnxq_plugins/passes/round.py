"""round: choose weight codes by the error of their layer's output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.graph import Layer
from onnxq_plugins.job import Job, Pass, Service
from onnxq_plugins.layers.complete import complete_ranges, complete_weight
from onnxq_plugins.layers.problem import Problem, Solution, float_inputs, solvable
from onnxq_plugins.layers.shared import joint_problem, plan_jointly, shared_weights
from onnxq_plugins.layers.sweep import sweep
from onnxq_plugins.parallel import run_all
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.judge import Judge
from onnxq_plugins.solvers.rounding import Effort, Method
from onnxq_plugins.spec import Plan

Solved = Iterator[tuple[Layer, Solution]]


@dataclass(frozen=True)
class Round(Pass):
    """Choose weight codes by the error of their layer's output.

    Learned rounding without gradients through the network: every layer's codes minimize the squared error of its output over
    the calibration data, which the Gram matrix of its inputs determines completely. It is never worse than plain codes with
    corrected biases, on data that it did not see.

    method       ``nearest``, ``gptq``, ``gpfq``, ``descent`` (coordinate descent), ``adaround``, ``attention`` (Attention
                 Round), or ``auto``: the best loss of GPTQ, descent and AdaRound, row by row
    sequential   a layer reads the inputs that the quantized layers before it produce, and compensates for their errors (one
                 sweep through both networks). False: every layer reads float inputs; layers are solved side by side, as
                 they always are where activations are rounded and the data are steps of a stream: one speaker, one level
                 of noise, so that errors seen there are no guide for others, and no held-out step would show it
    search       choose scales that are still open by the output error they cause, too
    shift        solve biases along with the codes
    seconds      what ``auto`` may spend on AdaRound in all; 0 leaves it out. Work is counted, as if a core did 20 billion
                 multiplications a second, and not timed, so that codes are the same on every machine. Layers with cheap
                 steps get theirs first: a quarter of `steps` at least, or none
    steps        of AdaRound and Attention Round
    damping      fraction of the mean diagonal that GPTQ adds to the Gram matrix
    positions    patches per sample at most; a layer with D weights per output uses no more than D, or 64
    limit        largest D with a full Gram matrix (8 D^2 bytes); above it, diagonal blocks that take a quarter of that
    samples      of the data that the sweep uses at most: their activations are kept in memory, a MB or two each for images

        least (w - wq) H (w - wq)^T for each row w,   H = E[x x^T]

    By that measure no row of a layer is worse than rounded to the nearest. ConvTranspose is left to the default solver.
    A quarter of the samples, or of the positions of fewer than 8 samples, says of each layer how far its weights may go
    towards those that fit the quantized inputs (``share_of_refit`` in the report), and whether plain codes do better. In the
    end the whole network runs with and without the pass on those samples, up to 32: the better one stays; ``sqnr`` and
    ``taken`` in the report say which, and a note where that is the one without. Patches whose inputs are clipped count
    little. Weights that layers share are solved once, on float inputs, and stay shared.

    Source: GPTQ (arXiv 2210.17323), QEP (arXiv 2504.09629: the share), GPFQ (arXiv 2201.11113), AdaRound (arXiv 2004.10568),
    Attention Round (arXiv 2207.03088); see `onnxq_plugins.solvers`.
    Cost: one run of the float and of the quantized network, in pieces, and three on the samples that judge; then BLAS: some
    products of each weight with its Gram matrix, and four Cholesky factorizations.
    """

    name: ClassVar[str] = "round"
    provides: ClassVar[frozenset[Service]] = frozenset({"codes", "bias"})
    method: Method = "auto"
    sequential: bool = True
    search: bool = True
    shift: bool = True
    seconds: float = 20.0
    steps: int = 1000
    damping: float = 0.01
    positions: int = 256
    limit: int = 4608
    samples: int = 256

    def __post_init__(self) -> None:
        for key, least in (("seconds", 0), ("steps", 1), ("damping", 1e-6), ("positions", 1), ("limit", 16), ("samples", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} = {getattr(self, key)} must be at least {least}")

    def apply(self, job: Job) -> dict[str, Any]:
        complete_ranges(job)
        layers = solvable(job)
        others = [layer for layer in Planned.of(job).layers if layer not in layers]
        # what the sweep runs through must be solved
        job.plan |= {layer.weight: complete_weight(job, layer, job.plan[layer.weight]) for layer in others}
        efforts = self._efforts(job, layers)
        judge, plain = Judge.of(job), job.plan
        plain |= {y.weight: replace(plain[y.weight], codes=None, shift=None) for y in layers}
        solutions: dict[str, Solution] = {}

        solve = self._in_sequence if self.sequential and not _alike(job) else self._side_by_side
        for layer, solution in itertools.chain(self._shared(job, layers, efforts), solve(job, layers, efforts)):
            solutions[layer.name] = solution
        result: dict[str, Any] = {
            "method": self.method,
            "loss_relative_to_nearest": {name: round(one.loss, 4) for name, one in solutions.items()},
            "share_of_refit": {name: round(one.share, 2) for name, one in solutions.items()},
        }
        return result | self._judged(job, judge, plain)

    def _shared(self, job: Job, layers: list[Layer], efforts: Mapping[str, Effort]) -> Solved:
        """Solve the weights that layers share; these are taken out of the list."""
        for group in shared_weights(job, layers):
            problem = joint_problem(job, group, self.positions, self.limit, self.shift)
            solution = problem.solve(self.method, efforts[group[0].name], self.search)
            plan_jointly(job, group, solution.spec, self.shift)
            for layer in group:
                layers.remove(layer)
                yield layer, solution

    def _in_sequence(self, job: Job, layers: list[Layer], efforts: Mapping[str, Effort]) -> Solved:
        """Solve layers on what the quantized layers before them give."""
        swept = sweep(job, layers, self.positions, self.limit, self.samples) if layers else ()
        for layer, statistics in job.track(swept, "rounding", len(layers)):
            problem = Problem.of(job, layer, statistics, self.shift)
            with runtimes.blas(job.workers if _cost(layer) > _LARGE else 1):
                solution = problem.solve(self.method, efforts[layer.name], self.search)
            del problem, statistics  # large matrices, while those of the next layer are computed
            job.plan |= {layer.weight: solution.spec}
            yield layer, solution

    def _side_by_side(self, job: Job, layers: list[Layer], efforts: Mapping[str, Effort]) -> Solved:
        """Solve layers on float inputs."""
        for batch in float_inputs(job, layers, self.positions, self.limit):
            problems = ((layer, Problem.of(job, layer, gram, self.shift)) for layer, gram in batch)
            calls = (partial(one.solve, self.method, efforts[layer.name], self.search) for layer, one in problems)
            solved = job.track(run_all(calls, job.workers), "rounding", len(batch))
            with runtimes.blas(1):
                for (layer, _), solution in zip(batch, solved, strict=True):
                    job.plan |= {layer.weight: solution.spec}
                    yield layer, solution

    def _judged(self, job: Job, judge: Judge | None, plain: Plan) -> dict[str, Any]:
        """Keep the better of the learned plan and of the plain codes with corrected biases; what the report says of it."""
        if judge is None:
            return {}
        plans = {"plain": judge.completed(plain), "learned": job.plan}
        if any(job.plan[y.weight].bits < _PLAIN for y in Planned.of(job).layers):
            plans = dict(reversed(plans.items()))
        verdict = judge.best(plans)
        if verdict.name == "plain":
            job.plan = plans["plain"]
            job.note(
                f"{verdict.undone('round', 'learned')}, and was undone: the codes are the nearest ones, the biases corrected"
            )
        return {"sqnr": verdict.sqnr, "taken": verdict.name}

    def _efforts(self, job: Job, layers: list[Layer]) -> dict[str, Effort]:
        """The effort for each layer."""
        seeds = job.rng.integers(2**31, size=len(layers))
        learned = shared_steps([_seconds(layer) for layer in layers], self.steps, self.seconds)
        return {
            layer.name: Effort(self.damping, self.steps, steps, int(seed))
            for layer, steps, seed in zip(layers, learned, seeds, strict=True)
        }


_PLAIN = 8  # bits of which the nearest codes stay unless learned ones are clearly better; of fewer it is the reverse
_LARGE = 1e9  # multiplications that make several threads worth it: they wait for each other on a busy machine


def _alike(job: Job) -> bool:
    """True if activations are rounded and the samples are steps of a stream, by the names and shapes of its states."""
    data = job.calibration.data
    return data is not None and any(i.follows for i in data.inputs) and bool(Planned.of(job).activations)


def _cost(layer: Layer) -> float:
    """Multiplications of the layer's weight with its Gram matrix."""
    return float(np.prod(layer.shape)) ** 2 / layer.channels


def _seconds(layer: Layer) -> float:
    """Nominal seconds of a step of AdaRound: a product, work per weight, and calls."""
    return _cost(layer) / 20e9 + 25e-9 * float(np.prod(layer.shape)) + 5e-5


def shared_steps(prices: Sequence[float], most: int, budget: float) -> list[int]:
    """Steps of each layer, at most `most`, that cost no more than `budget` in all. The cheapest layer first, each takes what
    it needs of an equal share, and leaves the rest to later ones; a quarter of `most` at least, or none."""
    steps, left = [0] * len(prices), budget
    for turn, i in enumerate(np.argsort(prices, kind="stable")):
        share = max(int(min(most, left / (len(prices) - turn) / prices[i])), -(-most // 4))
        steps[i] = share if share * prices[i] <= left else 0
        left -= steps[i] * prices[i]
    return steps
