"""Values of parameters as a recipe holds them."""

from __future__ import annotations

import json
from collections.abc import Mapping


def in_toml(value: object) -> str:
    """A value as TOML writes it inline. Raises TypeError if it cannot."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {in_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(in_toml, value)) + "]"
    if isinstance(value, (bool, int, float, str)):
        return json.dumps(value, allow_nan=False)
    raise TypeError(f"{value!r} cannot be written in TOML")


def plain(value: object) -> object:
    """Tuples as lists, mappings as dicts; other values as text, which differs from anything that was read."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else repr(value)
