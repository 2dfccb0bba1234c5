"""The one exception users meet."""

from __future__ import annotations

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
