"""Whether what a quantized network gives is still what the float one does: the one place that decides it, output by output.

An output is destroyed if noise has half the power of its signal (3 dB), if it has NaN where the float one has none, or if
it is the same for all samples where the float one is not. Less than 15 dB is poor: noise is 18 % of the signal.

Decibels mislead where there is hardly any signal: scores of a detector on pictures without what it looks for are next to 0,
and 8 bits round them to 0. So what counts is an output's reach: its largest magnitude on the samples, and at least 1 for
probabilities. If it varies by less than a 32nd of that, eight codes of 8 bits, and errs by less, it is idle: nobody can say
what it is worth on these samples, and nothing is lost on them. Where an output holds two things, each is judged
(`unlike`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx

from onnxq_plugins.measure.arrays import agreement, alike, decibels, is_float, leaves
from onnxq_plugins.measure.classes import probability_axis
from onnxq_plugins.measure.unlike import part_energies, part_name, parts
from onnxq_plugins.spec import Array

Grade = Literal["good", "idle", "poor", "destroyed"]
POOR, DESTROYED = 15.0, 3.0  # dB below which an output is so
_SAME_POOR, _SAME_DESTROYED = 90.0, 50.0  # percent of equal elements, of networks without an output of floats
_FEWEST = 16  # elements that a percentage must be of
_LITTLE = 1 / 32  # of the reach
_BOUNDED = {"Sigmoid", "HardSigmoid", "Softmax"}
_VIEWS = {"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Slice", "Cast", "Clip", "Split"}
_VIEWS |= {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Verdict:
    """How near an output of floats, or a part of one, or an output of other values is to the float model's.

    name    as numpy would index a part
    sqnr    dB, pooled over all samples; None if it is not of floats
    same    percent of equal elements, if it is not of floats
    grade   ``good``, ``idle`` (it hardly varies), ``poor`` or ``destroyed``
    why     what is wrong, in words; "" if good
    """

    name: str
    sqnr: float | None
    same: float | None
    grade: Grade = "good"
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, rounded."""
        numbers = {"sqnr": self.sqnr, "same": self.same}
        return {
            "name": self.name,
            **{key: round(value, 2) for key, value in numbers.items() if value is not None},
            "grade": self.grade,
            **({"why": self.why} if self.why else {}),
        }


def judge_outputs(
    names: Sequence[str],
    reference: Sequence[Sequence[Any]],
    other: Sequence[Sequence[Any]],
    bounded: Collection[str] = (),
) -> tuple[Verdict, ...]:
    """A verdict on each output of a network, and on each part of one that holds two things.

    reference, other   values of each output per feed, as `runtimes.per_feed` returns them
    bounded            outputs that are probabilities (`bounded_outputs`); those that add up to 1 need not be named
    """
    columns = list(zip(names, reference, other, strict=True))
    only = not any(is_float(y) for _, y, _ in columns)
    verdicts: list[Verdict] = []
    for name, y, z in columns:
        if not is_float(y):
            verdicts.append(_symbols(name, y, z, only))
            continue
        least = 1.0 if name in bounded or probability_axis(list(y)) is not None else 0.0
        verdicts += [_floats(part_name(name, part), y, z, part, least) for part in parts(y)]
    return tuple(verdicts)


def bounded_outputs(model: onnx.ModelProto) -> set[str]:
    """Outputs of a model that a Sigmoid or Softmax made, whatever moved them since."""
    makers = {name: node for node in model.graph.node for name in node.output}

    def probability(name: str) -> bool:
        seen: set[str] = set()
        names = [name]
        while names:
            node = makers.get(names.pop())
            if node is None or (node.op_type not in _BOUNDED and node.op_type not in _VIEWS):
                return False
            if node.op_type in _VIEWS:
                names += [n for n in node.input[: None if node.op_type == "Concat" else 1] if n not in seen]
                seen.update(node.input)
        return True

    return {output.name for output in model.graph.output if probability(output.name)}


