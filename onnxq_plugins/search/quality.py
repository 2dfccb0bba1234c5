"""What the outputs of a network must be worth (the recipe's ``[quality]`` table), and what is done where they are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from onnxq_plugins.errors import Reason, counted
from onnxq_plugins.job import Job, Report
from onnxq_plugins.layers.clipping import least_squares
from onnxq_plugins.layers.complete import activation_spec, complete
from onnxq_plugins.measure.samples import Samples
from onnxq_plugins.plan.grids import natural_grids
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.search.fallback import WIDE, Fallback, Search
from onnxq_plugins.search.judge import SAMPLES, TIE, Judge
from onnxq_plugins.search.unseen import Unseen, decibels, judged
from onnxq_plugins.spec import Array, Plan

_CHECK = 3e9  # multiply-adds over the samples that a network is checked on; at most 32 samples
_SEARCH = 5e9  # and that a search measures on
_FEWEST = 8  # samples
_MARGIN = 2.0  # dB by which saved outputs must be above what was not enough: other samples have less
_MOST = 0.25  # of the multiply-adds in float, where destroyed outputs are already saved
_WORTH = 3.0  # dB that a fallback must gain that was not asked for
_BETTER = 1.0  # dB that other ranges must gain
_CLIPPED = 3.0  # dB that outputs lose by ranges that have not seen the samples: half of the noise
_SAVED = 30.0  # dB that outputs of plain codes seldom have once layers in float have saved them
_PLAIN = 8  # bits of weights whose codes need not be learned
_LOST = 15.0  # dB under which that may cost any number of layers: less is warned of (`measure.verdict`)
_USELESS = 10.0  # dB under which it may on targets that quantize as a whole: there floats cut the network


def keep_quality(job: Job) -> Samples | None:
    """Check the outputs of a job whose plan is solved, and keep what costs them most in 16 bits or in float, as the recipe's
    quality asks for. The report says what was measured, and what was done, under ``quality``. Returns the samples that it
    judged on, None if on none.

    Where codes are learned, and plain ones of 8 bits would have been saved, so are they: by the same layers in float, with
    learned codes in the others or with plain ones. So they never end below what costs less to find."""
    quality, planned = job.recipe.quality, Planned.of(job)
    if quality.sqnr is None or not (planned.layers or planned.activations):
        return None
    if job.calibration.data is None:
        if quality.asked:
            job.note("the quality that is asked for was not checked: that needs samples (--data)")
        return None
    learned = job.recipe.provides("codes")  # only these fit samples closely
    judge = Judge.of(job, apart=learned, work=_CHECK, least=_FEWEST)
    names = [] if judge is None else judged(judge.samples)
    if judge is None or not names:
        return None
    unseen = Unseen.of(job, judge.numbers)
    before = now = decibels(job, judge.samples, job.plan, unseen)
    found, samples = None, judge.samples
    if learned and not quality.asked and before.min() < _SAVED and _no_narrower(job):
        found = _as_plain(job, samples, before, unseen)
    if found is None and before.min() < quality.least:
        now = _other_ranges(job, samples, before, unseen)
        if now.min() < quality.least:
            search, levels = _search(job, judge, before, learned)
            found, samples = search.run(*levels), search.samples
            if found is not None and not quality.asked and not _worth(found, before, quality.least):
                found = None
    after, samples = (now, judge.samples) if found is None else (found.sqnr, samples)  # others may have other parts
    job.report["quality"] = {
        "asked": quality.sqnr,
        "met": bool(after.min() >= (quality.sqnr if quality.asked else quality.least)),
        "samples": len(samples.feeds),
        **({} if unseen is None else {"unseen": True}),
        "sqnr": _table(judged(samples), after),
        **({} if found is None else {"before": _table(names, before), "work": round(found.work, 4)}),
        **({} if found is None else {"float": [*found.floats, *found.constants], "wide": list(found.wide)}),
        **({"decoded": list(found.decoded)} if found is not None and found.decoded else {}),
    }
    if found is not None:
        _apply(job, found, before)
    elif now.min() < quality.least:
        worst = names[int(now.argmin())]
        job.note(f"output '{worst}' has {now.min():.1f} dB on {_samples(job)}{_advice(job)}{_wider(job)}")
    return judge.samples


def _search(job: Job, judge: Judge, before: Array, apart: bool) -> tuple[Search, tuple[list[float], list[float]]]:
    """The search, and the levels and shares of float work for it.

    judge    on a few samples; more of them are searched on
    before   dB of each output, with the recipe's own ranges
    """
    quality, data = job.recipe.quality, job.calibration.data
    assert data is not None and quality.sqnr is not None
    if len(judge.samples.feeds) < min(SAMPLES, len(data.numbers(apart))):
        judge = Judge.of(job, apart=apart, work=_SEARCH, least=_FEWEST) or judge
    first = min(quality.least + _MARGIN, quality.sqnr)
    levels = [quality.sqnr] if quality.asked else [first, (first + quality.sqnr) / 2, quality.sqnr]
    chains = before.min() < (_USELESS if job.target.whole else _LOST)  # whose layers come in chains
    usual = 0.0 if job.target.whole else _MOST
    shares = [1.0 if quality.asked or chains else usual, *[usual] * (len(levels) - 1)]
    return Search(job, judge.samples, Unseen.of(job, judge.numbers)), (levels, shares)


def _no_narrower(job: Job) -> bool:
    """True if all weights are as wide as those of a recipe that does not learn codes."""
    return all(job.plan[y.weight].bits >= min(_PLAIN, job.target.code_bits) for y in Planned.of(job).layers)


def _as_plain(job: Job, samples: Samples, before: Array, unseen: Unseen | None) -> Fallback | None:
    """What saves plain codes and ranges in place of the job's, with the job's where that is better; None where plain ones
    need not be saved, or end below the job's all the same.

    before   dB of each output with learned codes
    """
    quality, judge = job.recipe.quality, Judge.of(job, apart=False, work=_CHECK, least=_FEWEST)
    assert judge is not None
    others = Unseen.of(job, judge.numbers)
    plans = dict(_plain(job, judge))
    starts = {name: decibels(job, judge.samples, plan, others) for name, plan in plans.items()}
    best = max(starts, key=lambda name: float(starts[name].min()))
    if starts[best].min() >= quality.least:
        return None
    first = min(starts.values(), key=lambda dB: float(dB.min()))
    tried = []
    for name in dict.fromkeys((best, _USUAL)):
        search, levels = _search(replace(job, plan=plans[name], report=Report()), judge, first, False)
        found = search.run(*levels)
        if found is not None and _worth(found, starts[name], quality.least):
            tried.append((search, found))
    if not tried:
        return None
    search, found = max(tried, key=lambda one: float(one[1].sqnr.min()))
    found = replace(found, sqnr=decibels(job, samples, found.plan, unseen))
    if found.sqnr.min() <= before.min():
        return None
    both = search.made(job.plan, found.taken)
    if both is not None:
        both = replace(both, sqnr=decibels(job, samples, both.plan, unseen))
        found = found if both.sqnr.min() < found.sqnr.min() - TIE else both
    return found


_USUAL = "extremes, corrected"  # what recipes without learning start from


def _plain(job: Job, judge: Judge) -> Iterator[tuple[str, Plan]]:
    """Plans with plain codes by name: with the job's ranges or the extremes, with corrected biases or without."""
    view = Planned.of(job)
    weights = Plan({y.weight: job.plan[y.weight].request() for y in view.layers})
    extremes = Plan({name: job.plan[name].request() for name in view.activations})
    for ranges, requests in (("ranges", weights), ("extremes", weights | extremes)):
        trial = replace(job, plan=job.plan | requests, report=Report())
        complete(trial)
        yield from ((f"{ranges}, corrected", judge.completed(job.plan | requests)), (ranges, trial.plan))


