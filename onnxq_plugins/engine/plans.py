"""A solved plan in one file: all that is needed to write the network for any target, without samples.

The file is a zip archive, uncompressed: ``plan.json`` says what it is; ``graph.onnx`` and ``header.onnx`` are the float
network after the passes, ``arrays/N.npy`` the values and codes; ``inside/N/`` has the same of a branch of an If. Nothing in
it is ever run."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins import files
from onnxq_plugins.calibration import Calibration, NotFinite
from onnxq_plugins.data import Data
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.export.compact import Names, check_names
from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.stored import restored, stored
from onnxq_plugins.job import Outcome
from onnxq_plugins.plan.entries import entry_problem
from onnxq_plugins.runtimes.examples import SHAPES_KEY
from onnxq_plugins.spec import Array, Plan, QuantSpec

FORMAT, VERSION = "onnxq plan", 2
_ARRAYS = ("scale", "zero_point", "multiplier", "codes", "shift")
_FIRST = (1980, 1, 1, 0, 0, 0)  # the date of every part: equal plans are equal files


@dataclass(frozen=True, eq=False)
class Solved:
    """A solved plan and what it was made of.

    graph      the float network after the passes
    plan       every entry solved
    recipe     its table as plain values, the target included
    seed       of the run
    versions   of the plugins, as in the metadata of the model
    ranges     of the activations that the plan leaves in float: (lowest, highest) value over the samples
    unfit      activations that are NaN or infinite on the samples
    floats     layers in float -> the kind of the reason
    shapes     of the first sample by input; {} without samples
    open       those that the model's metadata has
    names      how tensors are called, see `export.compact`
    size       bytes of the user's own model
    inside     (If, attribute that holds the branch) -> the same of that branch
    """

    graph: Graph
    plan: Plan
    recipe: Mapping[str, Any]
    seed: int
    versions: str
    ranges: Mapping[str, tuple[float, float]]
    unfit: tuple[str, ...]
    floats: Mapping[str, str]
    shapes: Mapping[str, list[int]]
    open: Mapping[str, list[int]]
    names: Names
    size: int
    inside: Mapping[tuple[str, str], Solved] = field(default_factory=dict)

    @staticmethod
    def of(result: Outcome) -> Solved:
        """Of what `quantize` returned. The ranges of what is in float take one run over its samples."""
        metadata = {p.key: p.value for p in result.model.metadata_props}
        ranges, unfit = _float_ranges(result.graph, result.plan, result.data)
        return Solved(
            result.graph,
            result.plan,
            json.loads(metadata["onnxq.recipe"]),
            int(metadata["onnxq.seed"]),
            metadata["onnxq.versions"],
            ranges,
            unfit,
            {name: reason.kind for name, reason in result.report.floats.items()},
            sample_shapes(result.data),
            json.loads(metadata.get(SHAPES_KEY, "{}")),
            check_names(getattr(result.again, "keywords", {}).get("names", "short")),
            int(result.report["bytes"]["float"]),
            {branch: Solved.of(inner) for branch, inner in result.inside.items()},
        )

    def write(self, path: Path) -> Path:
        """Write it to a file, whole or not at all. Raises OnnxqError if that is not possible."""
        files.check_writable(path)
        parts = self._parts()
        with files.writing(path), files.replacing(path) as stream_out, zipfile.ZipFile(stream_out, "w") as archive:
            for name, content in parts.items():
                archive.writestr(zipfile.ZipInfo(name, _FIRST), content)
        return path

    def _parts(self) -> dict[str, bytes]:
        """The files in the archive by name."""
        model, header, values = stored(self.graph)
        arrays: list[Array] = []
        entries = {name: _entry(spec, arrays) for name, spec in self.plan.items()}
        table = {
            "format": FORMAT,
            "version": VERSION,
            **{
                key: getattr(self, key)
                for key in ("recipe", "seed", "versions", "floats", "shapes", "open", "names", "size")
            },
            "unfit": list(self.unfit),
            "ranges": {name: list(ends) for name, ends in self.ranges.items()},
            "graph": values,
            "plan": entries,
            "inside": [list(branch) for branch in self.inside],
        }
        parts = {"plan.json": json.dumps(table).encode(), "graph.onnx": model, "header.onnx": header}
        for n, array in enumerate(arrays):
            stream = io.BytesIO()
            np.lib.format.write_array(stream, np.asarray(array, order="C"), allow_pickle=False)
            parts[f"arrays/{n}.npy"] = stream.getvalue()
        for n, inner in enumerate(self.inside.values()):
            parts |= {f"inside/{n}/{name}": content for name, content in inner._parts().items()}
        return parts


def sample_shapes(data: Data | None) -> dict[str, list[int]]:
    """The shapes of the first sample by input."""
    feed = {} if data is None else next(iter(data), {})
    return {name: list(x.shape) for name, x in feed.items() if isinstance(x, np.ndarray)}


def _float_ranges(graph: Graph, plan: Plan, data: Data | None) -> tuple[dict[str, tuple[float, float]], tuple[str, ...]]:
    """Ranges of the activations without an entry, and names of those that are not finite."""
    if data is None:
        return {}, ()
    outputs = [t for node in graph.nodes for t in node.outputs if not t.is_empty()]
    tensors = [*(graph.tensor(name) for name in graph.inputs), *outputs]
    names = [t.name for t in tensors if t.dtype == np.float32 and graph.root(t.name) == t.name and t.name not in plan]
    unfit: tuple[str, ...] = ()
    while True:
        try:
            left = [name for name in names if name not in unfit]
            return (Calibration(graph, data).ranges(left) if left else {}), unfit
        except NotFinite as error:
            if set(error.names) <= set(unfit):
                raise
            unfit += error.names


def _entry(spec: QuantSpec, arrays: list[Array]) -> dict[str, Any]:
    """A spec as plain values; its arrays are added to `arrays` and named by their place."""
    values = spec.to_dict()
    for key in _ARRAYS:
        if (array := getattr(spec, key)) is not None:
            values[key] = len(arrays)
            arrays.append(np.asarray(array))
    return values


# ---- reading --------------------------------------------------------------------------------------------------------------


def is_plan(path: Path) -> bool:
    """True if a file begins as a plan does."""
    try:
        with open(path, "rb") as stream:
            return stream.read(2) == b"PK"
    except OSError:
        return False


def read_plan(path: Path) -> Solved:
    """The plan in a file. Raises OnnxqError, one sentence, for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it is compressed")
            table = json.loads(archive.read("plan.json"))
            if table["format"] != FORMAT:
                raise ValueError("another format")
            if isinstance(table["version"], int) and table["version"] > VERSION:
                raise OnnxqError(f"plan '{path}' was written by a newer onnxq-plugins; update this one, or write it again.")
            return _solved(archive, "")
    except OnnxqError:
        raise
    except OSError as error:
        raise OnnxqError(f"plan '{path}' cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # zipfile, json, numpy, protobuf and graphsurgeon each raise their own
        raise OnnxqError(
            f"'{path}' is no plan, or is damaged; write it with onnxq quantize --save-plan, or copy it again."
        ) from error


def _solved(archive: zipfile.ZipFile, folder: str) -> Solved:
    table = json.loads(archive.read(f"{folder}plan.json"))
    graph = restored(archive.read(f"{folder}graph.onnx"), archive.read(f"{folder}header.onnx"), table["graph"])
    plan = {}
    for name, values in table["plan"].items():
        arrays = {key: _array(archive, folder, values[key]) for key in _ARRAYS if key in values}
        blocks = {key: tuple(map(int, values[key])) for key in ("block", "sub_block") if key in values}
        plan[name] = QuantSpec(**{**values, **blocks, **arrays})
        if not plan[name].solved or entry_problem(graph, name, plan[name]):
            raise ValueError(f"the entry of {name}")
    ranges = {name: (float(low), float(high)) for name, (low, high) in table["ranges"].items()}
    return Solved(
        graph,
        Plan(plan),
        dict(table["recipe"]),
        int(table["seed"]),
        str(table["versions"]),
        ranges,
        tuple(map(str, table["unfit"])),
        {str(name): str(kind) for name, kind in table["floats"].items()},
        {str(name): [int(n) for n in shape] for name, shape in table["shapes"].items()},
        {str(name): [int(n) for n in shape] for name, shape in table["open"].items()},
        check_names(table["names"]),
        int(table["size"]),
        {
            (str(node), str(side)): _solved(archive, f"{folder}inside/{n}/")
            for n, (node, side) in enumerate(table.get("inside", ()))  # there is none in version 1
        },
    )


def _array(archive: zipfile.ZipFile, folder: str, number: int) -> Array:
    stream = io.BytesIO(archive.read(f"{folder}arrays/{int(number)}.npy"))
    array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array
