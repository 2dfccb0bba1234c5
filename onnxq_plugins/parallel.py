"""Independent calls side by side: in threads, or wherever `joblib.parallel_config` has them run, such as a Dask cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

R = TypeVar("R")
T = TypeVar("T")
_TRIES = 3  # how often in a row workers may be lost before any call has ended


def run_all(calls: Iterable[Callable[[], R]], workers: int, keep: Callable[[int, R], None] | None = None) -> Iterator[R]:
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


def map_threads(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Results in the order of the items, with `workers` threads and never more than workers + 1 items under way.
    Threads, not processes: a session releases the interpreter while it runs, and cannot be pickled."""
    if workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        under_way: deque[Future[R]] = deque()
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) > workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
