"""residual-ensemble: spread a residual expansion over networks that are summed.

This is the naive sum. A gated correction (networks that pass derivatives on with the gates of the first one) is closer, but
needs two products per layer besides those of the first network, one more than the exact expansion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError, counted
from onnxq_plugins.graph import Layer
from onnxq_plugins.graph.ensemble import side_by_side, unfit
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.measure.metrics import percent_agreement, worst_sqnr
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.solvers import expansion as solver
from onnxq_plugins.spec import Array, Plan, QuantSpec, decode


@dataclass(frozen=True)
class ResidualEnsemble(Pass):
    """Spread a residual expansion over networks that are summed.

    Ensembles of expansions: in every layer, network m has the orders of group m of the weights' residual expansion, folded
    into one integer code. All networks read the same input, only the first one has the biases, and the outputs are summed:

        f(x) ~ f_1(x) + f_2(x) + ...,   W = W_1 + W_2 + ...,   W_1 = sum of the first groups[0] orders, and so on

    groups    orders of each network; each order has the bits that the recipe asks for
    samples   number of calibration samples that the ensemble's own error is measured on; 0: all

    The networks can run side by side, also on separate devices: the model may be cut at the last Add. Layers whose orders do
    not fold into the codes of the target (8 bits each, for example), or that are solved, have the same weight in every
    network.

    This is an approximation, and a loose one: relu(a + e) is replaced by relu(a) + relu(e), and the effect of the second
    network's layers on the first one's activations is ignored, so that it gains next to nothing over the first network
    alone. Its error, before any rounding, is measured, reported and noted. `residual-expansion` sums the orders of each
    layer instead, which is exact, and whose branches a runtime may run side by side as well.

    It accepts operators that commute with sums, or nearly do: layers, Add, Concat, pooling, Relu, Clip with 0 inside,
    products with constants, and operators that move values. A Softmax or Sigmoid at the end stays behind the sum. Raises
    OnnxqError, naming the operator, for others. Put it before `ranges`: the further networks have ranges of their own.

    Source: REx (Yvinec et al., arXiv 2203.14645) and PIPE (arXiv 2311.15806), as far as their abstracts describe it.
    Cost: two runs over the samples. At run time, and on disk, as many networks as there are groups.
    """

    name: ClassVar[str] = "residual-ensemble"
    exact: ClassVar[bool] = False
    stage: ClassVar[Stage] = "rewrite"
    groups: tuple[int, ...] = (2, 2)
    samples: int = 64

    def __post_init__(self) -> None:
        if len(self.groups) < 2 or any(n < 1 for n in self.groups):
            raise ValueError(f"groups = {list(self.groups)} must hold the orders of two networks or more, each at least 1")
        if self.samples < 0:
            raise ValueError(f"samples = {self.samples} must not be negative")

    def apply(self, job: Job) -> dict[str, Any]:
        graph, left = job.graph, dict[str, str]()
        expanded: dict[str, list[QuantSpec]] = {}
        for layer in Planned.of(job).layers:
            reason = self._unfit(job, layer)
            if reason:
                left[layer.name] = reason
            else:
                expanded[layer.name] = self._solve(job, layer)
        if not expanded:
            job.note("residual-ensemble: no layer can be expanded, so that there is still one network")
            return {"networks": 1, "left_alone": left}
        if why := unfit(graph, list(expanded)):
            raise OnnxqError(
                f"residual-ensemble: {why}, so that the network cannot be a sum of networks; use "
                "residual-expansion, which sums the orders of each layer."
            )
        layers = {layer.name: layer for layer in graph.layers}
        data = job.calibration.data
        feeds = list(data.spread(self.samples) if self.samples else data) if data is not None else []
        before = Samples.of(graph.model(), feeds, class_axis=job.class_axis) if feeds else None
        maps, firsts = side_by_side(
            graph, {name: _parts(graph.constant(layers[name].weight), specs) for name, specs in expanded.items()}
        )
        self._plan(job, {layers[name].weight: specs for name, specs in expanded.items()}, maps, firsts)
        result: dict[str, Any] = {"networks": len(self.groups), "layers": len(expanded), "left_alone": left}
        if before is None:
            job.note("residual-ensemble: its own error could not be measured without data")
            return result
        after = before.outputs(runtimes.session(graph.model()))
        decibel = before.score(worst_sqnr, after)
        note = f"residual-ensemble: the ensemble itself, before any rounding, reaches {decibel:.1f} dB"
        result |= {"ensemble_db": round(decibel, 2), "samples": len(feeds)}
        if before.classes:
            same = before.score(percent_agreement, after)
            note += f", and its answer is the network's in {same:.1f} % of {counted(len(feeds), 'sample')}"
            result["ensemble_agreement"] = round(same, 2)
        job.note(note)
        return result

    def _unfit(self, job: Job, layer: Layer) -> str:
        """Why a layer has the same weight in every network; "" if it is expanded."""
        spec, planned = job.plan[layer.weight], Planned.of(job)
        bits = job.target.code_bits if planned.input(layer) else 8
        if spec.solved:
            return "its scales are solved"
        if job.target.only_stores(layer.op):
            return f"target '{job.target.name}' runs it in float"
        if not spec.symmetric or spec.pow2 or spec.sub_block is not None:
            return f"orders are not defined for {spec.describe()}{' of powers of two' * spec.pow2}"
        if not np.isfinite(job.graph.constant(layer.weight)).all():
            return "its weights are not finite"
        for orders in self.groups:
            if not solver.foldable([spec.bits] * orders, bits):
                return f"{orders} orders of {spec.bits} bits do not fold into codes of {bits} bits"
            wanted = spec if orders == 1 else replace(spec, bits=bits)
            if planned.rule(layer, wanted) is None:
                return f"target '{job.target.name}' cannot run it as {wanted.describe()}"
        return ""

    def _solve(self, job: Job, layer: Layer) -> list[QuantSpec]:
        """The solved entries, with codes, of a layer's weight in each network."""
        spec, whole = job.plan[layer.weight], np.array(max(self.groups))
        bits = job.target.code_bits if Planned.of(job).input(layer) else 8
        rest, specs = job.graph.constant(layer.weight).astype(np.float64), list[QuantSpec]()
        for orders in self.groups:
            specs.append(
                solver.orders(rest, [spec], whole)[0] if orders == 1 else solver.folded(rest, [spec] * orders, whole, bits)
            )
            rest = rest - solver.value(specs[-1:])
        return specs

    def _plan(
        self, job: Job, weights: dict[str, list[QuantSpec]], maps: list[dict[str, str]], firsts: dict[str, str]
    ) -> None:
        """Plan every network; sums have no entry. Ranges of the first network stay, the others are open."""
        plan = dict(job.plan)
        for m, table in enumerate(maps):
            for old, new in table.items():
                if old in weights:
                    plan[new] = weights[old][m + 1]
                elif old in job.plan:
                    plan[new] = job.plan[old] if job.graph.is_constant(new) else job.plan[old].request()
        for old, specs in weights.items():
            plan[old] = specs[0]
        for end, first in firsts.items():
            if end in plan:
                plan[first] = plan.pop(end)
        job.plan = Plan(plan)
        job.keep(plan)


def _parts(weight: Array, specs: list[QuantSpec]) -> list[Array]:
    """The part of a weight in each network; the last one gets the rest, so that they add up to the weight."""
    parts = [decode(spec.codes, spec) for spec in specs[:-1] if spec.codes is not None]
    return [*parts, (weight - np.sum(parts, axis=0, dtype=np.float64)).astype(np.float32)]
