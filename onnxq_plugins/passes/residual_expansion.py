"""residual-expansion: expand weights into sums of low-bit orders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from onnxq_plugins.calibration import channel_axis
from onnxq_plugins.errors import counted
from onnxq_plugins.graph import Layer, channel_groups, replace_with_sum, split_outputs
from onnxq_plugins.graph.opsets import NARROW_OPSET
from onnxq_plugins.graph.rewrites import splittable
from onnxq_plugins.job import Job, Pass, Stage
from onnxq_plugins.layers.input_orders import expand_inputs
from onnxq_plugins.layers.problem import float_inputs
from onnxq_plugins.layers.sums import narrow_ranges
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plan.requests import pinned, weight_request
from onnxq_plugins.search.quantizers import FLOAT_BITS, multiply_adds
from onnxq_plugins.search.widths import sample
from onnxq_plugins.solvers import expansion as solver
from onnxq_plugins.solvers.gram import narrow, row_loss
from onnxq_plugins.spec import Array, QuantSpec, decode

Form = Literal["auto", "branches", "sparse", "folded"]
_POSITIONS, _LIMIT = 256, 4608  # of Gram matrices: the defaults of the pass `round`
# Where `sparse` is cheaper than `branches` (benchmarks/expansion_cost.py): at most this share of channels with more than one
# order, at least this many channels.
_SPARSE, _WIDE = 0.5, 64


@dataclass(frozen=True, eq=False)
class _Expansion:
    """A layer to expand.

    requests      the request of each order
    activations   bits of its input, 0 for float
    losses        of each output channel with 1, 2, ... orders [K, C], relative to the power of the layer's output
    depth         orders of each channel [C]
    """

    layer: Layer
    requests: tuple[QuantSpec, ...]
    activations: int
    losses: Array
    depth: Array
    form: Form = "auto"

    @property
    def spread(self) -> Array:
        """The depth, broadcastable to the weight."""
        shape = self.layer.shape
        return self.depth.reshape([n if axis == self.layer.out_axis else 1 for axis, n in enumerate(shape)])


@dataclass(frozen=True)
class ResidualExpansion(Pass):
    """Expand weights into sums of low-bit orders (REx).

    Every weight becomes a sum of orders of few bits. Order k + 1 rounds, with scales of its own, what the first k leave:

        W ~ W^(K) = sum_k s_k q_k,   q_k = round(R_k / s_k),   s_k = max |R_k| / n_k per scale,   R_k+1 = R_k - s_k q_k
        max |W - W^(K)|  <=  max |W| / prod_k (2 n_k)  per channel,   n_k = 2^(bits_k - 1) - 1

    orders   K
    bits     of order 1, 2, ...; the last one applies to all further orders. None: as the recipe asks (and always for layers
             whose weights.bits a [[layer]] rule sets)
    share    of a layer's output channels that each order from the second on refines: those with the largest error then
    budget   instead of `share`: what further orders may cost in bit operations (multiply-adds x bits x bits) in the whole
             network, relative to the first; spent where it lowers the error of layers' outputs most per cost. 0: no budget
    data     errors of channels are r H r^T of their residual r, where there is calibration data (H: Gram matrix of the
             layer's inputs); False, or without data: ||r||^2. Relative to the power of the layer's output, or ||W||^2. They
             only decide which channels get more orders: scales and codes come from the weights alone
    form     how the sum is computed; ``auto`` takes the first that is possible:
             ``folded``    one layer with wider codes, to which the orders add up exactly: each scale is an integer multiple
                           of the next. Free where the codes fit the target (two orders of 4 bits, three of 3, seven of 2)
             ``sparse``    the channels with more orders apart: they become a sum of layers, the others one layer, and a
                           Concat joins them. Channels are reordered first so that they are adjacent; where they cannot be
                           moved, a Gather restores their order. Dense layers of 64 channels or more, up to half of which
                           have more orders
             ``branches``  a layer for every order, on the same input, and an Add
    activations
             orders of layers' inputs of 4 bits or fewer: 1 or 2. With 2 a layer becomes a sum of two with the same weight:
             x = x1 + x2, x1 on a grid 2^bits times as coarse as that of x2. The codes of both are the halves of one code of
             twice as many bits, with the same error. They take the extremes of x, or the range that `ranges` chose. For
             targets with 4-bit activations: ``npu4``

    With ``branches`` and ``sparse`` each layer of a sum writes 8-bit outputs with a range of its own, and an integer Add
    joins them: two more roundings of activations. The range of a term leaves out what that of the sum clips anyway: behind a
    Relu, most of its negative values. Beside 8-bit activations ``auto`` leaves weights of 8 bits unchanged: activations are
    the limit then, and a second order gains nothing. Layers with multipliers, or with scales that are powers of two or
    solved, stay unchanged and are reported. Grouped and depthwise convolutions and ConvTranspose are never ``sparse``: where
    that is asked for, they are ``folded``, or else ``branches``.

    The report has, for each layer, the largest bound and the largest error of its weights. The last order holds what the
    others leave in float, so that the float function stays and later passes see the error of the whole: `bias-correct` takes
    its mean back; `round` learns the codes of the last order again, while those before it are on their grid (if sequential,
    it moves some of them too, where that compensates for errors of the layer's input). Put it after passes that change
    weights (`scale-inputs`, `equalize`), and after `ranges` where the form is ``sparse``.

    Source: REx (Yvinec et al., arXiv 2203.14645); the folded form, and the budget over layers, are our own.
    Cost: below a second for a hundred layers; with a choice of channels by data one run over it. At run time: see `form`.
    """

    name: ClassVar[str] = "residual-expansion"
    stage: ClassVar[Stage] = "rewrite"
    orders: int = 2
    bits: tuple[int, ...] = ()
    share: float = 1.0
    budget: float = 0.0
    data: bool = True
    form: Form = "auto"
    activations: int = 1

    def __post_init__(self) -> None:
        if self.orders < 1:
            raise ValueError(f"orders = {self.orders} must be at least 1")
        if any(not 2 <= n <= 8 for n in self.bits) or len(self.bits) > self.orders:
            raise ValueError(f"bits = {list(self.bits)} must hold widths from 2 to 8, for {self.orders} orders at most")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share = {self.share} must lie in [0, 1]")
        if self.activations not in (1, 2):
            raise ValueError(f"activations = {self.activations} must be 1 or 2")
        if not self.budget >= 0:
            raise ValueError(f"budget = {self.budget} must not be negative")
        if self.budget and self.share != 1:
            raise ValueError("share and budget both set how many channels get more orders; set one of them")

    def apply(self, job: Job) -> dict[str, Any]:
        job.graph.output_opset = max(job.graph.output_opset, NARROW_OPSET)  # channels of one order are stored in 4 bits
        left: dict[str, str] = {}
        expansions: list[_Expansion] = []
        for one in self._depths(job, self._candidates(job, left)):
            form, reason = self._form(job, one)
            if form:
                expansions.append(replace(one, form=form))
                continue
            left[one.layer.name] = reason
            if one.depth.max() == 1:  # order 1 alone, at its own width
                job.plan |= {one.layer.weight: one.requests[0]}
        expansions, moved = _gather_channels(job, expansions)
        rows: dict[str, dict[str, Any]] = {}
        scattered: list[str] = []
        sums: list[list[str]] = []
        for one in expansions:
            specs = solver.orders(job.graph.constant(one.layer.weight), one.requests, one.spread)
            if one.form == "folded":
                specs = [solver.folded(job.graph.constant(one.layer.weight), one.requests, one.spread, _widest(job, one))]
                job.plan |= {one.layer.weight: specs[0]}
            rows[one.layer.name] = _row(job, one, specs)
            if one.form == "sparse":
                scattered += [one.layer.name] * _sparse(job, one, sums)
            elif one.form == "branches":
                _branches(job, one.layer, specs, sums)
        narrow_ranges(job, sums)
        if scattered:
            shown = f"{', '.join(scattered[:4])}{' ...' if len(scattered) > 4 else ''}"
            job.note(
                f"residual-expansion: channels of {counted(len(scattered), 'layer')} cannot be moved side by side; "
                f"a Gather restores their order ({shown})"
            )
        inputs = expand_inputs(job) if self.activations == 2 else {}
        return {"layers": rows, "left_alone": left, "channel_groups_reordered": moved, **inputs}

    def _candidates(self, job: Job, left: dict[str, str]) -> list[_Expansion]:
        """The layers that can be expanded, every channel with all orders; reasons why others cannot go to `left`."""
        fixed, candidates = pinned(job.graph, job.recipe), []
        planned = Planned.of(job)
        for layer in planned.layers:
            spec, inputs = job.plan[layer.weight], planned.bits(layer)
            bits = [spec.bits] if layer.name in fixed or not self.bits else list(self.bits)
            bits += bits[-1:] * (self.orders - len(bits))
            requests = tuple(
                spec if n == spec.bits else weight_request(job.graph, job.recipe, job.target, layer, n) for n in bits
            )
            undefined = next((one for one in requests if not one.symmetric or one.pow2 or one.sub_block is not None), None)
            if spec.solved:
                left[layer.name] = "its scales are solved"
            elif job.target.only_stores(layer.op):
                left[layer.name] = f"target '{job.target.name}' runs it in float"
            elif undefined is not None:
                left[layer.name] = f"orders are not defined for {undefined.describe()}{' of powers of two' * undefined.pow2}"
            elif not np.isfinite(job.graph.constant(layer.weight)).all():
                left[layer.name] = "its weights are not finite"
            elif self.form == "auto" and 0 < inputs <= 8 and bits[0] >= job.target.code_bits:
                left[layer.name] = f"beside 8-bit activations, {bits[0]}-bit weights would gain nothing"
            else:
                channels = layer.shape[layer.out_axis]
                candidates.append(
                    _Expansion(
                        layer,
                        requests,
                        inputs,
                        np.zeros((self.orders, channels)),
                        np.full(channels, self.orders),
                    )
                )
        return candidates

    def _depths(self, job: Job, candidates: list[_Expansion]) -> list[_Expansion]:
        """The candidates with the number of orders that each channel gets."""
        if self.share == 1 and not self.budget:
            return candidates
        losses: dict[str, Array] = {}
        if self.data and job.calibration.ready:
            by_name = {one.layer.name: one for one in candidates if one.layer.op != "ConvTranspose"}
            for batch in float_inputs(job, [one.layer for one in by_name.values()], _POSITIONS, _LIMIT):
                losses |= {layer.name: _losses(job, by_name[layer.name], gram.h) for layer, gram in batch}
        candidates = [
            replace(one, losses=losses[one.layer.name] if one.layer.name in losses else _losses(job, one, None))
            for one in candidates
        ]
        if not self.budget:
            return [replace(one, depth=solver.by_share(one.losses, self.share)) for one in candidates]
        work = multiply_adds(job.graph, sample(job))
        costs = [
            np.array([spec.bits for spec in one.requests])
            * float(one.activations or FLOAT_BITS)
            * work[one.layer.name]
            / len(one.depth)
            for one in candidates
        ]
        first = sum(float(cost[0]) * len(one.depth) for cost, one in zip(costs, candidates, strict=True))
        depths = solver.by_budget([one.losses for one in candidates], costs, self.budget * first)
        return [replace(one, depth=depth) for one, depth in zip(candidates, depths, strict=True)]

    def _form(self, job: Job, one: _Expansion) -> tuple[Form | None, str]:
        """The form of a layer, or None and why it stays as it is."""
        if one.depth.max() == 1:
            return None, "none of its channels earned a second order" if len(one.requests) > 1 else "one order is requested"
        even, some = one.depth.min() == one.depth.max(), float(np.mean(one.depth > 1))
        forms: list[Form] = [self.form]
        if self.form == "auto":
            pays = some <= _SPARSE and one.layer.channels >= _WIDE
            forms = ["folded", "sparse", "branches"] if pays else ["folded", "branches"]
        elif self.form == "sparse":  # for dense layers, with more orders in some of their channels
            dense = splittable(one.layer) and one.layer.kind == "dense"
            forms = ["branches"] if even else ["sparse"] if dense else ["folded", "branches"]
        reasons = [_unfit(job, one, form) for form in forms]
        possible = [form for form, reason in zip(forms, reasons, strict=True) if not reason]
        return (possible[0], "") if possible else (None, "; ".join(dict.fromkeys(reasons)))


def _losses(job: Job, one: _Expansion, h: Array | None) -> Array:
    """Squared error of each output channel with 1, 2, ... orders [K, C], relative to the power of the layer's output.

    h   Gram matrix of the layer's inputs; None: all inputs count alike
    """
    layer, weight = one.layer, job.graph.constant(one.layer.weight).astype(np.float64)

    def power(error: Array) -> Array:
        if h is not None:
            matrix = narrow(layer.matrix(error), h)
            rows = row_loss(matrix, h).reshape(layer.groups, -1, matrix.shape[1]).sum(axis=1)
            return np.asarray(rows.reshape(-1))
        return np.asarray((error**2).sum(axis=tuple(a for a in range(error.ndim) if a != layer.out_axis)))

    specs = solver.orders(job.graph.constant(layer.weight), one.requests, np.array(len(one.requests)))
    left = [power(weight - solver.value(specs[: k + 1])) for k in range(len(one.requests))]
    return np.array(left) / max(float(power(weight).sum()), 1e-300)


def _widest(job: Job, one: _Expansion) -> int:
    """Bits of the codes that orders may be folded into."""
    return job.target.code_bits if one.activations else 8


def _unfit(job: Job, one: _Expansion, form: Form) -> str:
    """Why a layer cannot have a form; "" if it can."""
    layer, target = one.layer, job.target
    if form == "folded":
        bits = _widest(job, one)
        if not solver.foldable([spec.bits for spec in one.requests], bits):
            return (
                f"orders of {' + '.join(str(spec.bits) for spec in one.requests)} bits do not fold into codes of {bits} bits"
            )
        specs = [replace(one.requests[0], bits=bits)]
    else:
        specs = list(one.requests)
        joins = ["Add", "Concat"] if form == "sparse" else ["Add"]
        missing = [op for op in joins if layer.result in job.plan and op not in target.integer_ops]
        if missing and one.activations and layer.op in target.output_scale:
            return f"target '{target.name}' has no integer {' and '.join(missing)} that would join its orders"
        if form == "sparse" and not (splittable(layer) and layer.kind == "dense"):
            return f"a {layer.kind} {layer.op} is not worth splitting by output channels"
    unknown = [spec for spec in specs if target.rule(layer, spec, one.activations) is None]
    return f"target '{target.name}' cannot run it as {unknown[0].describe()}" if unknown else ""


def _row(job: Job, one: _Expansion, specs: list[QuantSpec]) -> dict[str, Any]:
    """A layer in the report."""
    weight = job.graph.constant(one.layer.weight)
    error, bound = np.abs(weight - solver.value(specs)), solver.bound(weight, one.requests, one.spread)
    power = float(np.mean(weight.astype(np.float64) ** 2))
    return {
        "form": one.form,
        "bits": [spec.bits for spec in one.requests],
        "channels": [int((one.depth > k).sum()) for k in range(len(one.requests))],
        "error_bound": float(np.max(bound)),
        "error": float(np.max(error)),
        "weights_db": round(min(IDENTICAL, float(10 * np.log10(power / max(float(np.mean(error**2)), 1e-300)))), 2)
        if power
        else 0.0,
    }


# ---- the forms ------------------------------------------------------------------------------------------------------------


def _branches(job: Job, layer: Layer, specs: list[QuantSpec], sums: list[list[str]]) -> None:
    """A layer for each order. The last one has what the others leave of the weight, and the codes of its order; the result
    keeps its entry: the sum is the same tensor. Where it is quantized, its parts are appended to `sums`: the output of each
    order, the sums from the second order on, from the third on, ..., and the result."""
    if len(specs) == 1:
        job.plan |= {layer.weight: specs[0]}
        return
    whole, quantized = job.plan.get(layer.result), bool(Planned.of(job).input(layer))
    parts = [decode(spec.codes, spec) for spec in specs[:-1] if spec.codes is not None]
    rest = job.graph.constant(layer.weight) - np.sum(parts, axis=0, dtype=np.float64)
    layers = replace_with_sum(job.graph, layer, [*parts, rest.astype(np.float32)])
    job.plan = job.plan.without(layer.weight) | {part.weight: spec for part, spec in zip(layers, specs, strict=True)}
    if whole is not None:
        job.keep([layer.result])
        if quantized and "Add" in job.target.integer_ops:
            names = [part.output for part in layers]
            names += [str(job.graph.consumers(part.output)[0].outputs[0].name) for part in layers[1:-1]]
            job.plan |= {name: whole.request() for name in names}
            sums.append([*names, layer.result])


def _sparse(job: Job, one: _Expansion, sums: list[list[str]]) -> bool:
    """A layer for the channels of each depth, joined by a Concat; those with more than one order become sums. True if a
    Gather has to restore the order of the channels."""
    layer, spec, whole = one.layer, job.plan[one.layer.weight], job.plan.get(one.layer.result)
    depths = sorted(set(one.depth.tolist()), reverse=True)
    parts = split_outputs(job.graph, layer, [np.flatnonzero(one.depth == d) for d in depths])
    job.plan = job.plan.without(layer.weight, layer.result) | {part.weight: spec for part in parts}
    (concat,) = job.graph.consumers(parts[0].result)
    if whole is not None:  # a Gather behind the Concat carries its codes
        inner = "Concat" in job.target.integer_ops
        results = [*(part.result for part in parts), concat.outputs[0].name] if inner else [layer.result]
        job.plan |= {name: replace(whole) for name in results}
    for part, depth in zip(parts, depths, strict=True):
        _branches(job, part, solver.orders(job.graph.constant(part.weight), one.requests[:depth], np.array(depth)), sums)
    return bool((np.diff(one.depth) > 0).any())


def _gather_channels(job: Job, expansions: list[_Expansion]) -> tuple[list[_Expansion], int]:
    """Reorder channel groups so that the channels of equal depth of one `sparse` layer each are adjacent, most orders first.
    Returns the layers with their depths in the new order, and the number of groups that moved."""
    depths, moved = {one.layer.name: one.depth for one in expansions}, 0
    sparse = [one.layer for one in expansions if one.form == "sparse"]
    for group in channel_groups(job.graph, "permute") if sparse else []:
        if any(m.tensor in job.plan and job.plan[m.tensor].solved for m in group.weights):
            continue  # moving solved weights would drop their solution
        orders = (
            group.order_by(
                layer.output, channel_axis(job.graph, layer.output), np.argsort(-depths[layer.name], kind="stable")
            )
            for layer in sparse
        )
        order = next((order for order in orders if order is not None), None)
        if order is None or np.array_equal(order, np.arange(group.size)):
            continue
        job.permute(group, order)
        moved += 1
        members = {(m.tensor, m.axis): m.index for m in group.members if not m.constant}
        for one in expansions:
            index = members.get((one.layer.output, channel_axis(job.graph, one.layer.output)))
            if index is not None and one.layer.channels == len(one.depth):
                depth = depths[one.layer.name].copy()
                depth[index.ravel()] = depth[index[order].ravel()]
                depths[one.layer.name] = depth
    return [replace(one, depth=depths[one.layer.name]) for one in expansions], moved