def _other_ranges(job: Job, samples: Samples, before: Array, unseen: Unseen | None) -> Array:
    """dB of the outputs with the ranges of least squared error, if these are better; with ranges that have room for other
    samples, if values of those are clipped, which nothing else helps against. The job's plan has them then."""
    fixed = natural_grids(job.graph, job.target, job.plan)
    names = [name for name in Planned.of(job).activations if name not in fixed]

    def planned(ranges: Mapping[str, tuple[float, float]]) -> Plan:
        return job.plan | {n: activation_spec(ends, job.plan[n]) for n, ends in ranges.items()}

    clipped = before - before if unseen is None else decibels(job, samples, job.plan, unseen, seen=True) - before
    if unseen is not None and clipped.max() >= _CLIPPED:
        job.plan = planned(unseen.reach(names))
        job.note(
            f"output '{judged(samples)[int(clipped.argmax())]}' has {clipped.max():.1f} dB less on samples that ranges have "
            "not seen, so that these are wider than the samples need; give more samples, above all with what is rare"
        )
        return decibels(job, samples, job.plan, unseen)
    plan = planned(least_squares(job, names))
    after = decibels(job, samples, plan, unseen)
    if after.min() < before.min() + _BETTER:
        return before
    job.plan = plan
    job.note(
        f"ranges of least squared error in place of the recipe's raise the outputs from {before.min():.1f} to "
        f"{after.min():.1f} dB on {counted(len(samples.feeds), 'calibration sample')}"
    )
    return after


