"""Data: the samples for a model, as checked feeds."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from onnxq_plugins.data.inputs import Input, fit, quoted
from onnxq_plugins.data.labels import check_labels
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

_FEW = 8  # fewer samples than this are worth a warning


class Data:
    """Samples for a model. Iterate as often as you like; each item is one checked feed (batch 1, or the model's own batch
    size if that is fixed).

    inputs    the model's inputs
    samples   a function that starts a new iteration over feeds
    where     the source, for messages
    size      number of samples; None if unknown
    labels    one label per sample, along the first axis, or None

    Iterating raises OnnxqError when a sample has NaN or Inf, a wrong name, shape or dtype, and when there is none.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        samples: Callable[[], Iterator[Mapping[str, Array]]],
        where: str = "the data",
        size: int | None = None,
        labels: Array | None = None,
    ) -> None:
        self.inputs, self._samples, self.where, self.size, self.labels = list(inputs), samples, where, size, labels
        self.notes: tuple[str, ...] = ()  # about how the source was read, for the user
        self._digest = ""

    def __iter__(self) -> Iterator[dict[str, Array]]:
        size = self._fixed
        singles = (self._checked(feed, number) for number, feed in enumerate(self._samples()))
        empty = True
        for feed in singles if size is None else self._batches(singles, size):
            empty = False
            yield feed
        if empty:
            raise OnnxqError(f"{self.where} has no sample; give at least one.")

    def remarks(self) -> list[str]:
        """`notes`, and warnings that follow from the first eight samples. Raises OnnxqError as iterating does."""
        first = [self._checked(feed, n) for n, feed in enumerate(itertools.islice(self._samples(), _FEW))]
        remarks = list(self.notes)
        if 0 < len(first) < _FEW:
            remarks.append(
                f"{self.where} has only {len(first)} sample{'s' * (len(first) > 1)}, on which all ranges and codes will "
                "depend; give 32 or more"
            )
        alike = len(first) > 1 and all(np.array_equal(first[0][name], x) for feed in first for name, x in feed.items())
        flat = all((x == x.flat[0]).all() for feed in first for x in feed.values() if x.size)
        large = any(x.size > 1 for feed in first for x in feed.values())
        if alike or (flat and large):
            remarks.append(
                f"the first samples of {self.where} are "
                + ("all equal" if alike else "constant")
                + "; calibrate on inputs as the model will see them"
            )
        return remarks

    def spread(self, count: int) -> list[dict[str, Array]]:
        """`count` feeds, spread evenly, or all if there are fewer; no more are in memory."""
        numbers = set(spread(self._feeds(), count))
        return [feed for n, feed in enumerate(self) if n in numbers]

    def spread_labels(self, count: int) -> list[Array] | None:
        """The labels of the feeds that `spread` returns, one array [batch, ...] each; None if there are no labels. Raises
        OnnxqError if there are more or fewer labels than samples."""
        if self.labels is None:
            return None
        size, samples = self._fixed or 1, self._count()
        check_labels(self.labels, samples, self.where)
        at = [np.arange(first, min(first + size, samples)) for first in range(0, samples, size)]
        return [self.labels[np.resize(at[n], size)] for n in spread(self._feeds(), count)]

    @property
    def _fixed(self) -> int | None:
        """The model's fixed batch size, if that is not 1."""
        return next((i.batch for i in self.inputs if i.batch not in (None, 1)), None)

    def _count(self) -> int:
        """Number of samples."""
        return self.size or sum(1 for _ in self._samples())

    def _feeds(self) -> int:
        """Number of feeds."""
        return -(-self._count() // (self._fixed or 1))

    def _batches(self, singles: Iterator[dict[str, Array]], size: int) -> Iterator[dict[str, Array]]:
        """Batches of `size` samples; the last one is completed with its own first samples."""
        while chunk := list(itertools.islice(singles, size)):
            full = [chunk[i % len(chunk)] for i in range(size)]
            yield {
                i.name: np.concatenate([f[i.name] for f in full]) if i.batch == size else full[0][i.name]
                for i in self.inputs
            }

    def digest(self) -> str:
        """A fingerprint of all samples; reads them once."""
        if not self._digest:
            digest = hashlib.blake2b(digest_size=16)
            for feed in self:
                for name in sorted(feed):
                    digest.update(f"{name}{feed[name].shape}{feed[name].dtype}".encode())
                    digest.update(np.ascontiguousarray(feed[name]).tobytes())
            self._digest = digest.hexdigest()
        return self._digest

    def _checked(self, feed: Mapping[str, Array], number: int) -> dict[str, Array]:
        names = {i.name for i in self.inputs}
        if not isinstance(feed, Mapping):
            raise OnnxqError(
                f"{self.where}, sample {number}: expected a mapping from input name to array, got {type(feed).__name__}."
            )
        if missing := names - set(feed):
            unknown = sorted(set(feed) - names)
            raise OnnxqError(
                f"{self.where}, sample {number}: no array for the model's input {quoted(missing)}"
                + (f" (it has {quoted(unknown)})" if unknown else "")
                + "; name the arrays after the inputs."
            )
        return {i.name: fit(np.asarray(feed[i.name]), i, f"{self.where}, sample {number}") for i in self.inputs}


def spread(total: int, count: int) -> list[int]:
    """`count` numbers spread evenly over range(total), since files are often sorted by class; all for 0."""
    if count <= 0 or count >= total:
        return list(range(total))
    return [n * total // count for n in range(count)]
