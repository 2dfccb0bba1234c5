"""Residual expansion of a weight: each order rounds, with a finer scale, the rest that the orders before it leave.

    W ~ W^(K) = sum_k s_k q_k,    q_k = round(R_k / s_k),   s_k = max |R_k| / n_k,   R_1 = W,   R_k+1 = R_k - s_k q_k

Rounding leaves half a step, s_k / 2, which order k + 1 divides into n_k+1 steps. So, for every scale (an output channel)
separately, with n_k = 2^(bits_k - 1) - 1,

    max |W - W^(K)|  <=  max |W| / prod_k (2 n_k)

Not every channel needs every order: `depth` is the number of orders of each. Source: REx (Yvinec et al., arXiv 2203.14645).

An activation has two orders: the halves of a code of twice as many bits (`halves`).

Orders fold: with scales that are integer multiples of each other they add up to one integer code, and hierarchical rounding
is rounding to the nearest on the finest grid. So where the codes fit int8 nothing is computed twice; separate layers are
for targets without such codes. The bound needs a multiple of at least 2 n per order, which decides what fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxq_plugins.spec import Array, QuantSpec, decode, encode, expand, from_range, reduce_blocks, solve_minmax


def orders(weight: Array, requests: Sequence[QuantSpec], depth: Array) -> list[QuantSpec]:
    """The solved entries, with codes, of orders 1, 2, ...; after the first, those with zero codes only are left out.

    weight     of any shape, float32
    requests   the request of each order: bits and block
    depth      number of orders of each channel, at least 1, broadcastable to the weight
    """
    left, solved = weight.astype(np.float64), list[QuantSpec]()
    for k, request in enumerate(requests):
        live = np.where(depth > k, left, 0.0)
        spec = solve_minmax(live, request)
        codes = np.where(depth > k, encode(left, spec), 0)
        if k:
            if not codes.any():
                break
            idle = reduce_blocks(np.abs(live), request.block, np.maximum) == 0  # rounding these again must give 0
            before, scale = solved[-1].scale, spec.scale
            if before is not None and scale is not None and before.shape == scale.shape:
                spec = replace(spec, scale=np.where(idle, before, scale).astype(np.float32))
        solved.append(replace(spec, codes=codes))
        left -= decode(codes, spec)
    return solved


def folded(weight: Array, requests: Sequence[QuantSpec], depth: Array, bits: int) -> QuantSpec:
    """All orders in one entry of `bits` bits: each scale is an integer multiple m_k of the next, so the orders add up to one
    code, sum_k q_k m_k m_k+1 ... The bound holds as for orders with separate scales. Raises ValueError if the codes do not
    fit (`foldable`).

    A channel with fewer orders has coarser scales and small codes.
    """
    requests = [replace(request, full=False) for request in requests]  # sums of mirrored codes stay within mirrored codes
    if not foldable([spec.bits for spec in requests], bits):
        raise ValueError(f"orders of {[spec.bits for spec in requests]} bits do not add up to codes of {bits} bits")
    first, top = solve_minmax(weight, requests[0]), 2 ** (bits - 1) - 1
    scale = np.asarray(first.scale, np.float64)
    fine, codes = (
        np.ones(scale.shape, np.int64),
        np.zeros(weight.shape, np.int64),
    )  # fine: steps per step of order 1
    for k, request in enumerate(requests):
        live = np.broadcast_to(depth > k, weight.shape)
        left = weight - codes * expand(scale / fine, weight.shape, request.block)
        if k:
            # the finest scale whose codes span the rest, keep the sum within the grid and leave room for later orders
            room = top // (requests[0].grid[1] * fine * _growth(requests[k + 1 :]))
            span = reduce_blocks(np.where(live, np.abs(left), 0.0), request.block, np.maximum)
            reach = np.floor(request.grid[1] * (1 + 1e-6) / np.maximum(span * fine / scale, 1e-6))
            factor = np.clip(np.minimum(reach, room), 2 * request.grid[1], None)
            factor = np.where(span > 0, factor, 1).astype(np.int64)
            fine, codes = fine * factor, codes * expand(factor, weight.shape, request.block)
        size = expand(scale / fine, weight.shape, request.block)
        codes = codes + np.where(live, np.clip(np.rint(left / size), *request.grid), 0).astype(np.int64)
    return replace(first, bits=bits, scale=np.asarray(scale / fine, np.float32), codes=codes)


def foldable(bits: Sequence[int], into: int) -> bool:
    """True if orders of these bits, each scale 2 n times as fine as the one before, add up to codes of `into` bits: a weight
    has |W| <= n_1 s_1, so that the largest code is n_1 2 n_2 2 n_3 ..."""
    specs = [QuantSpec(n) for n in bits]
    return bool(specs[0].grid[1] * _growth(specs[1:]) <= 2 ** (into - 1) - 1)


def _growth(requests: Sequence[QuantSpec]) -> int:
    return int(np.prod([2 * spec.grid[1] for spec in requests], dtype=np.int64))


def bound(weight: Array, requests: Sequence[QuantSpec], depth: Array) -> Array:
    """The largest possible error of the orders, broadcastable to the weight."""
    top = expand(
        reduce_blocks(np.abs(weight).astype(np.float64), requests[0].block, np.maximum), weight.shape, requests[0].block
    )
    shrunk = np.cumprod([1.0, *(2.0 * spec.grid[1] for spec in requests)])
    return np.asarray(top / shrunk[np.minimum(depth, len(requests))])


def value(specs: Sequence[QuantSpec]) -> Array:
    """W^(K), the sum of the orders, float64."""
    parts = [decode(spec.codes, spec) for spec in specs if spec.codes is not None]
    return np.asarray(np.sum(parts, axis=0, dtype=np.float64))


def halves(low: float, high: float, bits: int) -> tuple[QuantSpec, QuantSpec, float]:
    """Two orders of an activation in [low, high]: solved entries of `bits` bits each, unsigned, one scale 2^bits times the
    other, and the fraction of a coarse step that is added before x is rounded down to the first order (`split_values`).

    Their codes are the upper and the lower half of the code of 2 * bits bits that x has over the same range, so the error is
    that of this code: half of the fine step.
    """
    whole, base = from_range(low, high, QuantSpec(2 * bits, symmetric=False)), 2**bits
    assert whole.scale is not None and whole.zero_point is not None
    upper, lower = divmod(int(whole.zero_point), base)
    first = replace(whole, bits=bits, scale=np.asarray(whole.scale * np.float32(base)), zero_point=np.asarray(upper))
    return first, replace(whole, bits=bits, zero_point=np.asarray(lower)), (lower + 0.5) / base


# ---- orders per channel --------------------------------------------------------------------------------


def by_share(losses: Array, share: float) -> Array:
    """Orders of each channel [C]: for each further order, the ceil(share * C) channels with the largest loss so far get one
    more.

    losses   of each channel with 1, 2, ... orders [K, C]
    """
    count, channels = losses.shape
    depth = np.ones(channels, np.int64)
    more = int(np.ceil(share * channels - 1e-9))
    for _ in range(1, count):
        now = np.where(depth < count, losses[depth - 1, np.arange(channels)], -1.0)
        worst = np.argsort(-now, kind="stable")[:more]
        depth[worst] = np.minimum(depth[worst] + 1, count)
    return depth


def by_budget(losses: Sequence[Array], costs: Sequence[Array], limit: float) -> list[Array]:
    """Orders of each channel [C] of several layers, with a total cost of further orders of at most `limit`: those with the
    largest gain per cost first, until the next one costs too much.

    losses   per layer: of each channel with 1, 2, ... orders [K, C], in the same units for all layers
    costs    per layer: of each order of a channel [K]; the first one is not counted
    """
    layer, channel, worth, price = [], [], [], []
    for i, (loss, cost) in enumerate(zip(losses, costs, strict=True)):
        gain = (loss[:-1] - loss[1:]) / np.maximum(cost[1:, None], 1e-300)
        gain = np.minimum.accumulate(gain, axis=0)  # no order precedes the one that it refines
        layer.append(np.full(gain.size, i))
        channel.append(np.broadcast_to(np.arange(loss.shape[1]), gain.shape).ravel())
        worth.append(gain.ravel())
        price.append(np.broadcast_to(cost[1:, None], gain.shape).ravel())
    depth = [np.ones(loss.shape[1], np.int64) for loss in losses]
    if layer:
        layers, channels, gains, prices = (np.concatenate(v) for v in (layer, channel, worth, price))
        order = np.argsort(-gains, kind="stable")
        order = order[(np.cumsum(prices[order]) <= limit * (1 + 1e-12)) & (gains[order] > 0)]
        for i, d in enumerate(depth):
            np.add.at(d, channels[order[layers[order] == i]], 1)
    return depth
