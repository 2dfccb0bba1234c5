"""How long each group of quantizers takes at each width, measured in onnxruntime on this machine, in place: inside whole
networks, with their caches and fusions."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import digest, replacing
from onnxq_plugins.runtimes import Feed
from onnxq_plugins.runtimes.machine import machine_name, processor
from onnxq_plugins.runtimes.onnxruntime import kernels, plain_name
from onnxq_plugins.search.quantizers import Group, Width
from onnxq_plugins.spec import Array

Network = tuple[tuple[Width, ...], onnx.ModelProto]  # the width of each group, the exported model
_EVENTS = 400_000  # of kernels that a session's profile may hold; onnxruntime drops what is beyond a million
_TURN = 4  # runs of a session at a time, the first not counted
_FEWEST, _STEADY = 60, 0.005  # runs at least; how near medians of both halves of the runs are when it is enough


@dataclass(frozen=True)
class Times:
    """What groups take.

    groups     per group milliseconds at each width. What belongs to no group counts with the first
    networks   (measured, predicted) milliseconds of the networks it was learned from
    rounds     how often each of them ran
    """

    groups: tuple[dict[Width, float], ...]
    networks: tuple[tuple[float, float], ...]
    rounds: int

    def of(self, number: int, width: Width) -> float:
        """Milliseconds of a group at a width; of its slowest one, if that was not measured."""
        known = self.groups[number]
        return known.get(width, max(known.values()))


@dataclass(frozen=True, eq=False)
class Ran:
    """A network as it ran.

    milliseconds   of a run as a whole, not profiled
    optimized      the graph that onnxruntime made of it
    nodes          milliseconds of each of its nodes, profiled [nodes]; NaN where one never ran
    types          types and shapes of the inputs of each
    """

    milliseconds: float
    optimized: onnx.GraphProto
    nodes: Array
    types: list[str]


@dataclass(frozen=True, order=True)
class Kernel:
    """What a node of an optimized graph computes, the same in all networks that run the same: its group (-1 for none), its
    name in the exported model, operator, types and shapes of its inputs, attributes, number of inputs and outputs."""

    group: int
    name: str
    op: str
    types: str
    attributes: bytes
    ports: int


def measured(
    groups: Sequence[Group],
    networks: Sequence[Network],
    feed: Feed,
    coded: Collection[str] = (),
    cache: Path | None = None,
    seconds: float = 3.0,
) -> Times:
    """Times of the groups, from networks in which each group has each of its widths: the first is where differences
    start from, the widths of any other are new ones or those of the first.

    1. All networks run in turn, each with and without a profile of its kernels, until their medians are steady.
    2. A kernel belongs to the group of the layer it runs; other kernels to that of the activation they read (a Quantize, an
       Add, a pooling) or of the layer they follow (a Relu that was not fused; a Quantize, if an integer kernel would have
       written codes itself).
    3. What a network takes more than the first one, beyond that (layouts that no longer fit those of other groups), is
       shared by the groups whose width differs, in proportion to their own time.
    4. The same kernel on the same types in several networks has one time, so that widths which run alike cost the same.
    5. Profiling adds to each kernel some tenths of a microsecond for each of its inputs and outputs, whose shapes it writes
       down: as much is taken off as makes the sum over all kernels that of the network without a profile.

    feed      one sample
    coded     activations that an integer kernel writes, as far as it has one
    cache     folder that keeps the result for these networks, this machine and this onnxruntime
    seconds   to measure at most
    """
    file = cache / f"latency-{_digest(networks)}.json" if cache is not None else None
    times = _load(file, networks) if file is not None else None
    if times is None:
        ran, rounds = profile([model for _, model in networks], feed, seconds)
        times = attributed(groups, coded, networks, ran, rounds)
        if file is not None:
            _save(file, times)
    return times


def profile(models: Sequence[onnx.ModelProto], feed: Feed, seconds: float) -> tuple[list[Ran], int]:
    """Run networks in turn, and how many rounds that were."""
    with tempfile.TemporaryDirectory() as folder:
        plain = [runtimes.session(model) for model in models]
        profiled = [
            runtimes.session(model, profile=Path(folder) / f"profile{k}", dump=Path(folder) / f"{k}.onnx")
            for k, model in enumerate(models)
        ]
        optimized = [onnx.load(str(Path(folder) / f"{k}.onnx"), load_external_data=False).graph for k in range(len(models))]
        most = _EVENTS // max((len(graph.node) for graph in optimized), default=1)
        taken = interleaved([*plain, *profiled], feed, seconds, most)
        files = [Path(runner.end_profiling()) for runner in profiled]
        return [
            Ran(typical(own), graph, *_events(graph, json.loads(file.read_text(encoding="utf-8"))))
            for own, graph, file in zip(taken, optimized, files, strict=False)
        ], len(taken[0])


def interleaved(runners: Sequence[ort.InferenceSession], feed: Feed, seconds: float, most: int = 10_000) -> list[Array]:
    """Milliseconds of each run of each session [rounds]. They take turns, so that a noisy machine hits all alike, each
    some runs at a time: the first one, which finds the caches full of another's weights, is not counted.

    most   runs of each session
    """
    taken: list[list[float]] = [[] for _ in runners]
    rounds, stop = 0, time.perf_counter() + seconds
    while rounds < 3 or (rounds * _TURN < most and time.perf_counter() < stop and not _steady(taken)):
        for runner, own in zip(runners, taken, strict=True):
            for k in range(_TURN):
                start = time.perf_counter()
                runner.run(None, dict(feed))
                own += [1e3 * (time.perf_counter() - start)] * (k > 0)
        rounds += 1
    return [np.array(own) for own in taken]


def compared(models: Sequence[onnx.ModelProto], feed: Feed, seconds: float = 2.0) -> list[float]:
    """Milliseconds of each network, run in turn."""
    return [typical(taken) for taken in interleaved([runtimes.session(model) for model in models], feed, seconds)]


def attributed(
    groups: Sequence[Group], coded: Collection[str], networks: Sequence[Network], ran: Sequence[Ran], rounds: int
) -> Times:
    """The times of groups in networks that ran."""
    found = [_kernels(groups, coded, model.graph, one) for (_, model), one in zip(networks, ran, strict=True)]
    pooled: dict[Kernel, list[float]] = defaultdict(list)
    for each in found:
        for kernel, taken in each:
            pooled[kernel].append(taken)
    profiled = {kernel: float(np.mean(values)) for kernel, values in pooled.items()}
    alike: dict[Hashable, list[float]] = defaultdict(list)  # networks of the same kernels take equally long
    contents = [tuple(sorted(kernel for kernel, _ in each)) for each in found]
    for content, one in zip(contents, ran, strict=True):
        alike[content].append(one.milliseconds)
    wholes = [float(np.mean(alike[content])) for content in contents]
    freed: dict[Kernel, list[float]] = defaultdict(list)  # of what profiling adds, network by network
    for content, whole in zip(contents, wholes, strict=True):
        traced, ports = np.array([profiled[k] for k in content]), np.array([k.ports for k in content])
        extra = overhead(traced, ports, whole)
        for kernel, value in zip(content, np.maximum(traced - extra * ports, 0.0), strict=True):
            freed[kernel].append(float(value))
    times = {kernel: float(np.mean(values)) for kernel, values in freed.items()}
    parts = np.zeros((len(networks), len(groups) + 1))  # the last: what belongs to no group, part of the rest
    for row, content in zip(parts, contents, strict=True):
        np.add.at(row, [kernel.group for kernel in content], [times[kernel] for kernel in content])
    start, base = networks[0][0], parts[0]
    made = [{width: float(base[i])} for i, width in enumerate(start)]
    for (choice, _), row, whole in zip(networks[1:], parts[1:], wholes[1:], strict=True):
        changed = np.array([a != b for a, b in zip(choice, start, strict=True)])
        own = np.where(changed, row[:-1], 0.0)
        beside = whole - wholes[0] - (own.sum() - base[:-1][changed].sum())  # what changed around them
        share = own / own.sum() if own.sum() else changed / max(changed.sum(), 1)
        for i in np.flatnonzero(changed):
            made[i].setdefault(choice[i], max(float(own[i] + beside * share[i]), 0.0))
    if made:
        rest = wholes[0] - float(base[:-1].sum())
        made[0] = {width: max(value + rest, 0.0) for width, value in made[0].items()}
    predicted = [sum(made[i][width] for i, width in enumerate(choice)) for choice, _ in networks]
    return Times(tuple(made), tuple(zip(wholes, predicted, strict=True)), rounds)


def _kernels(
    groups: Sequence[Group], coded: Collection[str], exported: onnx.GraphProto, ran: Ran
) -> list[tuple[Kernel, float]]:
    """The kernels that ran, with the milliseconds of each."""
    known = {node.name for node in exported.node}
    found = []
    for node, owner, taken, types in zip(
        ran.optimized.node, owners(groups, coded, exported, ran.optimized), ran.nodes, ran.types, strict=True
    ):
        if not np.isnan(taken):
            name = plain_name(node.name)
            attributes = b"".join(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
            found.append(
                (
                    Kernel(
                        -1 if owner is None else owner,
                        name if name in known else "",
                        node.op_type,
                        types,
                        attributes,
                        len(node.input) + len(node.output),
                    ),
                    float(taken),
                )
            )
    return found


def owners(
    groups: Sequence[Group], coded: Collection[str], exported: onnx.GraphProto, optimized: onnx.GraphProto
) -> list[int | None]:
    """The group (by number) of each node of an optimized graph; None for what comes before all of them."""
    tensors = {name: i for i, group in enumerate(groups) for name in group.activations}
    layers = {name: i for i, group in enumerate(groups) for name in group.layers}

    def follow(graph: onnx.GraphProto, known: Mapping[str, int | None]) -> list[int | None]:
        """Per node the group that is known of it, or that of the first input that has one."""
        of: dict[str, int | None] = {i.name: tensors.get(i.name) for i in graph.input}
        maker: dict[str, int | None] = {}
        made = []
        for node in graph.node:
            name = plain_name(node.name)
            owner = known[name] if name in known else next((of[t] for t in node.input if of.get(t) is not None), None)
            maker |= dict.fromkeys(node.output, owner)
            of |= {t: tensors.get(t, owner) for t in node.output}
            if node.op_type == "QuantizeLinear" and name not in known:
                owner = maker.get(node.input[0], owner) if node.input[0] in coded else owner
            made.append(owner)
        return made

    found = follow(exported, layers)
    written = {node.name: owner for node, owner in zip(exported.node, found, strict=True) if node.name}
    ran = {plain_name(node.name): layers[name] for name, node in kernels(exported, optimized).items() if name in layers}
    codes = {
        node.output[0]: owner for node, owner in zip(exported.node, found, strict=True) if node.op_type == "QuantizeLinear"
    }
    reader = {t: node for node in optimized.node for t in node.input}
    moved = {}
    for node in optimized.node:  # onnxruntime may quantize in front of operators that only move values
        if node.op_type == "QuantizeLinear" and node.name not in written:
            at: onnx.NodeProto | None = node
            while at is not None and plain_name(at.output[0]) not in codes:
                at = reader.get(at.output[0])
            if at is not None:
                moved[node.name] = codes[plain_name(at.output[0])]
    return follow(optimized, written | ran | moved)


def overhead(durations: Array, ports: Array, total: float) -> float:
    """The least x >= 0 for which the sum of max(duration - x * ports, 0) is at most `total`.

    durations, ports   [n], durations not negative, ports positive
    """
    order = np.argsort(-durations / ports)  # those that reach zero last come first
    durations, ports = durations[order], ports[order]
    if durations.sum() <= total:
        return 0.0
    level = (np.cumsum(durations) - total) / np.cumsum(ports)  # x, if the first so many stay above zero
    return float(level.max())  # more or fewer of them would need less


def typical(milliseconds: Array) -> float:
    """What runs [n] take that nothing disturbs: the mean of the fastest quarter."""
    return float(milliseconds[fastest(milliseconds)].mean())


def fastest(values: Array) -> Array:
    """Which values [n] are the least quarter: those of runs that nothing disturbed, on a machine with other work."""
    return np.argsort(values, kind="stable")[: -(-len(values) // 4)]


def _steady(taken: Sequence[Sequence[float]]) -> bool:
    """True if the medians of both halves of the runs agree for every session."""
    runs = len(taken[0]) if taken else _FEWEST
    if runs < _FEWEST or runs % _FEWEST:  # not after every round: looking takes time, too
        return False
    halves = [(typical(np.array(own[: runs // 2])), typical(np.array(own[runs // 2 :]))) for own in taken]
    return all(abs(a - b) <= _STEADY * b for a, b in halves)


def _events(graph: onnx.GraphProto, events: Sequence[Mapping[str, object]]) -> tuple[Array, list[str]]:
    """Milliseconds and types of inputs per node of an optimized graph, mean of its fastest runs. Kernels inside Loop or If
    bodies are left out: their time is in that of the node which holds them."""
    names = {node.name for node in graph.node if node.name}
    seen: dict[str, dict[str, list[float]]] = defaultdict(dict)  # name -> number of the node -> its durations
    types: dict[str, str] = {}
    for event in events:
        if event["cat"] == "Node":
            told = event["args"]
            assert isinstance(told, dict) and isinstance(event["dur"], int)
            name = str(event["name"]).removesuffix("_kernel_time")
            key, number = name if name in names else str(told["op_name"]), str(told["node_index"])
            seen[key].setdefault(number, []).append(event["dur"] / 1e3)
            types[number] = json.dumps(told["input_type_shape"])
    left = {key: list(numbers) for key, numbers in seen.items()}  # nodes of one name follow one another as they ran
    numbers = [left[key].pop(0) if left.get(key := node.name or node.op_type) else "" for node in graph.node]
    durations = {number: np.array(taken) for each in seen.values() for number, taken in each.items()}
    runs = max(map(len, durations.values()), default=0)
    table = np.array([durations[n] if n and len(durations[n]) == runs else np.full(runs, np.nan) for n in numbers])
    table = table.reshape(len(numbers), runs)[:, np.arange(runs) % _TURN > 0]
    return table[:, fastest(np.nansum(table, axis=0))].mean(axis=1), [types.get(number, "") for number in numbers]


# ---- kept between runs ---------------------------------------------------------------------------------------------------


def _digest(networks: Sequence[Network]) -> str:
    cpu = processor()  # processors of one name may differ in their instructions
    mark = [platform.machine(), machine_name(), *(cpu.get(key, "") for key in ("cpu family", "model", "flags", "Features"))]
    said = (
        part
        for choice, model in networks
        for part in (" ".join(map(str, choice)), bytes(model.SerializeToString(deterministic=True)))
    )
    return digest(*mark, *said)


def _load(file: Path, networks: Sequence[Network]) -> Times | None:
    """What a file holds; None if it is absent, damaged, or of other groups."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        groups = tuple({Width.parse(width): float(value) for width, value in one.items()} for one in told["groups"])
        times = Times(groups, tuple((float(a), float(b)) for a, b in told["networks"]), int(told["rounds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    known = [{choice[i] for choice, _ in networks} for i in range(len(networks[0][0]))] if networks else []
    values = [value for one in groups for value in one.values()] + [value for pair in times.networks for value in pair]
    fits = [set(one) for one in groups] == known and bool(np.all(np.isfinite(values)) and np.all(np.array(values) >= 0))
    return times if fits else None


def _save(file: Path, times: Times) -> None:
    """Write beside the target and move into place, so that readers never meet half a file."""
    told = {
        "groups": [{str(width): value for width, value in one.items()} for one in times.groups],
        "networks": times.networks,
        "rounds": times.rounds,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(json.dumps(told).encode())
    except OSError as error:
        raise OnnxqError(f"cache '{file.parent}' cannot be written ({error.strerror}); choose another --cache.") from error
