"""How long each kernel of a network takes in onnxruntime: its own profile, in runs that take turns with those of others and
with runs without a profile, so that neither other work of the machine nor the profile itself counts."""

from __future__ import annotations

import bisect
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxq_plugins.graph.bodies import bodies, with_bodies
from onnxq_plugins.runtimes.sessions import Feed, session, wanted
from onnxq_plugins.spec import Array

_EVENTS = 400_000  # of kernels in the profile of a session at most; onnxruntime drops those beyond a million
_BRIEF = 20_000  # where reading them must take no longer than running
TURN = 4  # runs of a session at a time, the first not counted
_ROUNDS = 3  # turns of each session at least
_NODE = 14  # inputs and outputs that profiling a node itself takes as long as (chains of 100 operators, Xeon)
_FEWEST, _STEADY = 60, 0.005  # least number of runs; relative difference of the medians of both halves that ends them


@dataclass(frozen=True, eq=False)
class Profile:
    """A network with the times of its kernels.

    milliseconds   of a whole run without profiling
    optimized      the graph as optimized by onnxruntime, with the nodes of control-flow bodies behind its own
    nodes          milliseconds of each of its nodes, with profiling [nodes]; NaN where one never ran
    types          types and shapes of the inputs of each
    runs           milliseconds of each run without profiling [runs]
    """

    milliseconds: float
    optimized: onnx.GraphProto
    nodes: Array
    types: list[str]
    runs: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def ports(self) -> Array:
        """What profiling adds to each node, in the time that it takes for an input or output [nodes]."""
        return np.array([_NODE + len(node.input) + len(node.output) for node in self.optimized.node], np.float64)

    def corrected(self) -> Array:
        """Milliseconds of each node without what profiling adds [nodes], which together are no more than a run's."""
        ports = self.ports
        ran = ~np.isnan(self.nodes)
        times = self.nodes.copy()
        if ran.any():
            extra = overhead(times[ran], ports[ran], self.milliseconds)
            times[ran] = np.maximum(times[ran] - extra * ports[ran], 0.0)
        return times


def profile(
    models: Sequence[onnx.ModelProto],
    feed: Feed,
    seconds: float,
    *,
    plain: Sequence[ort.InferenceSession] | None = None,
    folders: Sequence[Path | None] = (),
    brief: bool = False,
) -> tuple[list[Profile], int]:
    """Profiles of networks that run in turn, and the number of rounds.

    plain     sessions of the networks, where there are some
    folders   of their external data
    brief     no more than that, and what reading takes: one short turn each where a few long ones take more than `seconds`
    """
    where = list(folders) or [None] * len(models)
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{k}" for k in range(len(models))]
        plain = plain or [session(model, folder=own) for model, own in zip(models, where, strict=True)]
        profiled = []
        for file, model, own in zip(files, models, where, strict=True):
            file.mkdir()
            profiled.append(session(model, profile=file / "profile", dump=file / "made.onnx", folder=own))
        optimized = [with_bodies(onnx.load(str(file / "made.onnx"), load_external_data=False).graph) for file in files]
        most = (_BRIEF if brief else _EVENTS) // max((len(graph.node) for graph in optimized), default=1)
        turn, least = TURN, _ROUNDS
        if brief and 2 * least * turn * _once(plain, feed) > seconds:
            turn, least = 2, 1
        durations = interleaved([*plain, *profiled], feed, seconds, most, turn=turn, least=least)
        events = [json.loads(Path(runner.end_profiling()).read_text(encoding="utf-8")) for runner in profiled]
        return [
            Profile(typical(own), graph, *_events(graph, each, turn), own)
            for own, graph, each in zip(durations, optimized, events, strict=False)
        ], len(durations[0])


def _once(runners: Sequence[ort.InferenceSession], feed: Feed) -> float:
    """Seconds of a run of each, after a first one that found everything cold."""
    for _ in range(2):
        start = time.perf_counter()
        for runner in runners:
            runner.run(None, dict(wanted(runner, feed)))
    return time.perf_counter() - start


