"""What runs models of a target, and what it is asked: one file per runtime.

A runtime is asked once for everything: it loads a file, runs some samples, and says of each operator whether it ran in
integers. What it says comes from the runtime's own report (a profile, its list of kernels, a compiler's log), never from
what the file looks like."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from onnxq_plugins.data import Input
from onnxq_plugins.spec import Array

Kind = Literal["integer", "fake", "float", "moves"]


@dataclass(frozen=True)
class Executed:
    """One operator of a loaded model.

    kind    ``integer``: computed on codes; ``fake``: decoded, computed in float and encoded again; ``float``: neither is it
            quantized in the file; ``moves``: it computes nothing (shapes, copies, conversions between codes and floats)
    where   the part of the machine that runs it, if there are several: "NPU", "CPU"
    why     why it is not integer, if the runtime tells or it is known; "" otherwise
    """

    name: str
    op: str
    kind: Kind
    where: str = ""
    why: str = ""


@dataclass(frozen=True)
class Inspection:
    """What a runtime made of a file.

    outputs        of each sample, by the names of the model's outputs; () if it only compiles
    operators      as it runs them
    milliseconds   of one run that nothing disturbed, one thread; None where it says nothing (simulators)
    facts          further numbers by name, such as "partitions" or "SRAM kB"
    """

    outputs: tuple[Mapping[str, Array], ...] = ()
    operators: tuple[Executed, ...] = ()
    milliseconds: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Kind -> number of operators."""
        return dict(Counter(each.kind for each in self.operators))


@dataclass(frozen=True)
class Proof:
    """What a runtime made of a file, beside what onnxruntime makes of the same file, or of another that is given for it.

    runtime     its name
    against     what it was compared with, in words; "" if with nothing
    samples     that both ran
    random      they were random numbers
    agreement   percent of the samples with the same class; None without classes, and on random numbers
    decibels    signal to noise of the worst output; None if nothing was run
    identical   all outputs are equal to the last bit
    """

    runtime: str
    inspection: Inspection
    samples: int = 0
    random: bool = False
    agreement: float | None = None
    decibels: float | None = None
    identical: bool = False
    against: str = "onnxruntime"

    @property
    def text(self) -> str:
        """In a line: how operators run, how near the outputs are to onnxruntime's, facts and time."""
        counts = self.inspection.counts()
        parts = [", ".join(f"{n} {kind}" for kind in ("integer", "fake", "float") if (n := counts.get(kind))) or "loads"]
        if self.decibels is not None:
            near = f"identical to {self.against}" if self.identical else f"{self.decibels:.1f} dB against {self.against}"
            same = "" if self.agreement is None else f", {self.agreement:.1f}% the same class"
            parts.append(f"{near}{same} on {self._ran}")
        elif self.samples:
            parts.append(f"ran {self._ran}, compared with nothing (--against MODEL.onnx)")
        if self.inspection.milliseconds is not None:
            parts.append(f"{self.inspection.milliseconds:.3f} ms, 1 thread")
        parts += [f"{name} {value}" for name, value in self.inspection.facts.items() if value != ""]
        return "; ".join(parts)

    @property
    def _ran(self) -> str:
        return f"{self.samples} {'random ' * self.random}sample{'s' * (self.samples > 1)}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, without outputs."""
        return {
            "runtime": self.runtime,
            "against": self.against,
            "samples": self.samples,
            "random": self.random,
            "agreement": self.agreement,
            "decibels": None if self.decibels is None else min(self.decibels, 200.0),
            "identical": self.identical,
            "milliseconds": self.inspection.milliseconds,
            "facts": dict(self.inspection.facts),
            "operators": [asdict(each) for each in self.inspection.operators],
        }


@dataclass(frozen=True)
class Runtime:
    """A runtime that is there to be asked.

    name      as `audit --runtime` calls it
    doc       what it is, in a line
    install   the command that installs it
    suffix    of the files that it reads
    inspect   (file, samples, settings) -> `Inspection`; samples map input names to arrays and may be none: nothing is run
              then. Raises OnnxqError, one sentence: not installed (with `install`), or why it cannot load or run the file
    settings  names and defaults of what `inspect` can be told
    module    that it is in, which tells at no cost that it is not installed; "" for what is no Python module
    inputs    what samples for a file hold, where files are not ONNX; without it they need the ONNX model beside the file
    """

    name: str
    doc: str
    install: str
    inspect: Callable[[Path, Sequence[Mapping[str, Array]], Mapping[str, Any]], Inspection]
    suffix: str = ".onnx"
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    module: str = ""
    inputs: Callable[[Path], Sequence[Input]] | None = field(default=None, compare=False)

    def missing(self, settings: Mapping[str, Any]) -> str:
        """That it is not installed, a sentence; "" where it is, and where only asking it would tell."""
        if not self.module or settings.get("python"):
            return ""
        there = sys.modules.get(self.module, 0) is not None and importlib.util.find_spec(self.module) is not None
        return "" if there else f"'{self.name}' is not installed; {self.install}."
