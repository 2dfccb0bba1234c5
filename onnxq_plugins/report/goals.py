"""What the user insists on, and whether it was reached: a model that misses it is not written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.report.check import Check


@dataclass(frozen=True)
class Goals:
    """What the user insists on; None for what does not matter.

    sqnr    dB of each output
    speed   times float, on this machine
    keep    write the model even if it misses them

    Raises OnnxqError for what is no number.
    """

    sqnr: float | None = None
    speed: float | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if self.sqnr is not None and not np.isfinite(self.sqnr):
            raise OnnxqError(f"min_sqnr = {self.sqnr} must be a number of decibels, such as 20.")
        if self.speed is not None and not (np.isfinite(self.speed) and self.speed > 0):
            raise OnnxqError(f"min_speed = {self.speed} must be a positive number, such as 1.")

    def missed(self, check: Check | None, quality: dict[str, Any]) -> str:
        """What was not reached or could not be checked, in a sentence; "" if all was.

        quality   `Report.quality`, which counts where there is no check
        """
        return "; ".join([*self._missed_sqnr(check, quality), *self._missed_speed(check)])

    def _missed_sqnr(self, check: Check | None, quality: dict[str, Any]) -> Iterator[str]:
        if self.sqnr is None:
            return
        name, reached = min(quality.get("sqnr", {}).items(), key=lambda item: item[1], default=("", None))
        if check is not None:
            worst = check.worst if check.real else None
            name, reached = ("", None) if worst is None else (worst.name, worst.sqnr)
        if reached is None:
            yield (
                "--min-sqnr was not checked: it needs samples of outputs of floats (--data), and a model that is not random"
            )
        elif round(reached, 1) < self.sqnr:
            yield (
                f"output '{name}' reaches {reached:.1f} dB, not {self.sqnr:g}, with all in float that was found to matter: "
                "lower --min-sqnr, or look at onnxq diagnose"
            )

    def _missed_speed(self, check: Check | None) -> Iterator[str]:
        if self.speed is None:
            return
        speed = None if check is None else check.speed
        if speed is None:
            yield "--min-speed was not checked: it needs a target that runs here, inputs (--data), and the check itself"
        elif speed.high < self.speed:
            yield f"{speed.ratio:.2f}x the speed of float, not {self.speed:g}: lower --min-speed, or keep the float model"
