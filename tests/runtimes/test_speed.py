"""Which of two models is faster: what is claimed holds whatever else the machine does, and the runs are bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins.runtimes import speed
from onnxq_plugins.runtimes.speed import Speed, side_by_side
from tests.zoo import examples


def times(seed: int, ratio: float, pairs: int = 45, burst: float = 0.4) -> list[tuple[float, float]]:
    """Runs of 1 ms and 1 / ratio ms, 1 % of jitter; in a part of them another process takes its turn."""
    rng = np.random.default_rng(seed)
    seconds = np.array([1e-3, 1e-3 / ratio]) * (1 + 0.01 * np.abs(rng.standard_normal((pairs, 2))))
    seconds += (rng.random((pairs, 2)) < burst) * rng.exponential(3e-3, (pairs, 2))
    return [(float(a), float(b)) for a, b in seconds]


@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.3, 0.5]))
@examples(60)
def test_nothing_is_called_slower_that_is_not(seed, burst):
    assert not Speed.of(times(seed, 1.0, burst=burst)).slower
    assert not Speed.of(times(seed, 1.3, burst=burst)).slower


@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.3, 0.5]))
@examples(60)
def test_what_is_slower_is_called_so_and_by_how_much(seed, burst):
    found = Speed.of(times(seed, 0.7, burst=burst))
    assert found.slower and found.ratio == pytest.approx(0.7, rel=0.05)
    assert found.low <= found.ratio <= found.high
    assert found.text == f"{found.ratio:.2f}x the speed of float"


def test_two_per_cent_are_no_difference():
    found = Speed.of(times(0, 0.98, burst=0))
    assert not found.slower and found.text == "about the speed of float"


def test_a_few_runs_prove_little():
    few = [(1.0, 1.05), (1.0, 1.06), (1.0, 1.04)]
    assert not Speed.of(few).slower and "roughly" in Speed.of(few).text
    assert Speed.of([(1.0, 2.0)] * 3).slower
    assert not Speed.of([(1.0, 2.0), (1.0, 2.0), (3.0, 2.0), (1.0, 2.0)]).slower  # one says otherwise


class Clock:
    """A clock that only runs of a model move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs = 0

    def perf_counter(self) -> float:
        return self.now

    def model(self, seconds: float) -> object:
        clock = self

        class Runner:
            def run(self, outputs: object, feed: dict) -> None:
                clock.now += seconds
                clock.runs += 1

        return Runner()


@pytest.mark.parametrize(("seconds", "pairs"), [(1e-6, 60), (0.01, 15), (0.1, 5), (10.0, 3)])
def test_runs_are_bounded(monkeypatch, seconds, pairs):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    found = side_by_side((clock.model(seconds), clock.model(seconds)), [({}, {})], seconds=0.3, limit=1.0)
    assert found.pairs == pairs and clock.runs == 2 * pairs
    assert found.text == "about the speed of float"


def test_runs_that_were_measured_before_count(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    known = [(10.0, 5.0)] * 3
    found = side_by_side((clock.model(10.0), clock.model(5.0)), [({}, {})], known, seconds=0.0, limit=0.0)
    assert clock.runs == 0 and found.ratio == 2


# ---- several models ------------------------------------------------------------------------------------------------------


def named(clock: Clock, seconds: float) -> object:
    runner = clock.model(seconds)
    runner.get_inputs = runner.get_overridable_initializers = list
    return runner


@pytest.mark.parametrize(("seconds", "rounds"), [(1e-6, 1000), (0.01, 25), (0.1, 5), (10.0, 3)])
def test_several_models_run_in_turn(monkeypatch, seconds, rounds):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    runners = [named(clock, share * seconds) for share in (1.0, 2.0, 0.5, 0.5)]
    found = speed.against_first(runners, {}, seconds=1.0, limit=2.0)
    assert [one.ratio for one in found] == pytest.approx([1.0, 0.5, 2.0, 2.0])
    assert {one.pairs for one in found} == {rounds} and clock.runs == 4 * (rounds + 1)
    assert found[1].slower and not any(one.slower for one in (found[0], *found[2:]))


def test_timing_ends_where_it_is_clear_which_model_is_the_fastest(monkeypatch):
    for shares, rounds in (((1.0, 2.0, 0.5), 9), ((1.0, 2.0, 3.0), 9), ((1.0, 0.99), 100), ((1.0, 0.5, 0.5), 34)):
        clock = Clock()
        monkeypatch.setattr(speed, "time", clock)
        runners = [named(clock, 0.01 * share) for share in shares]
        seconds = 10.0 if rounds == 9 else sum(shares) * 0.01 * rounds - 1e-6
        found = speed.against_first(runners, {}, seconds, limit=10.0)
        assert {one.pairs for one in found} == {rounds}
