"""Trying remedies: only quantizing again shows what they are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.job import Outcome
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.parallel import Track
from onnxq_plugins.report.causes import Cause
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.report.rows import LayerError
from onnxq_plugins.spec import Array

_OVERALL = 0.5  # part of the noise that a remedy for the whole network is taken to take off
_LEAST, _LATER = 1.0, 0.7  # dB that any remedy may gain; how much less the second and third of a cause are worth
_NO_EFFECT = 0.1  # dB that the choice of samples alone may shift


@dataclass(frozen=True, eq=False)
class Attempt:
    """A remedy that was tried.

    layer     that it was suggested for; "" for the network as a whole
    sqnr      dB of the network's outputs with it, as written; None if it was refused
    refused   why
    """

    layer: str
    remedy: Remedy
    sqnr: float | None
    refused: str = ""

    def verdict(self, before: float) -> str:
        """In words what it was worth.

        before   dB of the outputs without it
        """
        if self.sqnr is None:
            return f"refused: {self.refused}"
        gain = self.sqnr - before
        word = "no effect" if abs(gain) < _NO_EFFECT else "helps" if gain > 0 else "harms"
        return f"{word}: {gain:+.2f} dB, {before:.2f} -> {self.sqnr:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, dB with two decimals."""
        return {
            "layer": self.layer,
            **self.remedy.to_dict(),
            "sqnr": None if self.sqnr is None else round(self.sqnr, 2),
            **({"refused": self.refused} if self.refused else {}),
        }


def promising(layers: Sequence[LayerError], overall: Sequence[Remedy] = ()) -> list[tuple[str, Remedy]]:
    """All remedies, each once with the layer that it is for, by the noise that they may take off: the shares of all layers
    they are suggested for, each by as much as its cause explains.

    overall   for the network as a whole
    """
    expected: dict[str, float] = {}
    found: dict[str, tuple[str, Remedy]] = {}
    for y in layers:
        for remedy in y.remedies:
            part = max(
                _part(cause, n) for cause in y.causes for n, one in enumerate(cause.remedies) if one.typed == remedy.typed
            )
            expected[remedy.typed] = expected.get(remedy.typed, 0.0) + max(y.share or 0.0, 0.0) * part
            found.setdefault(remedy.typed, (y.name, remedy))
    for remedy in overall:
        expected[remedy.typed], found[remedy.typed] = _OVERALL, ("", remedy)
    return sorted(found.values(), key=lambda pair: -expected[pair[1].typed])


def _part(cause: Cause, place: int) -> float:
    """The part of a layer's noise that a remedy of one of its causes may take off.

    place   of the remedy among those of the cause, the best of which come first
    """
    gone = 1 - 10 ** (-max(cause.gain, _LEAST) / 10)
    return gone * _LATER**place


def try_remedies(
    result: Outcome, remedies: Sequence[tuple[str, Remedy]], feeds: Sequence[Mapping[str, Array]], track: Track
) -> tuple[Attempt, ...]:
    """Quantize again with each remedy and measure the outputs.

    remedies   (layer, remedy) pairs
    feeds      to measure on
    """
    if not remedies:
        return ()
    attempts = []
    for layer, remedy in track(remedies, "trying remedies", len(remedies)):
        try:
            changed = with_remedy(result, remedy)
        except OnnxqError as error:
            attempts.append(Attempt(layer, remedy, None, str(error)))
            continue
        sessions = runtimes.session(changed.float_model), runtimes.session(changed.model, written=True)
        reference, quantized = (runtimes.per_feed(session, feeds) for session in sessions)
        attempts.append(Attempt(layer, remedy, worst_sqnr(reference, quantized)))
    return tuple(attempts)


def with_remedy(result: Outcome, remedy: Remedy) -> Outcome:
    """The same model quantized again, by the recipe with a remedy. Statistics of the samples that both need are computed
    once (`calibration.Calibration`)."""
    assert result.again is not None  # `quantize` sets it
    return result.again(remedy.on(result.recipe), settings=remedy.settings)
