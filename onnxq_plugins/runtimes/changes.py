"""What to change first, by where the time of a network goes: at most three sentences, each with a figure and what to do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from onnxq_plugins.runtimes.audit import Audit, LayerAudit
from onnxq_plugins.runtimes.spending import CONVERSIONS, LAYERS, OUTSIDE, Spending

_MUCH = 0.15  # of the time that is worth words
_PART = 0.2  # of the time that was lost
_TINY = 100.0  # microseconds of a network that no kernel makes faster
_MODEST = 1.1  # times float that ask for an explanation
_KEEP = "keep the float model (-r int8-storage stores its weights in 8 bits, at its speed)"
_PLACED = "onnxq quantize FLOAT -r int8 leaves in float what is faster there, conversions included"
# Reasons why a layer is float although its weight is stored as codes -> what to do about it.
_REMEDIES = {
    "wide-codes": "8 bits for their activations make them integer",
    "blocked": "one scale per output channel makes them integer",
    "undecoded": "4-bit weights need a Cast to INT8 in front of their DequantizeLinear",
    "float-weight": "quantize their weights, too",
    "float-input": "quantize their inputs, too",
    "float-output": "quantize their outputs, too",
    "runtime": "check their zero points, and that the scale of each bias is that of input times weight",
}
_OURS = frozenset({"wide-codes", "undecoded", "runtime"})  # those that are never meant, whatever the recipe


def what_to_change(audit: Audit, placed: bool | None = None) -> tuple[str, ...]:
    """Sentences, the most important first; none if nothing is wrong, or nothing was timed.

    placed   whether operators were placed by what they cost; None if nobody knows
    """
    if not audit.spending:
        return ()
    placed = audit.placed if placed is None else placed
    found = [*_slow(audit, placed), *_converting(audit, placed), *_in_float(audit, placed), *_little(audit)]
    return tuple(found[:3])


def _slow(audit: Audit, placed: bool | None) -> Iterator[str]:
    """The model is slower than float: why, and what is better."""
    if audit.speed is None or not audit.speed.slower:
        return
    before, after = audit.spending
    lead = f"slower than float, {audit.speed.ratio:.2f}x its speed"
    if before.microseconds < _TINY:
        yield f"{lead}: keep the float model, whose run of {before.microseconds:.0f} us is mostly the call itself"
        return
    cause = _cause(before, after)
    yield f"{lead}{f'; {cause}' if cause else ''}: {_KEEP if placed else f'{_PLACED}, or {_KEEP}'}"


def _cause(before: Spending, after: Spending) -> str:
    """What most of the time went to that was lost; "" if there is no such thing."""
    lost = after.microseconds - before.microseconds
    groups = {"layers": LAYERS, "conversions": CONVERSIONS, **{row.name: (row.name,) for row in after.rows}}
    more = {name: after.of_class(*own).microseconds - before.of_class(*own).microseconds for name, own in groups.items()}
    whole = {name: value for name, value in more.items() if name not in {*LAYERS, *CONVERSIONS, OUTSIDE}}
    most = sorted((name for name, value in whole.items() if value >= _PART * lost), key=lambda name: -whole[name])[:3]
    words = [f"{whole[name]:.0f} for {name}{_why(name, after)}" for name in most]
    return f"it takes {lost:.0f} us more, {', '.join(words)}" if lost > 0 and words else ""


def _why(name: str, after: Spending) -> str:
    """What a group of classes consists of, or why it is slow."""
    if name == "layers":
        return ", whose float kernels are faster for these shapes"
    if name == "conversions":
        return _around(after)
    op, count = next(iter(after.of_class(name).ops.items()), ("", 0))  # the most costly
    return f" ({count} {op})" if op else ""


def _around(spending: Spending, most: int = 2) -> str:
    """The float operators with the most costly conversions around them, if there are such."""
    named = [y for y in spending.borders if y.microseconds >= _MUCH / 3 * spending.microseconds][:most]
    words = ", ".join(f"{y.count} {y.op}" for y in named)
    return f" (mostly around {words} in float)" if named else ""


def _converting(audit: Audit, placed: bool | None) -> Iterator[str]:
    """Conversions take much of the time, where nothing placed operators."""
    spending, slower = audit.spending[-1], audit.speed is not None and audit.speed.slower
    found = spending.conversions
    if placed or slower or found.share < _MUCH or not spending.borders:
        return
    if sum(y.microseconds for y in spending.borders) < _MUCH * spending.microseconds:
        return
    yield f"{found.share:.0%} of the time is {found.count} conversions{_around(spending)}: {_PLACED}"


def _in_float(audit: Audit, placed: bool | None) -> Iterator[str]:
    """Layers that were meant to be integer take much of the time in float kernels."""
    times, total = audit.spending[-1].nodes, audit.spending[-1].microseconds
    some = any(layer.quantized for layer in audit.layers)
    meant = frozenset(_REMEDIES) if some and audit.placed is False else _OURS
    for kind, layers in sorted(_by_kind(audit.layers, meant).items(), key=lambda item: -_time(audit, item[1], times)):
        share = _time(audit, layers, times) / total
        if share < _MUCH:
            return
        one = len(layers) == 1
        yield (
            f"{len(layers)} layer{'' if one else 's'} run{'s' if one else ''} in float, {share:.0%} of the time, such as "
            f"'{layers[0].name}': {layers[0].why}; {_REMEDIES[kind]}"
        )
        return


def _by_kind(layers: Sequence[LayerAudit], meant: frozenset[str]) -> dict[str, list[LayerAudit]]:
    kinds: dict[str, list[LayerAudit]] = defaultdict(list)
    for layer in layers:
        if layer.constant_weight and layer.reason is not None and layer.reason.kind in meant:
            kinds[layer.reason.kind].append(layer)
    return kinds


def _time(audit: Audit, layers: Sequence[LayerAudit], times: Mapping[str, float]) -> float:
    nodes = {audit.nodes[layer.name] for layer in layers if layer.name in audit.nodes}
    return sum(times.get(name, 0.0) for name in nodes)


def _little(audit: Audit) -> Iterator[str]:
    """Layers take so little of the float model's time that nothing makes it much faster."""
    if audit.speed is None or audit.speed.ratio >= _MODEST or len(audit.spending) < 2:
        return
    before = audit.spending[0]
    if before.microseconds < _TINY or before.layers.share > 0.5:
        return
    others = [row for row in before.rows if row.name not in LAYERS and row.name != OUTSIDE][:2]
    words = ", ".join(f"{next(iter(row.ops))} and the like {row.share:.0%}" for row in others if row.ops)
    yield (
        f"layers are only {before.layers.share:.0%} of the float model's time ({words}), so that integer kernels can hardly "
        f"make it more than {1 / max(1 - before.layers.share, 1e-6):.1f}x as fast"
    )
