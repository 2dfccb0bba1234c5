"""Data: the samples for a model, as checked feeds."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from onnxq_plugins.data.inputs import Input, fit, quoted
from onnxq_plugins.data.labels import check_labels
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

Item = TypeVar("Item")
_FEW = 8  # fewer samples than this are worth a warning
_APART = 8  # samples from which on some are kept apart to judge by


class Data:
    """Samples for a model. Iterate as often as you like; each item is one checked feed, as onnxruntime's `run` takes it.

    inputs    the model's inputs
    samples   a function that starts a new iteration over feeds
    where     the source, for messages
    size      number of feeds; None if unknown
    labels    along the first axis, in the order of the feeds, one per feed or one per row of each feed; or None
    batch     samples in each feed, where the source assembled them

    Where `state` is set (output -> input), feeds are steps of streams, and may lack states unless `complete`.

    Iterating raises OnnxqError when a sample has NaN or Inf, a wrong name, shape or dtype, and when there is none.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        samples: Callable[[], Iterator[Mapping[str, Array]]],
        where: str = "the data",
        size: int | None = None,
        labels: Array | None = None,
        batch: int = 1,
    ) -> None:
        self.inputs, self._samples, self.where, self.size, self.labels = list(inputs), samples, where, size, labels
        self.batch = batch
        self.notes: tuple[str, ...] = ()  # about how the source was read, for the user
        self.implied = False  # True if nobody gave the labels: they came with the inputs
        self.state: Mapping[str, str] = {}
        self.complete = False  # states are in the feeds, see `runtimes.rolled`
        self.bounded = False  # True if no value can be far beyond the others: pictures
        self.known: dict[tuple[str, str], Any] = {}  # statistics of them that runs have in common, see `Calibration`
        self._digest = ""

    def __iter__(self) -> Iterator[dict[str, Array]]:
        empty = True
        for number, feed in enumerate(self._samples()):
            empty = False
            yield self._checked(feed, number)
        if empty:
            raise OnnxqError(f"{self.where} has no sample; give at least one.")

    def remarks(self) -> list[str]:
        """`notes`, and warnings that follow from the first eight feeds. Raises OnnxqError as iterating does."""
        first = list(itertools.islice(self, _FEW))
        remarks = list(self.notes)
        count = sum(max(self.batch, self._counted(feed)) for feed in first)
        if count < _FEW:
            remarks.append(
                f"{self.where} has only {count} sample{'s' * (count > 1)}, on which all ranges and codes will "
                "depend; give 32 or more"
            )
        arrays = [x for feed in first for x in feed.values() if isinstance(x, np.ndarray) and x.size]
        alike = len(first) > 1 and all(
            feed.keys() == first[0].keys() and all(np.array_equal(first[0][name], x) for name, x in feed.items())
            for feed in first
        )
        for i in self.inputs:
            values = [feed[i.name] for feed in first if i.name in feed]
            if i.follows and not self.state and len(values) > 1 and not any(np.any(x) for x in values):
                remarks.append(
                    f"input '{i.name}' is 0 in all first samples, and output '{i.follows}' seems to be its next value: "
                    f"--state {i.follows}={i.name} calibrates on the model's own states"
                )
        flat = all((x == x.flat[0]).all() for x in arrays)
        large = any(x.size > 1 for x in arrays)
        if alike or (flat and large):
            remarks.append(
                f"the first samples of {self.where} are "
                + ("all equal" if alike else "constant")
                + "; calibrate on inputs as the model will see them"
            )
        return remarks

    def spread(self, count: int, apart: bool = False) -> list[dict[str, Array]]:
        """`count` feeds, spread evenly (with states: the first ones), or all if there are fewer; no more are in memory.

        apart   of those that are held out from solutions (see `held_out`)
        """
        numbers = self.numbers(apart)
        kept = {numbers[i] for i in chosen(len(numbers), count, self.state)}
        return [feed for n, feed in enumerate(self) if n in kept]

    def spread_labels(self, count: int) -> list[Array] | None:
        """The labels of the feeds that `spread` returns, one array [rows, ...] each; None if there are no labels. Raises
        OnnxqError if there are more or fewer labels than samples."""
        if self.labels is None:
            return None
        feeds = self._feeds()
        rows = [1] * feeds
        if self.labels.ndim and len(self.labels) != feeds:
            rows = [self.rows(feed) for feed in self]
            if len(self.labels) != sum(rows):
                check_labels(self.labels, max(feeds, sum(rows)), self.where)
        ends = np.cumsum(rows)
        check_labels(self.labels, int(ends[-1]), self.where)
        return [self.labels[ends[n] - rows[n] : ends[n]] for n in chosen(feeds, count, self.state)]

    def apart(self, items: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
        """Two halves of what there is one of per feed: every second one and the others; with states, which follow from the
        step before, the first ones and the rest."""
        half = (len(items) + 1) // 2
        return (items[:half], items[half:]) if self.state else (items[::2], items[1::2])

    def halves(self) -> tuple[Data, Data]:
        """Two of them, `apart`, in memory."""
        feeds, labels = self.apart(self.spread(0)), self.apart(self.spread_labels(0) or [])

        def half(n: int) -> Data:
            one = Data(
                self.inputs,
                lambda: iter(feeds[n]),
                self.where,
                len(feeds[n]),
                np.concatenate(labels[n]) if labels[n] else None,
                self.batch,
            )
            one.notes, one.implied, one.state, one.complete = self.notes, self.implied, self.state, self.complete
            return one

        return half(0), half(1)

    def without(self, numbers: Collection[int]) -> Data:
        """The same samples without some, by number."""
        kept = [n for n in range(self._feeds()) if n not in numbers]
        labels = self.labels
        if labels is not None:
            every = self.spread_labels(0) or []
            labels = np.concatenate([every[n] for n in kept]) if every else None

        def samples() -> Iterator[Mapping[str, Array]]:
            return (feed for n, feed in enumerate(self._samples()) if n not in numbers)

        rest = Data(self.inputs, samples, self.where, len(kept), labels, self.batch)
        rest.notes, rest.implied, rest.state, rest.complete = self.notes, self.implied, self.state, self.complete
        return rest

    def numbers(self, apart: bool = False) -> list[int]:
        """The numbers of all samples, or of those that are held out from solutions (see `held_out`)."""
        return held_out(self._feeds(), self.state) if apart else list(range(self._feeds()))

    def rows(self, feed: Mapping[str, Array]) -> int:
        """Size of a feed's first axis, of the input where it is most likely the batch: the first one where it is open."""
        sizes = [(i, len(feed[i.name])) for i in self.inputs if i.name in feed and np.ndim(feed[i.name])]
        return next((n for i, n in sizes if i.shape and not isinstance(i.shape[0], int)), sizes[0][1] if sizes else 1)

    def _counted(self, feed: Mapping[str, Array]) -> int:
        """Samples in a feed: its rows, where the first axis goes by the name of a batch."""
        batched = any(i.shape and not isinstance(i.shape[0], int) and is_batch(i.shape[0]) for i in self.inputs)
        return self.rows(feed) if batched else 1

    def _feeds(self) -> int:
        """Number of feeds."""
        return self.size if self.size is not None else sum(1 for _ in self._samples())

    def digest(self) -> str:
        """A fingerprint of all samples; reads them once."""
        if not self._digest:
            digest = hashlib.blake2b(digest_size=16)
            for feed in self:
                for name in sorted(feed):
                    x = feed[name]
                    if not isinstance(x, np.ndarray) or x.dtype.kind == "O":  # strings, sequences
                        digest.update(f"{name}{np.shape(x)}{x.tolist() if isinstance(x, np.ndarray) else x!r}".encode())
                        continue
                    digest.update(f"{name}{x.shape}{x.dtype}".encode())
                    digest.update(np.ascontiguousarray(x).tobytes())
            self._digest = digest.hexdigest()
        return self._digest

    def _checked(self, feed: Mapping[str, Array], number: int) -> dict[str, Array]:
        if not isinstance(feed, Mapping):
            raise OnnxqError(
                f"{self.where}, sample {number}: expected a mapping from input name to array, got {type(feed).__name__}."
            )
        names = {i.name for i in self.inputs}
        if missing := {i.name for i in self.inputs if not i.optional} - set(feed):
            unknown = sorted(str(name) for name in set(feed) - names)
            raise OnnxqError(
                f"{self.where}, sample {number}: no array for the model's input {quoted(missing)}"
                + (f" (it has {quoted(unknown)})" if unknown else "")
                + "; name the arrays after the inputs."
                + "".join(i.offer for i in self.inputs if i.name in missing)
            )
        where = f"{self.where}, sample {number}"
        return {i.name: fit(feed[i.name], i, where) for i in self.inputs if i.name in feed}


def is_batch(symbol: str | None) -> bool:
    """True if the symbol of an axis names a batch, or nothing at all."""
    return symbol is None or re.fullmatch(_BATCH, symbol.lower()) is not None


_BATCH = r"n|b|bs|none|\?|.*batch.*|.*sample.*|unk.*|.*dynamic.*|[sd]?\d+"  # as people write it, and exporters


def spread(total: int, count: int) -> list[int]:
    """`count` numbers spread evenly over range(total), since files are often sorted by class; all for 0."""
    if count <= 0 or count >= total:
        return list(range(total))
    return [n * total // count for n in range(count)]


def chosen(total: int, count: int, state: Mapping[str, str]) -> list[int]:
    """`count` numbers of range(total): spread evenly, or the first ones where samples are steps of a stream."""
    return list(range(total))[: count or None] if state else spread(total, count)


def held_out(total: int, state: Mapping[str, str]) -> list[int]:
    """The numbers of the samples that solutions leave out, so that they can be judged on them: every fourth one, or the last
    quarter where samples are steps of a stream; all of fewer than `_APART`, of which none can be spared."""
    if total < _APART:
        return list(range(total))
    return list(range(total - total // 4, total)) if state else list(range(3, total, 4))


def batches(total: int, size: int) -> list[Array]:
    """The numbers 0..total-1 in batches of one size; the last one is completed with its own first numbers."""
    return [np.resize(np.arange(first, min(first + size, total)), size) for first in range(0, total, size)]
