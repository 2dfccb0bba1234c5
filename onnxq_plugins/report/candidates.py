"""Which of several models of one network to keep, the float model among them, and in a few words why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from onnxq_plugins.measure.samples import OutputScore
from onnxq_plugins.runtimes.speed import EQUAL, Speed

Prefer = Literal["speed", "size", "accuracy"]
FLOAT = "float"  # the name of the candidate that is the user's own model
_ALIKE = 0.02  # of a size that is worth no speed
_NOISE = 0.1  # dB that the choice of samples alone may shift


@dataclass(frozen=True)
class Candidate:
    """The model that a recipe makes, and what it is worth.

    recipe          its name; with remedies that were added, such as "int8 + ranges.method=mse"; "float" for the user's own
    drop            of the metric, in its own units, below the float model; on samples not used to make the model. Judged by
                    SQNR: the dB that are missing, 0 if there are enough
    sqnr            of the worst output, dB
    met             True if it is good enough
    size            bytes of the model
    speed           times float, all candidates measured in turn with it in onnxruntime; 0 where that says nothing about the
                    target
    seconds         to make it
    why             why there is no model, if there is none
    outputs         how near each output is to the float model's
    pace            how sure the speed is; None if it was not measured
    rejected        why it was not kept, in a few words
    """

    recipe: str
    drop: float = float("inf")
    sqnr: float = 0.0
    met: bool = False
    size: int = 0
    speed: float = 0.0
    seconds: float = 0.0
    why: str = ""
    outputs: tuple[OutputScore, ...] = ()
    pace: Speed | None = None
    rejected: str = ""

    @property
    def slower(self) -> bool:
        """True if the float model is faster, for sure."""
        return self.pace is not None and self.pace.slower

    @property
    def faster(self) -> bool:
        """True if it is faster than the float model, or nobody can tell here."""
        return self.pace is None or (self.pace.ratio > 1 + EQUAL and self.pace.low > 1)


@dataclass(frozen=True)
class Bar:
    """What is good enough, and what is a difference.

    drop    the most that the metric may drop
    sqnr    dB that the worst output must have
    noise   of the drop, that is no difference
    decibels   True if SQNR is the metric
    """

    drop: float
    sqnr: float
    noise: float = 0.0
    decibels: bool = False

    def missed(self, one: Candidate) -> str:
        """Why a candidate is not good enough."""
        if self.decibels or one.drop <= self.drop:
            return f"{one.sqnr:.1f} dB, less than {self.sqnr:g}"
        return f"drops by {one.drop:.2f}, more than {self.drop:g}"

    def equal(self, a: Candidate, b: Candidate) -> bool:
        """True if two candidates are as accurate as each other."""
        return abs(a.sqnr - b.sqnr) <= _NOISE if self.decibels else abs(a.drop - b.drop) <= self.noise

    def badness(self, one: Candidate) -> tuple[float, float]:
        """Sorts the most accurate first."""
        return (0.0 if self.decibels else one.drop, -one.sqnr)


def choose(
    candidates: Sequence[Candidate], own: Candidate, prefer: Prefer, bar: Bar
) -> tuple[Candidate, tuple[Candidate, ...], Candidate]:
    """The one to keep, all candidates with reasons why they were not kept, and the float model with its own.

    own   the float model as a candidate: kept where no good candidate is better by what is preferred. Where none is good
          enough, the one that drops least is kept

    At least one candidate must have a model.
    """
    usable = [one for one in candidates if not one.why]
    good = [one for one in usable if one.met]
    fit = [one for one in good if not unfit(one, own, prefer)]
    if not good:
        kept = min(usable, key=lambda one: (one.drop, -one.sqnr))
    else:
        kept = _best(fit, prefer, bar) if fit else own
    told = []
    for one in candidates:
        if one is kept or one.why:
            told.append(one)
        elif not one.met:
            told.append(replace(one, rejected=bar.missed(one)))
        else:
            told.append(replace(one, rejected=unfit(one, own, prefer) or _behind(one, kept, prefer, bar)))
    if kept is not own:
        own = replace(own, rejected=_behind(own, kept, prefer, bar) if kept.met else "")
    return kept, tuple(told), own


def unfit(one: Candidate, own: Candidate, prefer: Prefer) -> str:
    """Why the float model is preferred to a candidate that is good enough; "" if it is not."""
    if prefer == "size":
        return "no smaller than float" if one.size >= own.size else ""
    if one.slower:
        return "slower than float"
    return "neither faster nor smaller than float" if not one.faster and one.size >= own.size else ""


def _best(good: Sequence[Candidate], prefer: Prefer, bar: Bar) -> Candidate:
    """The best candidate by what is preferred; of those that are alike, by what else counts."""
    if prefer == "speed":
        most = max(one.speed for one in good)
        alike = [one for one in good if one.speed >= most * (1 - EQUAL)]
        first = min(alike, key=bar.badness)
        return min((one for one in alike if bar.equal(one, first)), key=lambda one: one.size)
    if prefer == "size":
        least = min(one.size for one in good)
        return _fastest([one for one in good if one.size <= least * (1 + _ALIKE)])
    first = min(good, key=bar.badness)
    return _fastest([one for one in good if bar.equal(one, first)])


def _fastest(alike: Sequence[Candidate]) -> Candidate:
    """The fastest; of those that are about as fast, the smallest."""
    most = max(one.speed for one in alike)
    return min((one for one in alike if one.speed >= most * (1 - EQUAL)), key=lambda one: one.size)


def _behind(one: Candidate, kept: Candidate, prefer: Prefer, bar: Bar) -> str:
    """What the candidate that was kept is better by, what is preferred first."""
    slower = one.speed < kept.speed * (1 - EQUAL)
    larger = one.size > kept.size * (1 + _ALIKE)
    worse = not bar.equal(one, kept) and bar.badness(one) > bar.badness(kept)
    words = {"speed": "slower" * slower, "size": "larger" * larger, "accuracy": "less accurate" * worse}
    order = sorted(words, key=lambda kind: kind != prefer)
    first = next((words[kind] for kind in order if words[kind]), "no better")
    return f"{first} than {kept.recipe}"
