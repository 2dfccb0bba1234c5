"""What users read: the one exception and the one warning they meet, and the reasons why something stays float."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, ParamSpec, Self, TypeVar

Kind = Literal[
    "recipe",  # the recipe says so
    "search",  # a search chose it
    "slower",  # integer kernels and conversions would take longer
    "quality",  # in 8 bits it would cost the outputs too much
    "outliers",  # it reads a few channels that would widen a grid
    "pass",  # a pass keeps it so (`Job.keep_float`)
    "unsupported",  # no quantized kernel for this operator
    "weight-only",  # no kernel for a quantized weight beside float activations
    "not-finite",  # values that are NaN or infinite in the float model
    "constant",  # of an operator that is no layer
    "product",  # of two activations, at a size where integer kernels do not pay
    "float-input",  # only the input is float
    "unquantized",  # neither input nor weight is quantized
    "float-weight",
    "float-output",
    "wide-codes",  # codes of 16 bits
    "decoded",  # the weight is decoded to float at load
    "float-inputs",  # so it is, since the kernel for its codes would round its inputs
    "blocked",  # scales per block
    "undecoded",  # 4-bit codes where the kernel wants 8-bit ones
    "shifted",  # channels are shifted by a Mul behind the layer
    "runtime",  # the runtime says no more
]


class Reason(str):
    """Why something stays float: a text for people, whose ``kind`` code decides by."""

    kind: Kind

    def __new__(cls, kind: Kind, text: str) -> Self:
        reason = super().__new__(cls, text)
        reason.kind = kind
        return reason

    def __getnewargs__(self) -> tuple[str, str]:  # type: ignore[override]
        return self.kind, str(self)


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
        sentences = tuple(problems)
        if sentences:
            raise cls(*sentences)


class OnnxqWarning(UserWarning):
    """What is bad about a result, as Python's own warning: an output that is destroyed, or a model that is slower or larger
    than the float one. All else that the user should know is a note of the report."""


# What an argument may be: its types, and how a sentence names them.
Expected = tuple[tuple[type, ...], str]
PATH: Expected = ((str, os.PathLike), "a path")
TEXT: Expected = ((str,), "text")
WHOLE: Expected = ((numbers.Integral,), "a whole number")
NUMBER: Expected = ((numbers.Real,), "a number")
SEVERAL: Expected = ((Iterable,), "a list")
TABLE: Expected = ((Mapping,), "a mapping")
JUDGE: Expected = ((str, Callable), "a name or a function")  # type: ignore[assignment]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def expects(**arguments: Expected) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Have a function raise OnnxqError, a sentence each, for arguments of other types. None is left to it. Several may
    follow each other: they become one."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        if hasattr(function, "expected"):
            function.expected.update(arguments)
            return function
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            given: dict[str, Any] = signature.bind(*args, **kwargs).arguments
            OnnxqError.check(
                f"{name} = {value!r:.80} must be {arguments[name][1]}."
                for name, value in given.items()
                if name in arguments and value is not None and not isinstance(value, arguments[name][0])
            )
            return function(*args, **kwargs)

        checked.expected = arguments  # type: ignore[attr-defined]
        return checked

    return decorate


def known(given: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that there is not: what there is, and which of it may have been meant."""
    there = list(names)
    near = difflib.get_close_matches(given, there, 1)
    return f"known: {', '.join(there) or 'none'}" + (f" (did you mean '{near[0]}'?)" if near else "")


def counted(number: int, noun: str) -> str:
    """Things in words: "1 layer", "2 layers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def raised(error: BaseException, home: Path | None = None) -> str:
    """What a plugin's code raised, in a few words: the type, the innermost line in `home`, or of a module that is being
    imported, or of all; the innermost of all where that is another; and what it says."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if home is not None and Path(f.filename).is_relative_to(home)]
    at = (mine or [f for f in frames if f.name == "<module>"] or frames)[-1:]
    where = f" in {_line(at[0])}" if at else ""
    where += f" (raised in {_line(frames[-1])})" if mine and mine[-1] is not frames[-1] else ""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}{where}" + (f": {text}" if text else "")


def _line(frame: traceback.FrameSummary) -> str:
    return f"{'/'.join(Path(frame.filename).parts[-2:])}, line {frame.lineno}"
