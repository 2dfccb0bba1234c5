"""How long each group of quantizers takes at each width, measured in onnxruntime on this machine, within whole networks:
with their caches and fusions."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import digest, replacing
from onnxq_plugins.runtimes import Feed
from onnxq_plugins.runtimes.machine import machine_name, processor
from onnxq_plugins.runtimes.onnxruntime import kernels, plain_name
from onnxq_plugins.runtimes.profiles import Profile, interleaved, overhead, profile, typical
from onnxq_plugins.search.quantizers import Group, Width

Network = tuple[tuple[Width, ...], onnx.ModelProto]  # the width of each group, the exported model


@dataclass(frozen=True)
class Times:
    """Times of groups.

    groups     per group milliseconds at each width. Kernels that belong to no group count for the first
    networks   (measured, predicted) milliseconds of the networks that these were derived from
    rounds     number of runs of each of them
    """

    groups: tuple[dict[Width, float], ...]
    networks: tuple[tuple[float, float], ...]
    rounds: int

    def of(self, number: int, width: Width) -> float:
        """Milliseconds of a group at a width; at its slowest width if that one was not measured."""
        known = self.groups[number]
        return known.get(width, max(known.values()))


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
    """Times of the groups, from networks in which each group has each of its widths: differences are taken from the first,
    and the widths in any other are new or those of the first.

    1. All networks run in turn, each with and without profiling its kernels, until their medians are steady.
    2. A kernel belongs to the group of the layer it runs; other kernels to that of the activation they read (a Quantize, an
       Add, a pooling) or of the layer they follow (a Relu that was not fused; a Quantize, if an integer kernel would have
       written codes itself).
    3. Further time that a network takes beyond the first one (where layouts no longer match those of other groups) is shared
       by the groups whose width differs, in proportion to their own time.
    4. The same kernel on the same types in several networks has one time, so that widths which run alike cost the same.
    5. Profiling adds some tenths of a microsecond to each kernel per input and output, whose shapes it records:
       enough is subtracted to make the sum over all kernels that of the network without profiling.

    feed      one sample
    coded     activations that an integer kernel writes, where it exists
    cache     folder that keeps the result for these networks, this machine and this onnxruntime
    seconds   to measure at most
    """
    file = cache / f"latency-{_digest(networks)}.json" if cache is not None else None
    times = _load(file, networks) if file is not None else None
    if times is None:
        profiles, rounds = profile([model for _, model in networks], feed, seconds)
        times = attributed(groups, coded, networks, profiles, rounds)
        if file is not None:
            _save(file, times)
    return times


def compared(models: Sequence[onnx.ModelProto], feed: Feed, seconds: float = 2.0) -> list[float]:
    """Milliseconds of each network, run in turn."""
    return [typical(durations) for durations in interleaved([runtimes.session(model) for model in models], feed, seconds)]


def attributed(
    groups: Sequence[Group], coded: Collection[str], networks: Sequence[Network], profiles: Sequence[Profile], rounds: int
) -> Times:
    """The times of groups in networks that ran."""
    kernels_of = [_kernels(groups, coded, model.graph, one) for (_, model), one in zip(networks, profiles, strict=True)]
    pooled: dict[Kernel, list[float]] = defaultdict(list)
    for each in kernels_of:
        for kernel, duration in each:
            pooled[kernel].append(duration)
    profiled = {kernel: float(np.mean(values)) for kernel, values in pooled.items()}
    alike: dict[Hashable, list[float]] = defaultdict(list)  # networks of the same kernels take equally long
    contents = [tuple(sorted(kernel for kernel, _ in each)) for each in kernels_of]
    for content, one in zip(contents, profiles, strict=True):
        alike[content].append(one.milliseconds)
    wholes = [float(np.mean(alike[content])) for content in contents]
    corrected: dict[Kernel, list[float]] = defaultdict(list)  # without what profiling adds, network by network
    for content, whole in zip(contents, wholes, strict=True):
        traced, ports = np.array([profiled[k] for k in content]), np.array([k.ports for k in content])
        extra = overhead(traced, ports, whole)
        for kernel, value in zip(content, np.maximum(traced - extra * ports, 0.0), strict=True):
            corrected[kernel].append(float(value))
    times = {kernel: float(np.mean(values)) for kernel, values in corrected.items()}
    parts = np.zeros((len(networks), len(groups) + 1))  # the last column: kernels of no group, part of the rest
    for row, content in zip(parts, contents, strict=True):
        np.add.at(row, [kernel.group for kernel in content], [times[kernel] for kernel in content])
    start, base = networks[0][0], parts[0]
    tables = [{width: float(base[i])} for i, width in enumerate(start)]
    for (choice, _), row, whole in zip(networks[1:], parts[1:], wholes[1:], strict=True):
        changed = np.array([a != b for a, b in zip(choice, start, strict=True)])
        own = np.where(changed, row[:-1], 0.0)
        beside = whole - wholes[0] - (own.sum() - base[:-1][changed].sum())  # what changed around them
        share = own / own.sum() if own.sum() else changed / max(changed.sum(), 1)
        for i in np.flatnonzero(changed):
            tables[i].setdefault(choice[i], max(float(own[i] + beside * share[i]), 0.0))
    if tables:
        rest = wholes[0] - float(base[:-1].sum())
        tables[0] = {width: max(value + rest, 0.0) for width, value in tables[0].items()}
    predicted = [sum(tables[i][width] for i, width in enumerate(choice)) for choice, _ in networks]
    return Times(tuple(tables), tuple(zip(wholes, predicted, strict=True)), rounds)


def _kernels(
    groups: Sequence[Group], coded: Collection[str], exported: onnx.GraphProto, profile: Profile
) -> list[tuple[Kernel, float]]:
    """The kernels that ran, with the milliseconds of each."""
    known = {node.name for node in exported.node}
    rows = []
    for node, owner, duration, types in zip(
        profile.optimized.node,
        owners(groups, coded, exported, profile.optimized),
        profile.nodes,
        profile.types,
        strict=True,
    ):
        if not np.isnan(duration):
            name = plain_name(node.name)
            attributes = b"".join(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
            kernel = Kernel(
                -1 if owner is None else owner,
                name if name in known else "",
                node.op_type,
                types,
                attributes,
                len(node.input) + len(node.output),
            )
            rows.append((kernel, float(duration)))
    return rows


def owners(
    groups: Sequence[Group], coded: Collection[str], exported: onnx.GraphProto, optimized: onnx.GraphProto
) -> list[int | None]:
    """The group (by number) of each node of an optimized graph; None for nodes in front of all groups."""
    tensors = {name: i for i, group in enumerate(groups) for name in group.activations}
    layers = {name: i for i, group in enumerate(groups) for name in group.layers}

    def follow(graph: onnx.GraphProto, known: Mapping[str, int | None]) -> list[int | None]:
        """Per node its group if known, or that of the first input that has one."""
        group_of: dict[str, int | None] = {i.name: tensors.get(i.name) for i in graph.input}
        maker: dict[str, int | None] = {}
        numbers = []
        for node in graph.node:
            name = plain_name(node.name)
            first = next((group_of[t] for t in node.input if group_of.get(t) is not None), None)
            owner = known.get(name, first)
            maker |= dict.fromkeys(node.output, owner)
            group_of |= {t: tensors.get(t, owner) for t in node.output}
            if node.op_type == "QuantizeLinear" and name not in known:
                owner = maker.get(node.input[0], owner) if node.input[0] in coded else owner
            numbers.append(owner)
        return numbers

    followed = follow(exported, layers)
    written = {node.name: owner for node, owner in zip(exported.node, followed, strict=True) if node.name}
    ran = {plain_name(node.name): layers[name] for name, node in kernels(exported, optimized).items() if name in layers}
    codes = {
        node.output[0]: owner
        for node, owner in zip(exported.node, followed, strict=True)
        if node.op_type == "QuantizeLinear"
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


# ---- kept between runs ---------------------------------------------------------------------------------------------------


def _digest(networks: Sequence[Network]) -> str:
    cpu = processor()  # processors of one name may differ in their instructions
    mark = [platform.machine(), machine_name(), *(cpu.get(key, "") for key in ("cpu family", "model", "flags", "Features"))]
    contents = (
        part
        for choice, model in networks
        for part in (" ".join(map(str, choice)), bytes(model.SerializeToString(deterministic=True)))
    )
    return digest(*mark, *contents)


def _load(file: Path, networks: Sequence[Network]) -> Times | None:
    """The times in a file; None if it is absent, damaged, or about other groups."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        groups = tuple({Width.parse(width): float(value) for width, value in one.items()} for one in table["groups"])
        times = Times(groups, tuple((float(a), float(b)) for a, b in table["networks"]), int(table["rounds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    known = [{choice[i] for choice, _ in networks} for i in range(len(networks[0][0]))] if networks else []
    values = [value for one in groups for value in one.values()] + [value for pair in times.networks for value in pair]
    fits = [set(one) for one in groups] == known and bool(np.all(np.isfinite(values)) and np.all(np.array(values) >= 0))
    return times if fits else None


def _save(file: Path, times: Times) -> None:
    """Write a file, whole or not at all."""
    table = {
        "groups": [{str(width): value for width, value in one.items()} for one in times.groups],
        "networks": times.networks,
        "rounds": times.rounds,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(json.dumps(table).encode())
    except OSError as error:
        raise OnnxqError(f"cache '{file.parent}' cannot be written ({error.strerror}); choose another --cache.") from error
