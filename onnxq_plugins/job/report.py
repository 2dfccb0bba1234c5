"""What a run did, for people and for JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from onnxq_plugins.errors import Reason

# of the table of layers
COLUMNS = frozenset(
    {
        *("name", "op", "kernel", "parameters", "weights", "bits_per_weight", "why_float", "why_float_kind", "float_bytes"),
        "inside",
    }
)


def _check_plain(where: str, value: Any) -> None:
    """Raise TypeError for what is no number, text or truth value."""
    if type(value) not in (int, float, str, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise TypeError(f"{where}: {value!r} is no plain value; give a number, text, True or False, such as float(x)")


class Report(dict[str, Any]):
    """What a run did, for people and for JSON: a dict whose known entries are attributes with types. Plugins may add
    entries of their own, as values that JSON can hold."""

    def add_column(self, name: str, values: Mapping[str, Any]) -> None:
        """Add a column to the table of layers, in the page and in `layers`; or values to one that is there.

        name     of the column, such as ``acme loss``
        values   layer -> number, text or truth value; layers that have none, or are gone in the end, are left out

        Raises ValueError for a name that the table has, TypeError for a value that is none of these.
        """
        if not name or name in COLUMNS:
            raise ValueError(f"a column cannot be named '{name}': the table of layers has it")
        for layer, value in values.items():
            _check_plain(f"column '{name}', layer '{layer}'", value)
        self.setdefault("added", {}).setdefault(name, {}).update(values)

    def add_section(
        self, title: str, text: str = "", columns: Sequence[str] = (), rows: Iterable[Sequence[Any]] = ()
    ) -> None:
        """Add a section to the page, and to `sections`: a paragraph, a table, or both.

        columns, rows   headings of the table, and as many plain values for each of its rows

        Raises ValueError for rows of another length, TypeError for a value that is no number, text or truth value.
        """
        table = [list(row) for row in rows]
        for row in table:
            if len(row) != len(columns):
                raise ValueError(f"section '{title}' has {len(columns)} columns, and a row of {len(row)} values")
            for value in row:
                _check_plain(f"section '{title}'", value)
        self.setdefault("sections", []).append({"title": title, "text": text, "columns": [*columns], "rows": table})

    @property
    def columns(self) -> list[str]:
        """The columns that passes have added to `layers`."""
        return list(dict.fromkeys(key for row in self.layers for key in row if key not in COLUMNS))

    @property
    def sections(self) -> list[dict[str, Any]]:
        """What passes have added: ``title``, ``text``, ``columns`` and ``rows`` each."""
        return list(self.get("sections", []))

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
        in float ``why_float`` and ``why_float_kind`` (`Reason`); for one in a branch of an If which, as ``inside``; and what
        passes have added (`add_column`)."""
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
