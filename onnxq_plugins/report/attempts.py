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
from onnxq_plugins.search.judge import clear, decibels_of, standard_error
from onnxq_plugins.spec import Array

_OVERALL = 0.5  # part of the noise that a remedy for the whole network is taken to take off
_LEAST, _LATER = 1.0, 0.7  # dB that any remedy may gain; how much less the second and third of a cause are worth


@dataclass(frozen=True, eq=False)
class Attempt:
    """A remedy that was tried.

    layer     that it was suggested for; "" for the network as a whole
    before    dB of each sample without it, see `search.judge.decibels_of`; as written
    after     the same with it; None if it was refused
    sqnr      dB of the worst output with it, pooled over the samples; None if it was refused
    refused   why
    """

    layer: str
    remedy: Remedy
    before: Array
    after: Array | None
    sqnr: float | None = None
    refused: str = ""

    @property
    def verdict(self) -> str:
        """In words what it was worth: it helps or harms where that is more than its standard error, paired by samples, so
        that a gain on few samples by chance is none."""
        if self.after is None:
            return f"refused: {self.refused}"
        gain = self.after - self.before
        error = standard_error(gain)
        word = ("helps" if gain.mean() > 0 else "harms") if len(gain) > 1 and clear(gain) else "no clear difference"
        means = f"{self.before.mean():.1f} -> {self.after.mean():.1f}"
        return f"{word}: {gain.mean():+.2f} dB{f' +- {error:.2f}' if len(gain) > 1 else ''}, {means}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, dB with two decimals."""
        return {
            "layer": self.layer,
            **self.remedy.to_dict(),
            "verdict": self.verdict.partition(":")[0],
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
    feeds      to judge on
    """
    if not remedies:
        return ()
    reference, own = _outputs(result, feeds)
    before, attempts = decibels_of(reference, own), []
    for layer, remedy in track(remedies, "trying remedies", len(remedies)):
        try:
            reference, quantized = _outputs(with_remedy(result, remedy), feeds)
        except OnnxqError as error:
            attempts.append(Attempt(layer, remedy, before, None, refused=str(error)))
            continue
        after = decibels_of(reference, quantized)
        attempts.append(Attempt(layer, remedy, before, after, worst_sqnr(reference, quantized)))
    return tuple(attempts)


def _outputs(result: Outcome, feeds: Sequence[Mapping[str, Array]]) -> tuple[list[list[Any]], list[list[Any]]]:
    """The values of each output per sample, of the float network and of the quantized one as written."""
    sessions = runtimes.session(result.float_model), runtimes.session(result.model, written=True)
    reference, quantized = (runtimes.per_feed(session, feeds) for session in sessions)
    return reference, quantized


def with_remedy(result: Outcome, remedy: Remedy) -> Outcome:
    """The same model quantized again, by the recipe with a remedy. Statistics of the samples that both need are computed
    once (`calibration.Calibration`)."""
    assert result.again is not None  # `quantize` sets it
    return result.again(remedy.on(result.recipe), settings=remedy.settings)
