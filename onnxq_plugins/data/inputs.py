"""The inputs of a model, and how an array becomes the value of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

Shape = tuple[int | str | None, ...]


@dataclass(frozen=True)
class Input:
    """One input of a model.

    dtype      of its values; object for strings, and for sequences and maps, which are passed on unread
    shape      size of each axis, a symbol or None where it is open; None if the rank is unknown
    optional   True if the model has a default, so that a feed may leave it out
    follows    the output that seems to be its next value, where a model is one step of a stream; "" for none
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape | None
    optional: bool = False
    follows: str = ""

    @property
    def fixed(self) -> int | None:
        """Size of the first axis where that is fixed at more than 1: it may or may not be a batch."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, int) and first > 1 else None

    @property
    def offer(self) -> str:
        """How its values can come from the step before, a sentence; "" if no output seems to be its next value."""
        return (
            f" Output '{self.follows}' seems to be the next '{self.name}': give --state {self.follows}={self.name}."
            * bool(self.follows)
        )

    def takes(self, shape: Sequence[int]) -> bool:
        """True if onnxruntime takes an array of this shape: it does not check scalars."""
        return not self.shape or fits(shape, self.shape)


def fits(shape: Sequence[int], declared: Shape) -> bool:
    """True if a shape has the rank and the fixed sizes of a declared one."""
    return len(shape) == len(declared) and all(
        not isinstance(n, int) or n == m for n, m in zip(declared, shape, strict=True)
    )


def to_array(value: Any, where: str) -> Array:
    """A value as an array: numbers, lists, and whatever has ``__array__``, such as a tensor of PyTorch. Raises OnnxqError if
    it cannot be one."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a tensor that requires gradients, or is on another device
        value = value.detach().cpu()
        value = value.float() if str(getattr(value, "dtype", "")) == "torch.bfloat16" else value  # which numpy lacks
    try:
        return np.asarray(value)
    except Exception as error:  # lists of unlike lengths; tensors of types that numpy lacks
        raise OnnxqError(
            f"{where}: a {type(value).__name__} cannot become an array ({' '.join(str(error).split())[:120].rstrip('.')}); "
            "give one numpy array per input."
        ) from error


def fit(value: Any, target: Input, where: str) -> Array:
    """A value as an array of the input's dtype. Raises OnnxqError for another kind of number or another shape than
    onnxruntime takes, and for NaN and Inf."""
    if target.dtype.kind == "O" and target.shape is None and isinstance(value, (list, dict)):
        return value  # type: ignore[return-value]  # a sequence or a map
    array = to_array(value, f"{where}: input '{target.name}'")
    if array.dtype != target.dtype:
        array = _cast(array, target, where)
    if not target.takes(array.shape):
        declared: Shape = target.shape or ()
        expected = "[" + ", ".join("any" if n is None else str(n) for n in declared) + "]"
        hint = (
            "; see --size, --resize, --crop and --layout" if where.startswith("folder") else _misfit(array.shape, declared)
        )
        raise OnnxqError(f"{where}: input '{target.name}' wants shape {expected}, the data has {list(array.shape)}{hint}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        kind = "NaN" if np.isnan(array).any() else "Inf"
        raise OnnxqError(f"{where}: input '{target.name}' has {kind}; remove or fix that sample.")
    return array


def _cast(array: Array, target: Input, where: str) -> Array:
    kind, own = target.dtype.kind, array.dtype.kind
    if kind == "O" and own in "USTO":
        return array.astype(str).astype(object) if own in "ST" else array.astype(object)
    if own == "O" and kind != "O" and array.size:  # numbers in a column of objects
        array = np.array(array.tolist())
        own = array.dtype.kind
    if own not in {"i": "iu", "u": "iu"}.get(kind, kind):  # integers for a float input are mostly raw pixels
        hints = {"f": "convert and normalize it as the model was trained", "O": "convert it with x.astype(str)"}
        hint = hints.get(kind, f"convert it with x.astype('{target.dtype}')")
        wanted = "strings" if kind == "O" else str(target.dtype)
        raise OnnxqError(f"{where}: input '{target.name}' wants {wanted}, the data is {array.dtype}; {hint}.")
    cast: Array = array.astype(target.dtype)
    if kind in "iu" and (cast != array).any():
        raise OnnxqError(f"{where}: input '{target.name}' wants {target.dtype}, which some values are too large for.")
    return cast


def _misfit(shape: tuple[int, ...], target: Shape) -> str:
    """A hint how an array of a shape could be made to fit; "" if there is none."""
    if len(shape) == len(target) == 4 and target[1] == shape[3] != shape[1]:
        return "; transpose to NCHW: x.transpose(0, 3, 1, 2)"
    if len(shape) == len(target) == 4 and target[3] == shape[1] != shape[3]:
        return "; transpose to NHWC: x.transpose(0, 2, 3, 1)"
    # where the first axis of an array counts samples, a single sample without a batch axis was taken apart
    missing = len(target) - len(shape)
    if missing in (1, 2) and shape and fits(shape, target[missing:]):
        return "; add a batch axis: x[None]"
    return ""


def consistent(shapes: Mapping[str, Sequence[int]], inputs: Iterable[Input]) -> bool:
    """True if each symbol in the shapes of the inputs stands for one size."""
    sizes: dict[str, int] = {}
    for one in inputs:
        if one.name in shapes and one.shape and len(one.shape) == len(shapes[one.name]):
            for symbol, size in zip(one.shape, shapes[one.name], strict=True):
                if isinstance(symbol, str) and sizes.setdefault(symbol, size) != size:
                    return False
    return True


def quoted(names: Iterable[str]) -> str:
    """Names sorted and quoted, for a message."""
    return ", ".join(f"'{n}'" for n in sorted(names))