def interleaved(
    runners: Sequence[ort.InferenceSession],
    feed: Feed,
    seconds: float,
    most: int = 10_000,
    *,
    turn: int = TURN,
    least: int = _ROUNDS,
) -> list[Array]:
    """Milliseconds of each run of each session [rounds]. They take turns, so that a noisy machine affects all alike, each
    with some runs at a time: the first one, which finds the caches full of another's weights, is not counted.

    most    runs of each session
    turn    runs of a session at a time
    least   turns of each
    """
    durations: list[list[float]] = [[] for _ in runners]
    feeds = [dict(wanted(runner, feed)) for runner in runners]
    rounds, stop = 0, time.perf_counter() + seconds
    while rounds < least or (rounds * turn < most and time.perf_counter() < stop and not _steady(durations)):
        for runner, values, own in zip(runners, feeds, durations, strict=True):
            for k in range(turn):
                start = time.perf_counter()
                runner.run(None, values)
                own += [1e3 * (time.perf_counter() - start)] * (k > 0)
        rounds += 1
    return [np.array(own) for own in durations]


def overhead(durations: Array, ports: Array, total: float) -> float:
    """The least x >= 0 for which the sum of max(duration - x * ports, 0) is at most `total`.

    durations, ports   [n], durations not negative, ports positive
    """
    order = np.argsort(-durations / ports)  # those that reach zero last are first
    durations, ports = durations[order], ports[order]
    if durations.sum() <= total:
        return 0.0
    level = (np.cumsum(durations) - total) / np.cumsum(ports)  # x, if so many of the first stay above zero
    return max(float(level.max()), 0.0)  # x is smaller for more or fewer of them


def typical(milliseconds: Array) -> float:
    """Duration of undisturbed runs [n]: the mean of the fastest quarter."""
    return float(milliseconds[fastest(milliseconds)].mean())


def fastest(values: Array) -> Array:
    """Positions of the smallest quarter of values [n]: undisturbed runs, on a machine with other work."""
    return np.argsort(values, kind="stable")[: -(-len(values) // 4)]


def _steady(durations: Sequence[Sequence[float]]) -> bool:
    """True if both halves of the runs agree for every session."""
    runs = len(durations[0]) if durations else _FEWEST
    if runs < _FEWEST or runs % _FEWEST:  # not after every round: the check takes time, too
        return False
    halves = [(typical(np.array(own[: runs // 2])), typical(np.array(own[runs // 2 :]))) for own in durations]
    return all(abs(a - b) <= _STEADY * b for a, b in halves)


def _events(graph: onnx.GraphProto, events: Sequence[Mapping[str, Any]], turn: int) -> tuple[Array, list[str]]:
    """Milliseconds and types of inputs per node of an optimized graph, mean of its fastest runs; NaN for nodes that do not
    run. Those of control-flow bodies have times of their own, all passes of a Loop together, and the node around them has
    the rest of its time.

    graph   with the nodes of bodies behind its own (`graph.bodies.with_bodies`)
    turn    runs at a time, the first not counted
    """
    names, around = {n.name for n in graph.node if n.name}, {n.op_type for n in graph.node if bodies(n)}
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    recorded: dict[str, dict[Hashable, list[float]]] = defaultdict(dict)  # name -> node of that name -> durations [runs]
    types: dict[Hashable, str] = {}
    missing: list[float] = [np.nan] * len(starts)
    inside: list[tuple[int, Hashable, list[float]]] = []  # the nodes whose bodies are running: end, identity, durations
    nodes = [event for event in events if event["cat"] == "Node"]
    for event in sorted(nodes, key=lambda e: (e["ts"], e["args"]["op_name"] not in around, -e["dur"])):
        op, duration, run = event["args"]["op_name"], event["dur"] / 1e3, bisect.bisect(starts, event["ts"]) - 1
        while inside and event["ts"] >= inside[-1][0]:
            inside.pop()
        name = str(event["name"]).removesuffix("_kernel_time")
        key = name if name in names else str(op)
        one = key, event["args"]["node_index"], inside[-1][1] if inside and name not in names else None
        if one not in types:
            types[one], recorded[key][one] = json.dumps(event["args"]["input_type_shape"]), missing.copy()
        times = recorded[key][one]
        times[run] = duration + (0.0 if isnan(times[run]) else times[run])
        if inside:
            inside[-1][2][run] -= duration
        if op in around:
            inside.append((event["ts"] + event["dur"], one, times))
    left = {key: list(each.items()) for key, each in recorded.items()}  # nodes of one name, in the order they ran
    found = [left[key].pop(0) if left.get(key := node.name or node.op_type) else (None, missing) for node in graph.node]
    table = np.array([times if not any(map(isnan, times)) else missing for _, times in found])
    table = table.reshape(len(found), len(starts))[:, np.arange(len(starts)) % turn > 0]
    return table[:, fastest(np.nansum(table, axis=0))].mean(axis=1), [types.get(one, "") for one, _ in found]
