"""Independent calls side by side, in threads or wherever `joblib.parallel_config` runs them, such as a Dask cluster; and how
long loops show their progress."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Track = Callable[[Iterable[Any], str, int | None], Iterable[Any]]  # (items, what, how many) -> the same items
_TRIES = 3  # how often in a row workers may be lost before any call has ended


def silent(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The Track that shows nothing."""
    return items


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_turn(calls: Iterable[Callable[[], R]], workers: int, keep: Callable[[int, R], None] | None = None) -> Iterator[R]:
    """The results of some calls, in their order.

    calls     functions without arguments, made when they are needed; what `functools.partial` makes of a module's function
              and plain values can go to other processes and machines
    workers   calls at the same time, in threads; a configured backend has its own number
    keep      called with number and result as soon as a result is there, whatever its turn

    When a cluster loses a worker, and with it calls or data that were sent there, the calls without a result are made again.
    """
    ready: dict[int, R] = {}
    turn = 0
    for number, result in _completed(calls, workers):
        if keep is not None:
            keep(number, result)
        ready[number] = result
        while turn in ready:
            yield ready.pop(turn)
            turn += 1


def _completed(calls: Iterable[Callable[[], R]], workers: int) -> Iterator[tuple[int, R]]:
    """Number and result of each call, as they come."""
    from joblib import Parallel, delayed

    fresh = enumerate(calls)
    pending: dict[int, Callable[[], R]] = {}

    def tasks(again: list[tuple[int, Callable[[], R]]]) -> Iterator[object]:
        for number, call in again:
            yield _task(number, call)
        for number, call in fresh:
            pending[number] = call
            yield _task(number, call)

    def _task(number: int, call: Callable[[], R]) -> object:
        if isinstance(call, partial):  # arguments of their own, so that joblib sees what is large and the same for all
            return delayed(_numbered)(number, call.func, *call.args, **call.keywords)
        return delayed(_numbered)(number, call)

    tries = 0
    while True:
        try:
            spread = Parallel(n_jobs=workers, prefer="threads", return_as="generator_unordered")
            for number, result in spread(tasks(list(pending.items()))):
                del pending[number]
                tries = 0
                yield number, result
            return
        except CancelledError:
            tries += 1
            if tries >= _TRIES:
                raise


def _numbered(number: int, call: Callable[..., R], *args: object, **more: object) -> tuple[int, R]:
    return number, call(*args, **more)
