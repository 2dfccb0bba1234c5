"""What operators cost in onnxruntime's CPU provider, in microseconds, one thread: a small table instead of a stopwatch, so
that the same model gives the same decisions on every machine.

A kernel's time is taken to be linear in what it does:

    t = base + a * multiply-adds + b * values read + c * values written + d * weights + e * values of patches + f * positions
        + g * bytes beyond the cache

with coefficients a..g >= 0 of its own for each class of kernels (`Kernel`): float or integer, pointwise, dense or depthwise,
along one spatial axis or two, one row or many. `onnxq_plugins/runtimes/costs.json` holds them per instruction set, fitted to
random shapes by `python -m benchmarks.costs`, which also says how well they fit. A machine may have a table of its own
(`export.kernel_times`, `onnxq costs --measure`), which counts before these.

Layouts are part of the cost. Float convolutions of two spatial axes run on blocks of 16 channels (NCHWc) where their
channels fit (`Kernel.blocked`), integer ones on channels in the end (NHWC): a tensor between the two, or from a reader that
wants neither, is reordered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from math import isfinite, prod
from pathlib import Path
from typing import Any

from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.files import digest, user_cache, write_file
from onnxq_plugins.runtimes.machine import machine_name, processor

FEATURES = ("base", "Mmac", "kread", "kwritten", "kweights", "kpatches", "kpositions", "kfar")
BLOCK = 16  # channels of a block in NCHWc
CONVERSIONS = ("quantize", "dequantize", "transpose", "block", "unblock")
OWN = "own"  # name of the table that was measured on this machine
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
INSTRUCTIONS = (  # flag of a processor -> its table, the best first
    ("amx_int8", "amx"),
    ("avx512_vnni", "avx512-vnni"),
    ("avx2", "avx2"),
)
_NEAR = 2**20  # bytes that an operator reads and writes within the cache
_MOVED = frozenset({"Slice", "Split", "Gather", "Expand", "Tile", "DepthToSpace", "SpaceToDepth"})  # copy


@dataclass(frozen=True)
class Kernel:
    """An operator with the sizes that its time depends on.

    op       of ONNX
    inputs   shapes of the activations it reads
    output   shape of what it writes
    weight   shape of a layer's weight; () for other operators
    groups   of a convolution
    """

    op: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    weight: tuple[int, ...] = ()
    groups: int = 1
    attrs: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def spatial(self) -> bool:
        """True if convolutions of its rank have a blocked layout."""
        return len(self.output) == 4

    @property
    def blocked(self) -> bool:
        """True if a float convolution runs on blocks of channels: those of its input fit blocks of 4, or are few; of groups,
        those of each fit whole blocks (of depthwise ones blocks of 4)."""
        if self.op != "Conv" or not self.weight or not self.spatial:
            return False
        inputs, outputs = self.weight[1], self.weight[0] // self.groups
        if self.groups == 1:
            return inputs < BLOCK or inputs % 4 == 0
        return self.groups % 4 == 0 if inputs == outputs == 1 else inputs % BLOCK == outputs % BLOCK == 0

    def kind(self, integer: bool) -> str:
        """The class of kernels that runs it."""
        side = "int" if integer else "float"
        if self.op in _MOVED:
            return f"Slice {side}"
        if self.op != "Conv" or not self.weight:
            return f"{self.op}{' row' if self.weight and prod(self.output[:-1]) == 1 else ''} {side}"
        return f"Conv {self._shape(integer)} {side}"

    def _shape(self, integer: bool) -> str:
        """What a convolution's weight looks like."""
        taps, wide = prod(self.weight[2:]), min(self.output[2:], default=1) > 1 and self.spatial
        depth = self.groups > 1 and self.weight[1] == 1 and self.groups == self.weight[0]
        if depth and integer:
            return f"depthwise{'' if self.groups % BLOCK == 0 else ' unaligned'}"
        plain = "" if integer or self.blocked else " plain"
        if self.groups > 1:
            return f"{'depthwise' if depth else 'grouped'}{plain}"
        shape = "row" if taps == prod(self.output[2:]) == 1 else "pointwise" if taps == 1 else "dense" if wide else "narrow"
        stem = " stem" if self.weight[1] < BLOCK and not integer and taps > 1 and not plain else ""
        return f"{shape}{stem}{plain}"

    def features(self, integer: bool) -> tuple[float, ...]:
        """What the kernel does, in the order of `FEATURES`."""
        read, written = sum(map(prod, self.inputs)), prod(self.output)
        macs = weights = patches = positions = 0
        if self.op in GATES and self.inputs:  # the states' products, those of the inputs as patches, and the steps
            hidden, ways = int(self.attrs["hidden_size"]), 1 + (self.attrs.get("direction") == "bidirectional")
            gates, steps = ways * GATES[self.op] * hidden, prod(self.inputs[0][:-1])
            weights = gates * (self.inputs[0][-1] + hidden)
            macs, patches, positions = gates * hidden * steps, gates * self.inputs[0][-1] * steps, ways * self.inputs[0][0]
        elif not self.weight:
            macs = written * self.inputs[0][-1] if self.op == "MatMul" and self.inputs[0] else 0
        elif self.op != "Conv":  # Gemm, MatMul [K, N]
            positions, weights = written // max(self.output[-1], 1), prod(self.weight)
            macs = positions * weights
        else:
            outputs = -(-self.weight[0] // BLOCK) * BLOCK if not integer and self.blocked else self.weight[0]
            places, taps = prod(self.output[2:]) * self.output[0], prod(self.weight[2:])
            whole = self.groups == 1 or not (integer or self.blocked)  # a matrix of all patches is made
            patches = self.weight[1] * self.groups * taps * places if taps > 1 and whole else 0
            weights, positions, written = outputs * self.weight[1] * taps, taps * places, outputs * places
            macs = weights * places
        far = max((read + written) * (1 if integer else 4) - _NEAR, 0)
        return (1.0, macs / 1e6, *(n / 1e3 for n in (read, written, weights, patches, positions, far)))


@dataclass(frozen=True)
class Costs:
    """Microseconds of kernels.

    name    of the instruction set, or `OWN`
    source  where they were measured
    table   class of kernels -> a coefficient for each of `FEATURES`
    """

    name: str
    source: str
    table: Mapping[str, Sequence[float]]

    def of(self, kernel: Kernel, integer: bool = False) -> float:
        """Microseconds of a kernel. Classes that were not measured cost what an Add does."""
        row = self.table.get(kernel.kind(integer))
        row = self.table["Add int" if integer else "Add float"] if row is None else row
        return float(sum(a * b for a, b in zip(row, kernel.features(integer), strict=True)))

    def call(self, ports: int) -> float:
        """Microseconds that the call of a session takes beside its kernels.

        ports   its inputs and outputs
        """
        base, each = self.table.get("call", (0.0, 0.0))
        return float(base + each * ports)

    def move(self, what: str, size: int) -> float:
        """Microseconds of one of `CONVERSIONS` of `size` values."""
        base, each = self.table[what]
        return float(base + each * size / 1e3)


@cache
def tables() -> dict[str, Costs]:
    """The tables that come with the package, by instruction set."""
    text = files("onnxq_plugins.runtimes").joinpath("costs.json").read_text(encoding="utf-8")
    return {name: Costs(name, table["source"], table["kernels"]) for name, table in json.loads(text).items()}


def table_of(name: str, here: bool = False) -> Costs | None:
    """The table to decide by; None if there is none.

    name   of a table that comes with the package, or `OWN`: the one that was measured on this machine
    here   models run on this machine: its own table counts before that one, then that of its instruction set. Not where
           they are made for the least of them

    Raises OnnxqError if there is no such table, or if this machine's own cannot be read.
    """
    here = here and runs_here(name)
    if name == OWN or here:
        own = read_own()
        if own is not None or name == OWN:
            return own
    shipped = tables()
    if here:
        name = this_table() or name
    return shipped.get(name)


def this_table() -> str:
    """The name of the table of this machine's instruction set; "" if there is none."""
    flags = set((processor().get("flags") or "").split())
    return next((table for flag, table in INSTRUCTIONS if flag in flags), "")


def runs_here(name: str) -> bool:
    """False where a target's table is of the least instruction set and this machine has another: its kernels are others."""
    return name != INSTRUCTIONS[-1][1] or this_table() == name


def check_table(name: str) -> None:
    """Raise ValueError if a recipe names a table that there cannot be."""
    if name and name not in (names := [*tables(), OWN]):
        raise ValueError(f"there is no table '{name}' of costs; {known(name, names)}")


def own_file() -> Path:
    """Where this machine's own table is: named after the processor and the version of onnxruntime, so that another machine
    that shares the folder, or another version, does not take it for its own."""
    return user_cache() / f"costs-{digest(machine_name())}.json"


def read_own() -> Costs | None:
    """This machine's own table; None if it was not measured. Raises OnnxqError if the file is damaged."""
    file = own_file()
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        rows = {str(kind): tuple(float(c) for c in row) for kind, row in given["kernels"].items()}
        whole = all(len(row) == (2 if kind in (*CONVERSIONS, "call") else len(FEATURES)) for kind, row in rows.items())
        sound = all(isfinite(c) and c >= 0 for row in rows.values() for c in row)
        if whole and sound and {*CONVERSIONS, "Add float", "Add int"} <= set(rows):
            return Costs(OWN, str(given["source"]), rows)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise OnnxqError(f"'{file}', the costs of kernels on this machine, is damaged; onnxq costs --measure makes it again.")


def write_own(rows: Mapping[str, Sequence[float]]) -> Path:
    """Keep this machine's own table. Raises OnnxqError if that is not possible."""
    file = own_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnnxqError(f"'{file.parent}' cannot be made ({error.strerror}); ONNXQ_CACHE names another folder.") from error
    return write_file(json.dumps({"source": machine_name(), "kernels": rows}).encode(), file)
