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
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.spec import Array

_NO_EFFECT = 0.1  # dB that the choice of samples alone may shift


@dataclass(frozen=True, eq=False)
class Attempt:
    """A remedy that was tried.

    layer     that it was suggested for
    sqnr      dB of the network's outputs with it; None if it was refused
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


def try_remedies(
    result: Outcome, remedies: Sequence[tuple[str, Remedy]], feeds: Sequence[Mapping[str, Array]], track: Track
) -> tuple[Attempt, ...]:
    """Quantize again with each remedy and measure the outputs.

    remedies   (layer, remedy) pairs
    feeds      to measure on
    """
    if not remedies:
        return ()
    assert result.again is not None  # `quantize` sets it
    attempts = []
    for layer, remedy in track(remedies, "trying remedies", len(remedies)):
        try:
            changed = result.again(remedy.on(result.recipe), settings=remedy.settings)
        except OnnxqError as error:
            attempts.append(Attempt(layer, remedy, None, str(error)))
            continue
        models = changed.float_model, changed.model
        reference, quantized = (runtimes.per_feed(runtimes.session(model), feeds) for model in models)
        attempts.append(Attempt(layer, remedy, worst_sqnr(reference, quantized)))
    return tuple(attempts)
