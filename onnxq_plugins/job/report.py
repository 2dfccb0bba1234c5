"""What a run did, for people and for JSON."""

from __future__ import annotations

import json
from typing import Any, Literal

from onnxq_plugins.errors import Reason


class Report(dict[str, Any]):
    """What a run did, for people and for JSON: a dict whose known entries are attributes with types. Plugins may add
    entries of their own, as values that JSON can hold."""

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        notes: list[str] = self.setdefault("notes", [])
        return notes

    @property
    def warnings(self) -> list[str]:
        """What is bad about the result, and what to try."""
        warnings: list[str] = self.setdefault("warnings", [])
        return warnings

    @property
    def check(self) -> dict[str, Any]:
        """The quantized network beside the user's own, see `Result.check`: ``outputs``, on so many ``samples``, ``sqnr`` of
        the worst one, ``speed``, ``bytes``, what is ``destroyed``, ``slower``, ``larger``. {} if nothing was checked."""
        return dict(self.get("check", {}))

    @property
    def floats(self) -> dict[str, Reason]:
        """Layers, and readers of other constants, that stay float by choice -> why."""
        floats: dict[str, Reason] = self.setdefault("floats", {})
        return floats

    @property
    def widened(self) -> dict[str, int]:
        """Layers -> scales that were widened so that biases fit int32; a note in the end."""
        widened: dict[str, int] = self.setdefault("widened", {})
        return widened

    @property
    def steps(self) -> list[dict[str, Any]]:
        """One entry a pass: ``pass``, ``seconds``, ``exact``, ``parameters``, ``result`` (what it returned; also under its
        old name, ``told``), ``drift``."""
        return list(self.get("steps", []))

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One row a layer: ``name``, ``op``, ``kernel``, ``parameters``, ``weights``, ``bits_per_weight``; for one that runs
        in float ``why_float`` and ``why_float_kind`` (`Reason`)."""
        return list(self.get("layers", []))

    @property
    def constants(self) -> list[dict[str, Any]]:
        """One row a constant of 1 kB and more outside layers: ``name``, ``op`` and ``readers`` (operators), ``parameters``,
        ``float_bytes``; ``weights`` and ``bits_per_weight`` where it is stored as codes, else ``why_float`` and
        ``why_float_kind``."""
        return list(self.get("constants", []))

    @property
    def quality(self) -> dict[str, Any]:
        """What the outputs are worth, where the recipe asks for a quality: ``asked`` dB, whether that, or what the recipe
        insists on, is ``met``, and the ``sqnr`` of each output on ``samples`` samples. Where something was kept from 8 bits:
        the dB ``before``, the names that are now ``float`` and ``wide`` (16 bits), and their share of the ``work``. {} if
        nothing was checked."""
        return dict(self.get("quality", {}))

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as plain values."""
        return dict(self.get("recipe", {}))

    @property
    def recipe_name(self) -> str:
        """Name of the recipe's file; "" if it came from none."""
        return str(self.get("recipe_name", ""))

    @property
    def summary(self) -> str:
        """One line: kernels, size, what stayed float."""
        return str(self.get("summary", ""))

    @property
    def bits_per_weight(self) -> float:
        """On disk, with scales and multipliers."""
        return float(self.get("bits_per_weight", 0.0))

    @property
    def float_products(self) -> list[str]:
        """Products of two activations that run in float."""
        return list(self.get("float_products", []))

    def size(self, of: Literal["float", "quantized"]) -> int:
        """Bytes of the user's own model, or of what was made of it."""
        return int(self["bytes"][of])

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        values: dict[str, Any] = json.loads(json.dumps(self))
        return values