def _floats(name: str, reference: Sequence[Any], other: Sequence[Any], part: Any, least: float) -> Verdict:
    """A verdict on an output of floats, or a part of one.

    least   of its reach
    """
    energy = part_energies(reference, other, part)
    noise = decibels(energy)
    found = Verdict(name, noise, None)
    if lost := int(np.isinf(energy[:, 1]).sum()):
        return _graded(found, "destroyed", f"NaN or Inf for {lost} of {len(energy)} samples, where float has none")
    if shapes := sum(not alike(y, z) for y, z in zip(reference, other, strict=True)):
        return _graded(found, "destroyed", f"another shape than float for {shapes} of {len(energy)} samples")
    y, z = _stacked(reference, other, part)
    if not y.size or not np.abs(y - z).max() > 0:
        return found
    reach = max(float(np.abs(y).max()), least)
    varies = _spread(y) > _LITTLE * reach
    if varies and not _spread(z) > 0:
        return _graded(found, "destroyed", f"always the same, where float varies ({noise:.1f} dB)")
    if not y.any():
        return _graded(found, "idle", "0 throughout on these samples")
    if noise >= POOR:
        return found
    if not varies and float(np.abs(y - z).max()) <= _LITTLE * reach:
        return _graded(found, "idle", "hardly varies on these samples")
    return _graded(found, "destroyed" if noise < DESTROYED else "poor", f"{noise:.1f} dB")


def _symbols(name: str, reference: Sequence[Any], other: Sequence[Any], only: bool) -> Verdict:
    """A verdict on an output of integers, booleans, strings or nothing.

    only   no output of the network is of floats: indices and counts beside floats follow from these
    """
    same = 100 * agreement(list(reference), list(other), None)
    found = Verdict(name, None, same)
    count = sum(leaf.size for leaf in _arrays(reference))
    if same <= _SAME_DESTROYED and _values(reference) > 1 and _values(other) == 1:
        return _graded(found, "destroyed", "the same for all samples, where float varies")
    if only and count >= _FEWEST and same < _SAME_POOR:
        return _graded(found, "destroyed" if same < _SAME_DESTROYED else "poor", f"{same:.0f} % of its elements are right")
    return found


def _graded(found: Verdict, grade: Grade, why: str) -> Verdict:
    return Verdict(found.name, found.sqnr, found.same, grade, why)


def _values(output: Sequence[Any]) -> int:
    """How many values there are in an output."""
    arrays = [a.astype(str) if a.dtype.kind == "O" else a for a in _arrays(output)]
    return len({x.item() for a in arrays for x in np.unique(a)})


def _stacked(reference: Sequence[Any], other: Sequence[Any], part: Any) -> tuple[Array, Array]:
    """An output's values in both networks, [samples, ...], 0 where the reference is not finite; [1, all] where shapes vary.
    The rows of a single feed are samples, too."""
    pairs = [(y[part], z[part]) if part else (y, z) for y, z in zip(_arrays(reference), _arrays(other), strict=True)]
    if len({y.shape for y, _ in pairs}) == 1:
        y, z = (np.stack(side) for side in zip(*pairs, strict=True))
        y, z = (y[0], z[0]) if len(pairs) == 1 and y.ndim > 1 and y.shape[1] > 1 else (y, z)
    else:
        y, z = (np.concatenate([a.ravel() for a in side])[None] for side in zip(*pairs, strict=True))
    kept = np.isfinite(y)
    return np.where(kept, y, 0), np.where(kept, z, 0)


def _arrays(output: Sequence[Any]) -> list[Array]:
    return [leaf for value in output for leaf in leaves(value)]


def _spread(x: Array) -> float:
    """How far an output moves, at most: from sample to sample, or within the only one."""
    return float((x.max(axis=0) - x.min(axis=0)).max() if len(x) > 1 else x.max() - x.min())
