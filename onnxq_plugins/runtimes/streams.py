"""Streams: models whose outputs are inputs of their next step, run on their own states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.data import Data, DataOptions, Source, graph_inputs, open_data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph
from onnxq_plugins.runtimes.sessions import Feed, Session, session, wanted
from onnxq_plugins.spec import Array

_KEPT = 2**28  # bytes of states that are kept rather than computed again


def roll(runner: Session, feeds: Iterable[Feed], state: Mapping[str, str]) -> Iterator[tuple[dict[str, Array], list[Any]]]:
    """Run a model on its own states: the complete feed and the outputs of each step.

    feeds   the steps in their order. A state that a feed holds starts a new stream; one that it leaves out is what the
            model gave at the step before, at first zeros of the declared shape, open axes as long as elsewhere in the feed,
            or 1
    state   output -> the input that it is at the next step

    Raises OnnxqError for a name that is none of the model's.
    """
    outputs = [output.name for output in runner.get_outputs()]
    if missing := set(state) - set(outputs):
        raise OnnxqError(
            f"state: the model has no output {', '.join(map(repr, sorted(missing)))}; its outputs are "
            f"{', '.join(map(repr, outputs))}. Write OUTPUT=INPUT, such as --state stateN=state."
        )
    states: dict[str, Array] = {}
    for feed in feeds:
        if any(name in feed for name in state.values()):
            states = {}
        step = {**_zeros(runner, feed, set(state.values()) - set(states)), **states, **feed}
        step = dict(wanted(runner, step))
        values = runner.run(None, step)
        yield step, values
        states = {name: values[outputs.index(output)] for output, name in state.items()}


def _zeros(runner: Session, feed: Feed, names: set[str]) -> dict[str, Array]:
    """Zeros for some inputs that a feed leaves out."""
    inputs = {i.name: i for i in (*runner.get_inputs(), *runner.get_overridable_initializers())}
    sizes: dict[str, int] = {}
    for name, x in feed.items():
        if name in inputs:
            pairs = zip(inputs[name].shape, x.shape, strict=False)
            sizes.update({n: size for n, size in pairs if isinstance(n, str)})
    return {
        name: np.zeros(
            [n if isinstance(n, int) else sizes.get(n, 1) for n in inputs[name].shape],
            _TYPES.get(inputs[name].type, np.float32),
        )
        for name in names
        if name in inputs and name not in feed
    }


_TYPES = {
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


def open_samples(
    source: Source, graph: Graph, options: DataOptions | None = None, labels: str | Path | Array | None = None
) -> Data:
    """Samples for a Graph, as `open_data` opens them, with the states that the graph gives."""

    def start() -> Session:
        weights: dict[str, Array] = {}
        return session(graph.model(weights), weights=weights)

    return rolled(open_data(source, graph_inputs(graph), options, labels), start)


def rolled(data: Data, start: Callable[[], Session]) -> Data:
    """Data whose feeds hold every state, as the float model gives it; the data themselves if they have no states.

    start   opens a session of the float model
    """
    if not data.state or data.complete:
        return data
    kept: list[dict[str, Array]] = []

    def samples() -> Iterator[Mapping[str, Array]]:
        if kept:
            for feed, states in zip(data, kept, strict=True):
                yield {**states, **feed}
            return
        fresh: list[dict[str, Array]] = []
        size = 0
        for number, (feed, _) in enumerate(roll(start(), data, data.state)):
            states = {name: feed[name] for name in data.state.values() if name in feed}
            for name, x in states.items():
                if x.dtype.kind == "f" and not np.isfinite(x).all():
                    raise OnnxqError(
                        f"{data.where}, step {number}: the state '{name}' that the float model gives has NaN or Inf; check "
                        "its weights and the normalization of the data."
                    )
            size += sum(x.nbytes for x in states.values())
            if size <= _KEPT:
                fresh.append(states)
            yield feed
        if size <= _KEPT:
            kept[:] = fresh

    whole = Data(data.inputs, samples, data.where, data.size, data.labels, data.batch)
    whole.notes, whole.implied, whole.state, whole.complete = data.notes, data.implied, data.state, True
    return whole
