"""Which of several models is kept: laws for any candidates, and the words for the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins.report.candidates import FLOAT, Bar, Candidate, choose, unfit
from onnxq_plugins.runtimes.speed import EQUAL, Speed
from tests.zoo import examples

OWN = Candidate(FLOAT, 0.0, 200.0, True, 1000, 1.0)
DECIBELS = Bar(1.0, 20.0, decibels=True)
PREFERENCES = ("speed", "size", "accuracy")


def candidate(name: str, sqnr: float, size: int, ratio: float | None, doubt: float = 0.0) -> Candidate:
    pace = None if ratio is None else Speed(1.0, 1 / ratio, ratio, ratio * (1 - doubt), ratio * (1 + doubt), 60)
    drop = max(DECIBELS.sqnr - sqnr, 0.0)
    return Candidate(name, drop, sqnr, drop == 0, size, 0.0 if ratio is None else ratio, pace=pace)


@st.composite
def several(draw) -> list[Candidate]:
    numbers = st.tuples(
        st.floats(0, 60),
        st.integers(1, 2000),
        st.none() | st.floats(0.2, 4),
        st.sampled_from([0.0, 0.02, 0.3]),
        st.booleans(),
    )
    made = []
    for n, (sqnr, size, ratio, doubt, possible) in enumerate(draw(st.lists(numbers, min_size=1, max_size=6))):
        made.append(candidate(f"r{n}", sqnr, size, ratio, doubt) if possible or not n else Candidate(f"r{n}", why="no"))
    return made


@given(several(), st.sampled_from(PREFERENCES))
@examples(200)
def test_what_is_kept_is_the_best_by_what_is_preferred(candidates, prefer):
    kept, told, own = choose(candidates, OWN, prefer, DECIBELS)
    good = [one for one in candidates if one.met]
    fit = [one for one in good if not unfit(one, OWN, prefer)]
    assert (kept is own) == (bool(good) and not fit)
    assert sum(one is kept for one in (*told, own)) == 1 and not kept.rejected
    if not good:
        assert kept.drop == min(one.drop for one in candidates if not one.why) and not kept.met
    elif fit:
        assert kept in fit
        if prefer == "speed":
            assert not kept.slower and kept.speed >= max(one.speed for one in fit) * (1 - EQUAL)
        elif prefer == "size":
            assert kept.size < OWN.size and kept.size <= 1.02 * min(one.size for one in fit)
        else:
            assert not kept.slower and kept.sqnr >= max(one.sqnr for one in fit) - 0.1
    for before, after in zip(candidates, told, strict=True):
        assert replace(after, rejected="") == before
        assert bool(after.rejected) == (after is not kept and not after.why)


def test_slower_than_float_does_not_win_but_for_size():
    slow = candidate("int8", 30, 250, 0.8)
    for prefer in PREFERENCES:
        kept, (told,), own = choose([slow], OWN, prefer, DECIBELS)
        if prefer == "size":
            assert kept is slow and own.rejected == "larger than int8"
        else:
            assert kept is own and told.rejected == "slower than float"


def test_noise_is_neither_slower_nor_faster():
    for ratio, doubt in ((0.95, 0.1), (0.99, 0.0), (1.05, 0.1)):
        smaller, larger = candidate("a", 30, 250, ratio, doubt), candidate("b", 30, 1000, ratio, doubt)
        assert choose([smaller], OWN, "speed", DECIBELS)[0] is smaller  # as fast, and smaller
        kept, (told,), own = choose([larger], OWN, "speed", DECIBELS)
        assert kept is own and told.rejected == "neither faster nor smaller than float"


def test_what_does_not_run_here_is_not_compared_by_speed():
    unknown = candidate("int8", 30, 250, None)
    for prefer in PREFERENCES:
        assert choose([unknown], OWN, prefer, DECIBELS)[0] is unknown


def test_alike_candidates_are_told_apart_by_what_else_counts():
    fast, slow, small = candidate("a", 30, 500, 2.0), candidate("b", 30.04, 500, 1.5), candidate("c", 29.98, 400, 1.99)
    kept, told, own = choose([fast, slow, small], OWN, "accuracy", DECIBELS)
    assert kept is small and [one.rejected for one in told] == ["larger than c", "slower than c", ""]
    assert own.rejected == "slower than c"
    near = candidate("d", 40, 405, 3.0)
    assert choose([small, near], OWN, "size", DECIBELS)[0] is near  # of sizes alike the faster
    better = candidate("e", 35, 600, 1.98)
    kept, told, _ = choose([fast, better], OWN, "speed", DECIBELS)
    assert kept is better and told[0].rejected == "less accurate than e"


@pytest.mark.parametrize(
    ("bar", "one", "text"),
    [
        (DECIBELS, candidate("a", 12.34, 10, 2.0), "12.3 dB, less than 20"),
        (Bar(1.0, 5.0), Candidate("a", 2.5, 30.0), "drops by 2.50, more than 1"),
        (Bar(1.0, 5.0), Candidate("a", 0.0, 3.0), "3.0 dB, less than 5"),
    ],
)
def test_why_a_candidate_is_not_good_enough(bar, one, text):
    good = Candidate("b", 0.0, 50.0, True, 10, 2.0)
    _, (told, _), _ = choose([replace(one, met=False), good], OWN, "speed", bar)
    assert told.rejected == text


def test_one_sample_decides_nothing():
    bar = Bar(2.0, 5.0, noise=1.0)
    slow, fast = Candidate("a", 0.0, 30.0, True, 10, 1.5), Candidate("b", 1.0, 30.0, True, 10, 2.0)
    assert choose([slow, fast], OWN, "accuracy", bar)[0] is fast
    assert choose([slow, replace(fast, drop=1.5)], OWN, "accuracy", bar)[0] is slow
