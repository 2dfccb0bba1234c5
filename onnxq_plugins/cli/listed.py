"""The index of plugins of others: a plain file that comes with the package, so that no network is asked."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Listed:
    """One entry of docs/plugins.toml.

    kind     ``pass`` or ``target``
    package  the distribution that brings it
    about    what it does, in a sentence
    paper    where it is published; "" if nowhere
    install  what pip takes, if not the name of the package
    """

    name: str
    kind: str
    package: str
    about: str
    paper: str = ""
    install: str = ""

    def matches(self, words: str) -> bool:
        """True if each word is part of some of its texts."""
        texts = " ".join((self.name, self.kind, self.package, self.about, self.paper)).lower()
        return all(word in texts for word in words.lower().split())


def index_file() -> Path:
    """The index: in the installed package, or among the documentation of a checkout."""
    inside = Path(__file__).parents[1] / "plugins.toml"
    return inside if inside.is_file() else Path(__file__).parents[2] / "docs" / "plugins.toml"


def listed(words: str = "") -> Iterator[Listed]:
    """The entries that match, in their order; all for ""."""
    for table in tomllib.loads(index_file().read_text("utf-8"))["plugin"]:
        entry = Listed(**table)
        if entry.matches(words):
            yield entry
