"""Samples from arrays with the samples in front: files of numpy, mappings of arrays, tables with named columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from onnxq_plugins.data.inputs import Input, consistent, fits, quoted, to_array
from onnxq_plugins.data.labels import check_labels
from onnxq_plugins.data.options import DataOptions
from onnxq_plugins.data.samples import Data, batches, chosen, is_batch
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

# How the value of an input is cut from its array: sample n is x[n], x[n:n+1], or the whole array each time.
_Cut = Literal["item", "row", "whole"]


@dataclass(frozen=True)
class _Reading:
    """What the axes of arrays mean.

    count   number of samples
    cuts    of each input's array
    batch   rows that the model takes at once, if its inputs are assembled of so many rows
    notes   what was settled by a guess
    """

    count: int
    cuts: Mapping[str, _Cut]
    batch: int = 1
    notes: tuple[str, ...] = ()


def open_arrays(
    arrays: Mapping[str, Any], inputs: Sequence[Input], options: DataOptions, labels: Array | None, where: str
) -> Data:
    """Data from arrays by name of the input. An array has one axis more than its input, or as many where the input's first
    axis is open or 1; either way the first one counts samples. Declared shapes settle what else arrays may mean; a guess is
    said in `Data.notes`. Raises OnnxqError where counts differ, and for an input without an array."""
    if "labels" in arrays and "labels" not in {i.name for i in inputs}:
        labels = to_array(arrays["labels"], f"{where}: labels") if labels is None else labels
        arrays = {name: array for name, array in arrays.items() if name != "labels"}
    needed = [i for i in inputs if not i.optional]
    if len(arrays) == 1 and len(needed) == 1 and not any(i.name in arrays for i in inputs):
        arrays = {needed[0].name: next(iter(arrays.values()))}
    if missing := {i.name for i in needed} - set(arrays):
        raise OnnxqError(
            f"{where} has no array for the model's input {quoted(missing)}; it has "
            f"{quoted(map(str, arrays)) or 'none'}. Name the arrays after the inputs."
            + "".join(i.offer for i in needed if i.name in missing)
        )
    used = {i.name: to_array(arrays[i.name], f"{where}: '{i.name}'") for i in inputs if i.name in arrays}
    reading = _read(used, [i for i in inputs if i.name in used], where)
    if not reading.count:
        raise OnnxqError(f"{where} is empty; give at least one sample along the first axis.")
    labels = check_labels(labels, reading.count, where)
    data = _data(used, inputs, reading, np.array(chosen(reading.count, options.samples, options.state)), labels, where)
    if images := options.of_images():
        data.notes += (f"{', '.join(images)} apply to folders of images only; {where} is used unchanged",)
    return data


def _data(
    used: Mapping[str, Array], inputs: Sequence[Input], reading: _Reading, numbers: Array, labels: Array | None, where: str
) -> Data:
    """Some of the samples."""
    if reading.batch > 1:
        at = [numbers[chunk] for chunk in batches(len(numbers), reading.batch)]
        rows = np.concatenate(at)
    else:
        at, rows = [np.array([n]) for n in numbers], numbers

    def samples() -> Iterator[Mapping[str, Array]]:
        for chunk in at:
            n = chunk[0]
            yield {
                name: x if cut == "whole" else x[n] if cut == "item" else x[n : n + 1] if len(chunk) == 1 else x[chunk]
                for (name, x), cut in ((pair, reading.cuts[pair[0]]) for pair in used.items())
            }

    data = Data(inputs, samples, where, len(at), None if labels is None else labels[rows], reading.batch)
    data.notes = reading.notes
    return data


def _read(arrays: Mapping[str, Array], inputs: Sequence[Input], where: str) -> _Reading:
    """What the axes of arrays mean for some inputs."""
    stacked = [i for i in inputs if i.shape is not None and arrays[i.name].ndim == len(i.shape) + 1]
    stacked += [i for i in inputs if i.shape == () and arrays[i.name].ndim > 1]
    if stacked:
        return _stacked(arrays, inputs, {i.name for i in stacked}, where)
    cuts = {i.name: _row_or_whole(i, arrays[i.name]) for i in inputs}
    shapes = {name: x.shape for name, x in arrays.items()}
    one = all(i.shape is None or i.takes(shapes[i.name]) for i in inputs) and consistent(shapes, inputs)
    rows = {i.name: len(arrays[i.name]) for i in inputs if cuts[i.name] != "whole"}
    counts = {name: n for name, n in rows.items() if not (n == 1 and _first(inputs, name) == 1)}
    if not rows:
        whole = _Reading(1, cuts)
        if one:
            fixed = [i for i in inputs if i.fixed and i.shape and len(i.shape) > 1]
            return replace(
                whole, notes=(f"{where} was read as one sample, as it has the shape of the inputs",) * bool(fixed)
            )
        return _assembled(arrays, inputs, where) or whole
    if not counts:
        return _Reading(1, cuts)
    if one and _is_one(inputs, cuts, rows, shapes):
        note = f"{where} was read as one sample, since that alone fits the declared shapes of all inputs"
        return _Reading(1, dict.fromkeys(cuts, "whole"), notes=(note,) * (max(counts.values()) > 1))
    count = _common(counts, where)
    cuts = {name: cut if rows.get(name) == count else "whole" for name, cut in cuts.items()}
    notes = _constants(arrays, cuts, count)
    for i in inputs:
        if cuts[i.name] == "row" and count > 1 and (doubt := _doubt(i)):
            notes.append(
                f"the first axis of '{i.name}' {list(shapes[i.name])} was taken for {count} samples, although {doubt}; if "
                "it is one sample, put the samples in front: x[None]"
            )
    return _Reading(count, cuts, notes=tuple(notes))


def _stacked(arrays: Mapping[str, Array], inputs: Sequence[Input], stacked: set[str], where: str) -> _Reading:
    """The reading where some arrays have an axis more than their inputs, which counts samples: so it does everywhere."""
    count = _common({name: len(arrays[name]) for name in stacked}, where)
    cuts: dict[str, _Cut] = {}
    for i in inputs:
        x = arrays[i.name]
        if i.name in stacked or (i.shape is None and x.ndim and len(x) == count):
            cuts[i.name] = "item"
        elif _row_or_whole(i, x) == "row" and len(x) == count:
            cuts[i.name] = "row"
        elif i.takes(x.shape):
            cuts[i.name] = "whole"
        else:
            _common({**dict.fromkeys(stacked, count), i.name: len(x) if x.ndim else 0}, where)
            cuts[i.name] = "row"  # the rest of its shape is wrong, which reading a sample tells
    return _Reading(count, cuts, notes=tuple(_constants(arrays, cuts, count)))


def _assembled(arrays: Mapping[str, Array], inputs: Sequence[Input], where: str) -> _Reading | None:
    """The reading where all inputs take a fixed number of rows and the arrays have others; None if there is none."""
    batched = [
        i
        for i in inputs
        if i.fixed and i.shape and 1 < arrays[i.name].ndim == len(i.shape) and fits(arrays[i.name].shape[1:], i.shape[1:])
    ]
    sizes = {i.fixed for i in batched}
    if len(sizes) != 1 or any(i not in batched and not i.takes(arrays[i.name].shape) for i in inputs):
        return None
    size = sizes.pop() or 1
    count = _common({i.name: len(arrays[i.name]) for i in batched}, where)
    cuts: dict[str, _Cut] = {i.name: "row" if i in batched else "whole" for i in inputs}
    note = f"{count} rows of {where} were assembled to batches of {size}, which the model's inputs are fixed at"
    return _Reading(count, cuts, size, (note,))


def _row_or_whole(one: Input, array: Array) -> _Cut:
    """How to cut an array that does not have an axis more than its input; one with fewer axes cannot fit, which reading a
    sample tells."""
    if one.shape is not None and 0 < array.ndim < len(one.shape):
        return "item"
    if not array.ndim or (one.shape is not None and (not one.shape or one.fixed)):
        return "whole"
    return "row"


def _first(inputs: Sequence[Input], name: str) -> int | str | None:
    shape = next(i.shape for i in inputs if i.name == name)
    return shape[0] if shape else None


def _is_one(
    inputs: Sequence[Input], cuts: Mapping[str, _Cut], rows: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """True if arrays which fit as they are must be one sample: cut into rows, sizes that have one symbol would differ, or
    an input that cannot be cut has open axes, too, longer than 1."""
    cut = {name: (1, *shape[1:]) if cuts[name] == "row" else shape for name, shape in shapes.items()}
    if len(set(rows.values())) > 1 and len({_first(inputs, name) for name in rows} - {None}) == len(rows):
        return True  # unlike counts of unlike things
    if not consistent(cut, inputs):
        return True
    return any(
        not isinstance(size, int) and n > 1
        for i in inputs
        if cuts[i.name] == "whole" and i.shape
        for size, n in zip(i.shape, shapes[i.name], strict=True)
    )


def _doubt(one: Input) -> str:
    """Why the first axis of an input might not be a batch; "" if nothing speaks for that."""
    if not one.shape:
        return "" if one.shape is not None else "the rank of the input is unknown"
    first, *rest = one.shape
    if isinstance(first, str) and not is_batch(first):
        return f"the model calls it '{first}'"
    if any(isinstance(n, str) and is_batch(n) and not is_batch(str(first)) for n in rest):
        return "another axis has the name of a batch"
    return ""


def _constants(arrays: Mapping[str, Array], cuts: Mapping[str, _Cut], count: int) -> list[str]:
    """A note about arrays that are the same in each sample."""
    names = [name for name, cut in cuts.items() if cut == "whole"] if count > 1 else []
    return [f"each of the {count} samples has the same {quoted(names)}, whose array has no axis of samples"] if names else []


def _common(counts: Mapping[str, int], where: str) -> int:
    if len(set(counts.values())) > 1:
        raise OnnxqError(
            f"{where}: the arrays differ in their number of samples (first axis): {dict(counts)}; if it is one sample, give "
            "a list of feeds: [{...}]."
        )
    return next(iter(counts.values()))


# ---- tables ---------------------------------------------------------------------------------------------------------------


def columns(table: Any, inputs: Sequence[Input]) -> dict[str, Array]:
    """Arrays of a table such as a DataFrame of pandas, by input: a column for each, [n, 1] where the input has two axes; a
    single input that no column is named after has all of them, [n, columns]. Numbers become those of the input.

    Raises OnnxqError for a column that is not in the table.
    """
    names = [str(name) for name in table.columns]
    labels = {"labels": np.asarray(table["labels"])} if "labels" in names else {}
    if len(inputs) == 1 and inputs[0].name not in names:
        values = np.stack([np.asarray(table[name]) for name in table.columns if str(name) != "labels"], axis=1)
        return {inputs[0].name: _numbers(values, inputs[0]), **labels}
    if missing := {i.name for i in inputs if not i.optional} - set(names):
        raise OnnxqError(
            f"the table has no column {quoted(missing)}; it has {quoted(names)}. Name the columns after the model's inputs."
        )
    arrays = {}
    for i in inputs:
        if i.name in names:
            x = np.asarray(table[i.name])
            x = np.array(x.tolist()) if x.dtype.kind == "O" and x.size and np.ndim(x[0]) else x  # a vector in each cell
            x = x[:, None] if x.ndim == 1 and i.shape is not None and len(i.shape) == 2 else x
            arrays[i.name] = _numbers(x, i)
    return {**arrays, **labels}


def _numbers(values: Array, target: Input) -> Array:
    """Numbers of a table in the type of an input: tables do not tell 1.0 from 1."""
    return values.astype(target.dtype) if values.dtype.kind in "iufb" and target.dtype.kind == "f" else values
