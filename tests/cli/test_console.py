"""What long loops say."""

from __future__ import annotations

from onnxq_plugins.cli import console


def test_a_long_loop_without_a_terminal_says_how_long_it_will_take(monkeypatch):
    told, clock = [], iter([0.0, *(6.0 * n for n in range(1, 9))])
    monkeypatch.setattr(console, "notify", told.append)
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    assert list(console.track(range(8), "rounding", 8)) == list(range(8))
    assert told[0] == "rounding: 1 of 8 after 12 s, about 84 s more"
    assert told[1] == "rounding: 3 of 8 after 24 s, about 40 s more"
    assert len(told) == 3


def test_a_short_loop_says_nothing(monkeypatch):
    told = []
    monkeypatch.setattr(console, "notify", told.append)
    assert list(console.track(range(8), "rounding")) == list(range(8))
    assert not told
