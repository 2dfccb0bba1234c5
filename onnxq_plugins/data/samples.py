"""Data: a re-iterable of checked one-sample feeds."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from onnxq_plugins.data.inputs import Input, fit, names
from onnxq_plugins.data.labels import one_label_each
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

_FEW = 8  # samples below which their number is remarked


class Data:
    """Samples for a model: iterate as often as you like, each item one checked feed (batch 1, or the model's own
    batch size where that is fixed).

    labels   what is known of each sample, along the first axis, or None

    Raises OnnxqError while iterating when a sample has NaN or Inf, a wrong name, shape or dtype, or there is none.
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
        self.notes: tuple[str, ...] = ()  # what the user may want to know about how the source was read
        self._digest = ""

    def __iter__(self) -> Iterator[dict[str, Array]]:
        fixed = self._fixed
        one = (self._checked(feed, number) for number, feed in enumerate(self._samples()))
        empty = True
        for feed in one if fixed is None else self._batches(one, fixed):
            empty = False
            yield feed
        if empty:
            raise OnnxqError(f"{self.where} holds no sample; give at least one.")

    def remarks(self) -> list[str]:
        """What the user may want to know about the samples, seen from the first eight. Raises OnnxqError as iterating
        does."""
        first = [self._checked(feed, n) for n, feed in enumerate(itertools.islice(self._samples(), _FEW))]
        found = list(self.notes)
        if 0 < len(first) < _FEW:
            found.append(
                f"{self.where} holds {len(first)} sample{'s' * (len(first) > 1)} only, which all ranges and codes "
                "will rest on; give 32 or more"
            )
        alike = len(first) > 1 and all(np.array_equal(first[0][name], x) for feed in first for name, x in feed.items())
        flat = all((x == x.flat[0]).all() for feed in first for x in feed.values() if x.size)
        large = any(x.size > 1 for feed in first for x in feed.values())
        if alike or (flat and large):
            found.append(
                f"the first samples of {self.where} are "
                + ("all equal" if alike else "one value everywhere")
                + "; calibrate on inputs as the model will see them"
            )
        return found

    def spread(self, count: int) -> list[dict[str, Array]]:
        """So many feeds spread evenly, or all where there are fewer; no more are held."""
        chosen = set(spread(self._feeds(), count))
        return [feed for n, feed in enumerate(self) if n in chosen]

    def spread_labels(self, count: int) -> list[Array] | None:
        """The labels of the feeds that `spread` gives, one array [batch, ...] each; None if there are none. Raises
        OnnxqError if there are more or fewer labels than samples."""
        if self.labels is None:
            return None
        size = self._fixed or 1
        samples = self.size or sum(1 for _ in self._samples())
        one_label_each(self.labels, samples, self.where)
        at = [np.arange(first, min(first + size, samples)) for first in range(0, samples, size)]
        return [self.labels[np.resize(at[n], size)] for n in spread(self._feeds(), count)]

    @property
    def _fixed(self) -> int | None:
        """The batch size that the model insists on, if that is not 1."""
        return next((i.batch for i in self.inputs if i.batch not in (None, 1)), None)

    def _feeds(self) -> int:
        """How many feeds there are."""
        samples = self.size or sum(1 for _ in self._samples())
        return -(-samples // (self._fixed or 1))

    def _batches(self, one: Iterator[dict[str, Array]], size: int) -> Iterator[dict[str, Array]]:
        """Groups of `size` samples; the last group is filled up with its own first samples."""
        while chunk := list(itertools.islice(one, size)):
            full = [chunk[i % len(chunk)] for i in range(size)]
            yield {
                i.name: np.concatenate([f[i.name] for f in full]) if i.batch == size else full[0][i.name]
                for i in self.inputs
            }

    def digest(self) -> str:
        """A fingerprint of all samples; reads them once."""
        if not self._digest:
            seen = hashlib.blake2b(digest_size=16)
            for feed in self:
                for name in sorted(feed):
                    seen.update(f"{name}{feed[name].shape}{feed[name].dtype}".encode())
                    seen.update(np.ascontiguousarray(feed[name]).tobytes())
            self._digest = seen.hexdigest()
        return self._digest

    def _checked(self, feed: Mapping[str, Array], number: int) -> dict[str, Array]:
        wanted = {i.name for i in self.inputs}
        if not isinstance(feed, Mapping):
            raise OnnxqError(
                f"{self.where}, sample {number}: expected a mapping from input name to array, got {type(feed).__name__}."
            )
        if missing := wanted - set(feed):
            unknown = sorted(set(feed) - wanted)
            raise OnnxqError(
                f"{self.where}, sample {number}: no array for the model's input {names(missing)}"
                + (f" (it has {names(unknown)})" if unknown else "")
                + "; name the arrays after the inputs."
            )
        return {i.name: fit(np.asarray(feed[i.name]), i, f"{self.where}, sample {number}") for i in self.inputs}


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` numbers spread evenly over range(total): files are often sorted by class."""
    if wanted <= 0 or wanted >= total:
        return list(range(total))
    return [n * total // wanted for n in range(wanted)]
