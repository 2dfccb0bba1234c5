"""Independent calls in parallel, in threads or wherever `joblib.parallel_config` runs them, such as a Dask cluster; and how
long loops show their progress.

Calls carry plain values (a layer's problem, a network's bytes), so that threads, processes and Dask workers are the same
code."""

from __future__ import annotations

import os
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, TypeVar
from uuid import uuid4

T = TypeVar("T")
R = TypeVar("R")
Track = Callable[[Iterable[Any], str, int | None], Iterable[Any]]  # (items, what, how many) -> the same items
_LARGE = 1000  # bytes from which an argument is sent to a cluster apart from its call, once for all calls
_AHEAD = 2  # calls per worker of a cluster that have been sent to it


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

    When a cluster loses a worker, the calls and data that were there go to others.
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
    from joblib.parallel import get_active_backend

    backend, _ = get_active_backend()
    if (client := getattr(backend, "client", None)) is not None:  # Dask's
        return _on_cluster(client, calls)
    parallel = Parallel(n_jobs=workers, prefer="threads", return_as="generator_unordered")
    # arguments are passed one by one, so that joblib recognises large ones that calls share
    pieces = ((number, *_parts(call)) for number, call in enumerate(calls))
    completed: Iterator[tuple[int, R]] = parallel(
        delayed(_numbered)(tuple(_setup), number, call, *args, **more) for number, call, args, more in pieces
    )
    return completed


def _on_cluster(client: Any, calls: Iterable[Callable[[], R]]) -> Iterator[tuple[int, R]]:
    """Number and result of each call, in order of completion, by the workers of a Dask cluster.

    joblib's own backend for Dask would do, but for workers that die: it waits for ever where data were on their way to one.
    Here large arguments are results of tasks, so that the scheduler can make them again."""
    from dask.sizeof import sizeof
    from distributed import as_completed

    shared: dict[int, tuple[weakref.ref[Any], Any]] = {}  # id of a large argument -> the argument, its future

    def sent(value: Any) -> Any:
        key = id(value)
        if sizeof(value) < _LARGE:
            return value
        if key not in shared:
            try:
                gone = weakref.ref(value, lambda _: shared.pop(key, None))
            except TypeError:  # a plain value
                return value
            shared[key] = gone, client.submit(_same, value, key=f"onnxq-data-{uuid4().hex}")
        return shared[key][1]

    def task(number: int, call: Callable[[], R]) -> Any:
        function, args, more = _parts(call)
        values = [sent(value) for value in args], {key: sent(value) for key, value in more.items()}
        key = f"onnxq-{uuid4().hex}"
        return client.submit(_numbered, tuple(_setup), number, function, *values[0], **values[1], key=key)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sending large graph", UserWarning)
        fresh = (task(number, call) for number, call in enumerate(calls))
        ahead = _AHEAD * max(1, sum(client.ncores().values()))
        tasks: Any = as_completed(islice(fresh, ahead))  # type: ignore[no-untyped-call]
        for future in tasks:
            yield future.result()
            tasks.update(islice(fresh, 1))


def _parts(call: Callable[[], R]) -> tuple[Callable[..., R], tuple[Any, ...], dict[str, Any]]:
    """A call as a function and its arguments."""
    return (call.func, call.args, call.keywords) if isinstance(call, partial) else (call, (), {})


def _same(value: T) -> T:
    return value


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
