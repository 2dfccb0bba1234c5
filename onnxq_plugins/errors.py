"""The one exception users meet."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OnnxqError(Exception):
    """What is wrong, where, and what to do: one sentence, or one a line when several things are wrong.

    Every complaint about input (model, data, recipe, plan, plugin) is raised as this type, so that callers can tell
    it from a bug. ``problems`` holds the sentences one by one.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(" ".join(problem.splitlines()) for problem in problems)  # a name may hold a line break
        super().__init__("\n".join(self.problems))

    @classmethod
    def check(cls, problems: Iterable[str]) -> None:
        """Raise with all `problems` at once, if there are any."""
        found = tuple(problems)
        if found:
            raise cls(*found)


def known(given: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that there is not: what there is, and which of it may have been meant."""
    there = list(names)
    near = difflib.get_close_matches(given, there, 1)
    return f"known: {', '.join(there) or 'none'}" + (f" (did you mean '{near[0]}'?)" if near else "")
