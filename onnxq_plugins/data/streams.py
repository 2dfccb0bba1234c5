"""States of streams: inputs that are an output of the step before, guessed from names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from onnxq_plugins.data.inputs import Input, quoted
from onnxq_plugins.errors import OnnxqError

# What a name says about when a value is read or written, not about what it is.
_ROLES = re.compile(
    r"in|out|inputs?|outputs?|new|next|prev|previous|old|cur|current|past|present|updated|init|initial|last|final"
)
_STATES = re.compile(r"(^|[^a-z])(h|c|h0|c0|hx|cx)($|[^a-z])|state|cache|hidden|past|mem|buffer|context|rnn|lstm|gru", re.I)
_CACHES = re.compile(r"(past|present)(_key_values?)?", re.I)  # of decoders, named in several ways


def with_guesses(inputs: Sequence[Input], outputs: Sequence[Input]) -> list[Input]:
    """Inputs with the outputs that seem to be their next values: those whose names differ only in what tells read from
    written (`h_in` and `h_out`, `state` and `stateN`, `past_key_values.0.key` and `present.0.key`), else the only output of
    the same fixed shape. The first input is what a model is for, unless its name is that of a state."""
    pairs: dict[str, str] = {}
    for i in inputs:
        named = [o.name for o in outputs if _keys(i.name) & _keys(o.name) and _alike(i, o)]
        if len(named) == 1 and (i is not inputs[0] or _STATES.search(i.name)):
            pairs[i.name] = named[0]
    left = [i for i in inputs if i.name not in pairs]
    for i in left[1:] if left[:1] == list(inputs[:1]) else left:
        same = [o.name for o in outputs if _same(i, o)]
        if len(same) == 1 and sum(_same(other, i) for other in left) == 1:
            pairs[i.name] = same[0]
    if len(pairs) == len(inputs):  # nothing would be left to say
        pairs.pop(inputs[0].name, None)
    unclear = {o for o in pairs.values() if list(pairs.values()).count(o) > 1}
    return [i if (o := pairs.get(i.name, "")) in unclear else replace(i, follows=o) for i in inputs]


def _keys(name: str) -> set[tuple[str, ...]]:
    """What a value is, by its name, in one or two readings."""
    words = [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", _CACHES.sub("", name))]
    key = tuple(w for w in words if not _ROLES.fullmatch(w))
    keys = {key}
    if len(key) == 2 and (key[1] == "n" or (key[1] == "0" and len(key[0]) < 3)):  # state and stateN, h_0 and h_n
        keys.add(key[:1])
    if len(key) == 1 and re.fullmatch(r"[hc]n", key[0]):
        keys.add((key[0][0],))
    return keys - {()}


def _alike(one: Input, other: Input) -> bool:
    """True if two tensors may have the same type and shape."""
    if one.dtype != other.dtype or one.shape is None or other.shape is None:
        return one.dtype == other.dtype
    return len(one.shape) == len(other.shape) and not any(
        isinstance(n, int) and isinstance(m, int) and n != m for n, m in zip(one.shape, other.shape, strict=True)
    )


def _same(one: Input, other: Input) -> bool:
    """True if two tensors have the same fixed shape of two axes or more."""
    fixed = one.shape is not None and len(one.shape) > 1 and all(isinstance(n, int) for n in one.shape)
    return fixed and one.dtype == other.dtype and one.shape == other.shape


def with_states(inputs: Sequence[Input], state: Mapping[str, str]) -> list[Input]:
    """Inputs of which feeds may leave out those that are states. Raises OnnxqError for a name that is no input.

    state   output -> input
    """
    names = {i.name for i in inputs}
    if missing := set(state.values()) - names:
        raise OnnxqError(
            f"state: the model has no input {quoted(missing)}; its inputs are {quoted(names)}. Write OUTPUT=INPUT, such as "
            "--state stateN=state."
        )
    if len(set(state.values())) < len(state) or not names - set(state.values()):
        raise OnnxqError("state: each input follows one output, and an input is left for what is new in each step.")
    return [replace(i, optional=i.optional or i.name in state.values()) for i in inputs]
