"""Independent calls in parallel, in threads or wherever `joblib.parallel_config` runs them, such as a Dask cluster; and how
long loops show their progress.

Calls carry plain values (a layer's problem, a network's bytes), so that threads, processes and Dask workers are the same
code. joblib sends large equal arguments to each worker once; they are lost with the worker, and Dask cannot make them
again, hence the retries."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
Track = Callable[[Iterable[Any], str, int | None], Iterable[Any]]  # (items, what, how many) -> the same items
_TRIES = 3  # times in a row that workers may be lost before any call completes


def silent(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The Track that shows nothing."""
    return items


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_setup: list[Callable[[], object]] = []


def in_workers(call: Callable[[], object]) -> None:
    """Make a call before each piece of work that `run_all` has done from now on, wherever that is: a process elsewhere lacks
    what was set up in this one. Repeated calls must cost nothing."""
    _setup.append(call)


def run_all(
    calls: Iterable[Callable[[], R]], workers: int, on_result: Callable[[int, R], None] | None = None
) -> Iterator[R]:
    """Run calls in parallel; their results in the order of the calls.

    calls       functions without arguments, taken when a worker is free; a `functools.partial` of a module's function and
                plain values can be sent to other processes and machines
    workers     threads; a configured backend has its own number
    on_result   called with number and result as soon as a result arrives, in any order

    When a cluster loses a worker, and with it calls or data that were sent there, the calls without a result run again.
    """
    results: dict[int, R] = {}
    following = 0
    for number, result in _completed(calls, workers):
        if on_result is not None:
            on_result(number, result)
        results[number] = result
        while following in results:
            yield results.pop(following)
            following += 1


def _completed(calls: Iterable[Callable[[], R]], workers: int) -> Iterator[tuple[int, R]]:
    """Number and result of each call, in order of completion."""
    from joblib import Parallel, delayed

    fresh = enumerate(calls)
    pending: dict[int, Callable[[], R]] = {}

    def tasks(unfinished: list[tuple[int, Callable[[], R]]]) -> Iterator[object]:
        for number, call in unfinished:
            yield _task(number, call)
        for number, call in fresh:
            pending[number] = call
            yield _task(number, call)

    def _task(number: int, call: Callable[[], R]) -> object:
        if isinstance(call, partial):  # passed one by one, so that joblib recognises large arguments that calls share
            return delayed(_numbered)(tuple(_setup), number, call.func, *call.args, **call.keywords)
        return delayed(_numbered)(tuple(_setup), number, call)

    tries = 0
    while True:
        try:
            parallel = Parallel(n_jobs=workers, prefer="threads", return_as="generator_unordered")
            for number, result in parallel(tasks(list(pending.items()))):
                del pending[number]
                tries = 0
                yield number, result
            return
        except CancelledError:
            tries += 1
            if tries >= _TRIES:
                raise


def _numbered(
    setup: tuple[Callable[[], object], ...], number: int, call: Callable[..., R], *args: object, **more: object
) -> tuple[int, R]:
    for prepare in setup:
        prepare()
    return number, call(*args, **more)


def map_threads(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """The results of `work` in the order of the items, by `workers` threads and with at most workers + 1 items in progress.

    Always in this process, unlike `run_all`: for work on a session, which releases the interpreter while it runs and cannot
    be pickled."""
    if workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