def _worth(found: Fallback, before: Array, least: float) -> bool:
    """True if a fallback that was not asked for gains enough."""
    return float(found.sqnr.min()) >= least or float(found.sqnr.min() - before.min()) >= _WORTH


def _table(names: list[str], values: Array) -> dict[str, float]:
    return {name: round(float(value), 2) for name, value in zip(names, values, strict=True)}


def _apply(job: Job, found: Fallback, before: Array) -> None:
    """Make what was found the job's plan, and say what and why."""
    job.plan = found.plan
    gain = f"on {_samples(job)} outputs have {before.min():.1f} dB with it in 8 bits, {found.sqnr.min():.1f} without"
    readers = [reader for constant in found.constants for reader in _readers(job, constant)]
    job.report.floats.update({name: Reason("quality", gain) for name in (*found.floats, *readers)})
    most = "" if len(found.decoded) == len(found.floats) else "most "
    stored = f", {most}weights still in 8 bits" if found.decoded else ""
    kind = "operator" if job.target.whole else "layer"
    parts = [
        f"{counted(len(names), noun)} {state} ({_listed(names)})"
        for names, noun, state in (
            (found.floats, kind, f"in float, {100 * found.work:.1f} % of the multiply-adds{stored}"),
            (found.constants, "constant", "in float"),
            (found.wide, "activation", f"in {WIDE} bits"),
        )
        if names
    ]
    job.note(
        f"8 bits leave the outputs {before.min():.1f} dB; {' and '.join(parts)} make that {found.sqnr.min():.1f} dB "
        f"(worst output, on {_samples(job)})"
        f"{'' if job.report['quality']['met'] else _wider(job)}"
    )


def _samples(job: Job) -> str:
    """What was judged on."""
    quality = job.report["quality"]
    unseen = ", each with the ranges of others" if quality.get("unseen") else ""
    return f"{counted(quality['samples'], 'calibration sample')}{unseen}"


def _advice(job: Job) -> str:
    """What was not done for outputs that are not good enough."""
    quality = job.recipe.quality
    if job.target.whole and not quality.asked:
        return f"; layers in float, which cut a network of integers, are yours to ask for (--min-sqnr {quality.sqnr:g})"
    return ", and no few layers in float make it much better"


def _wider(job: Job) -> str:
    """What helps where too little else does: targets that quantize as a whole run all in 16 bits."""
    wider = job.target.whole and WIDE in job.target.activation_bits and job.recipe.activations.bits < WIDE
    return f"; activations of {WIDE} bits may help (--set activations.bits={WIDE})" if wider else ""


def _readers(job: Job, name: str) -> list[str]:
    """The operators that read a constant."""
    return [str(node.name) for node in job.graph.consumers(name)]


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names[:4]) + (" ..." if len(names) > 4 else "")
