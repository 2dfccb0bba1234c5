"""The engine: load, plan, run the passes under the laws, complete, export, audit."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.calibration import Calibration, Track, silent
from onnxq_plugins.data import Data, Source, graph_inputs, open_data
from onnxq_plugins.errors import OnnxqError, raised
from onnxq_plugins.export import qdq, storage
from onnxq_plugins.files import DataFile, clear_leftovers, replacing, writing
from onnxq_plugins.graph import Graph, Layer, load
from onnxq_plugins.graph.importer import bytes_on_disk, skeleton
from onnxq_plugins.graph.importer import read as read_model
from onnxq_plugins.job import Job, Pass
from onnxq_plugins.layers.complete import complete
from onnxq_plugins.measure.metrics import Metric, check_labels, find_metric, metric_name, top1
from onnxq_plugins.plan import requests
from onnxq_plugins.plugins import Plugins, find_plugins
from onnxq_plugins.recipe import Recipe
from onnxq_plugins.runtimes.audit import Audit, audit_model
from onnxq_plugins.search.quantizers import share_of_work
from onnxq_plugins.spec import Array, Plan
from onnxq_plugins.targets import Rule, Target
from onnxq_plugins.trace import Trace

log = logging.getLogger("onnxq_plugins")
DRIFT = 1e-4  # law L1, relative
LARGE = 2**30  # bytes of weights in files from which an output's constants are written as they are made


class LawBroken(OnnxqError):
    """A pass fails, or does what its declaration or the rules for passes rule out: a bug of the pass, not of the input."""


@dataclass(frozen=True, eq=False)
class Result:
    """What `quantize` gives back.

    model    the QDQ model
    plan     the solved plan
    report   what was done, as plain values that JSON can hold
    graph    the float graph that the plan is about: canonical, and rewritten by the passes
    target   what it was made for
    data     the samples it was calibrated with, if any
    source   the user's own model: its path, or what was given; None for a Graph
    again    quantizes the same model on the same data by another recipe: again(recipe, settings=())
    """

    model: onnx.ModelProto
    plan: Plan
    report: dict[str, Any]
    graph: Graph
    target: Target
    data: Data | None = None
    source: Path | onnx.ModelProto | None = None
    again: Callable[..., Result] | None = None

    @property
    def float_model(self) -> onnx.ModelProto:
        """The float model that the plan is about. Its function is that of the given model, unless a pass declares otherwise;
        its tensors and weights need not be: BatchNorm is folded, channels may be rescaled."""
        return self.graph.model()

    @property
    def original(self) -> Path | onnx.ModelProto:
        """What latency and accuracy are compared with: the user's own model, or `float_model` where that is gone."""
        gone = self.source is None or (isinstance(self.source, Path) and not self.source.is_file())
        return self.float_model if gone or self.source is None else self.source

    @property
    def recipe_name(self) -> str:
        """Name of the recipe's file; "" if it came from none."""
        return str(self.report.get("recipe_name", ""))

    @property
    def summary(self) -> str:
        """One line: kernels, size, what stayed float."""
        return str(self.report["summary"])

    def save(self, path: str | Path) -> Path:
        """Write the model; an existing file is replaced only when the new one is complete."""
        return save_model(self.model, Path(path))

    def save_report(self, path: str | Path, data: Source | None = None, **options: Any) -> Path:
        """Write what was done and what it gave as one page of HTML, and the same beside it as JSON; see
        `onnxq_plugins.report.page.write_report`. Needs the extra ``report``."""
        from onnxq_plugins.report.page import write_report  # it stands above the engine

        return write_report(self, Path(path), data, **options)

    def __repr__(self) -> str:
        return f"<Result: {self.summary}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the summary, and the layers in a fold."""
        columns = ("name", "op", "weights", "bits_per_weight", "kernel", "why_float")
        rows = ("".join(f"<td>{escape(str(row.get(key, '')))}</td>" for key in columns) for row in self.report["layers"])
        head = "".join(f"<th>{key.replace('_', ' ')}</th>" for key in columns)
        return (
            f"<p>{escape(self.summary)}</p><details><summary>{len(self.report['layers'])} layers</summary>"
            f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table></details>"
        )


def quantize(
    model: str | Path | onnx.ModelProto | Graph,
    recipe: str | Path | Mapping[str, Any] | Recipe = "int8",
    data: Source | None = None,
    *,
    output: str | Path | None = None,
    target: str | None = None,
    seed: int = 0,
    samples: int = 0,
    workers: int | None = None,
    cache: str | Path | None = None,
    verify: bool = False,
    float32: bool = False,
    settings: Iterable[str] = (),
    plugins: Iterable[object] = (),
    labels: str | Path | Array | None = None,
    metric: str | Metric | None = None,
    track: Track = silent,
    trace: Trace | None = None,
) -> Result:
    """Quantize a float ONNX model into QDQ form.

    model      path, ModelProto or Graph; left alone
    recipe     built-in name, path, mapping or Recipe
    data       sample inputs, see `onnxq_plugins.data.samples.open_data`
    output     write the model here as well
    target     overrides the recipe's target
    seed       one seed, one result
    samples    use that many of the samples, spread evenly (0: all)
    workers    threads and processes at once; None: one per core
    cache      folder that keeps calibration results between runs
    verify     check after every pass that the float function stayed (law L1)
    float32    convert half-precision models first
    settings   changes to the recipe such as ``ranges.method=mse``
    plugins    further plugin objects beside the installed ones
    labels     of the samples, for metrics that want them: an array [samples, ...], an .npy file or a text file
    metric     how passes that search judge a network, in place of their own: a name, ``package.module:function`` (which is
               imported), or a function of (float outputs, quantized outputs, labels), larger is better; see
               `onnxq_plugins.measure.metrics`
    track      shows progress, see `Job.track`
    trace      takes a line of text for each hook call of a plugin

    Raises OnnxqError, one sentence a problem, before anything is written.
    """
    started = time.perf_counter()
    for name, value in (("seed", seed), ("workers", workers or 0)):
        if value < 0:
            raise OnnxqError(f"{name} = {value} must not be negative.")
    judge = find_metric(metric) if metric is not None else None
    found = find_plugins(plugins := list(plugins), trace)
    made = found.recipe(recipe, settings)
    made = replace(made, target=target) if target else made
    made = replace(made, data=replace(made.data, samples=samples)) if samples else made  # the model's recipe makes it again
    chosen = found.target(made.target)
    if output is not None:
        check_writable(Path(output))
    graph = load(model, float32=float32, flatten=chosen.flatten)
    given = Path(model).absolute() if isinstance(model, (str, Path)) else None if isinstance(model, Graph) else model
    before = _bytes(graph, given)
    if isinstance(given, Path) and output is not None and given.resolve() == Path(output).resolve():
        given = None  # it will not be there any more
    # a recipe may come from a stranger: its path is only ever a file, never code to import
    source = data if data is not None else Path(made.data.path) if made.data.path else None
    read = open_data(source, graph_inputs(graph), made.data, labels) if source is not None else None
    if read is not None and judge in (None, top1):
        check_labels(read.labels, graph.shape(graph.outputs[0]), graph.outputs[0])
    asked = requests.request(graph, made, chosen)
    OnnxqError.check(chosen.problems(graph, asked.plan, asked.inputs))
    workers = workers or cores()
    if cache:
        clear_leftovers(Path(cache))
    calibration = Calibration(graph, read, cache=Path(cache) if cache else None, workers=workers, track=track)
    job = Job(
        graph,
        asked.plan,
        calibration,
        chosen,
        made,
        np.random.default_rng(seed),
        workers,
        {"floats": dict(asked.floats), "notes": [*graph.notes, *asked.notes, *(read.remarks() if read else ())]},
        track,
        judge,
    )
    steps = [_run(job, step, found, verify) for step in made.passes]
    if judge is not None and not any(hasattr(step, "metric") for step in made.passes):
        job.report["notes"].append(f"metric '{metric_name(judge)}': no pass of the recipe searches, so none asked for it")
    if verify:
        moved = max((step["drift"] for step in steps if "drift" in step), default=0.0)
        job.report["notes"].append(f"verified after each exact pass: the float function moved by {moved:.0e} at most")
    start = time.perf_counter()
    complete(job)
    OnnxqError.check(chosen.problems(graph, job.plan, _layer_inputs(job)))
    if widened := job.report.pop("widened", {}):
        channels, layers = (
            f"{n} {what}{'s' * (n > 1)}"
            for n, what in ((sum(widened.values()), "nearly empty channel"), (len(widened), "layer"))
        )
        job.report["notes"].append(f"scales of {channels} in {layers} were widened so that their biases fit int32")
    beside = DataFile(Path(output)) if output is not None and graph.mapped.size > LARGE else None
    with beside or contextlib.nullcontext():
        exported = qdq.export(graph, job.plan, chosen, data=beside)
        _sign(exported, made, found, seed)
        job.report["steps"] = [*steps, {"pass": "export", "seconds": round(time.perf_counter() - start, 3)}]
        _describe(job, exported, beside, before)
        path = None if output is None else save_model(exported, Path(output)) if beside is None else beside.finish(exported)
    job.report["seconds"] = round(time.perf_counter() - started, 3)
    found.manager.hook.onnxq_exported(job=job, model=exported, path=path)
    again = partial(quantize, model, data=read, seed=seed, workers=workers, cache=cache, float32=float32, plugins=plugins)
    return Result(exported, job.plan, job.report, job.graph, chosen, job.calibration.data, given, again)


def save_model(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model, complete or not at all; one that is too large for a protobuf message with external data beside it.
    Raises OnnxqError if that is not possible."""
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise OnnxqError(f"output '{path}': the model's weights lie beside the output it was made for; copy both files.")
    if runtimes.size_of(model) <= runtimes.LARGEST_MESSAGE:
        return write_file(model.SerializeToString(), path)
    check_writable(path)
    shell = skeleton(model)
    with DataFile(path) as data:
        for tensor in model.graph.initializer:
            stored = shell.graph.initializer.add()
            stored.CopyFrom(tensor)
            data.take(stored)
        return data.finish(shell)


def write_file(content: bytes, path: Path) -> Path:
    """Write beside the target, then move into place. Raises OnnxqError if that is not possible."""
    check_writable(path)
    with writing(path), replacing(path) as stream:
        stream.write(content)
    return path


def check_writable(path: Path) -> None:
    """Raise OnnxqError if a file could not be made at `path`."""
    folder = path.parent
    if not folder.is_dir():
        raise OnnxqError(f"output '{path}': the folder '{folder}' does not exist; make it first.")
    if path.is_dir():
        raise OnnxqError(f"output '{path}' is a folder; give a file name.")
    if path.exists() and not path.is_file():  # moving a file into place would replace a device
        raise OnnxqError(f"output '{path}' is not an ordinary file; give a file name.")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OnnxqError(f"output '{path}' cannot be written: permission denied; choose another place with -o.")


# ---- one pass -------------------------------------------------------------------------------------------------------------


def _run(job: Job, step: Pass, found: Plugins, verify: bool) -> dict[str, Any]:
    """Run one pass through the hook, then hold it to the laws: float function (L1), no stale solutions (L5)."""
    data = job.calibration.data  # the pass may bring its own
    before_plan, weights = job.plan, _weights(job.graph)
    reference = _probe(job.graph, data) if verify and step.exact else None
    job.graph.touched.clear()
    start = time.perf_counter()
    gave = _guarded(step, lambda: found.manager.hook.onnxq_run_pass(step=step, job=job), found)
    entry = {
        "pass": step.name,
        "seconds": round(time.perf_counter() - start, 3),
        "exact": step.exact,
        **({"parameters": _parameters(step)} if _parameters(step) else {}),
        "told": gave,
    }
    if reference is not None:
        moved = runtimes.drift(reference, _probe(job.graph, data))
        entry["drift"] = moved
        if moved > DRIFT:
            raise LawBroken(
                f"pass '{step.name}' changed the float function by {moved:.1e} (limit {DRIFT:.0e}) though "
                "it declares exact = True; this is a bug of the pass: mend it, or declare exact = False."
            )
    if not isinstance(job.plan, Plan):
        raise LawBroken(
            f"pass '{step.name}' leaves a {type(job.plan).__name__} in job.plan; write job.plan |= "
            "{name: spec}, which makes a new Plan."
        )
    touched = job.graph.touched | {n for n, w in _weights(job.graph).items() if n in weights and w != weights[n]}
    stale = [n for n in touched if n in job.plan and job.plan[n].solved and job.plan[n] is before_plan.get(n)]
    job.plan |= {n: job.plan[n].request() for n in stale}
    if gone := [n for n in job.plan if n not in job.graph and n in before_plan]:
        job.plan = job.plan.without(*gone)
    for name, spec in job.plan.items():
        if spec is not before_plan.get(name) and (wrong := requests.entry_problem(job.graph, name, spec)):
            raise LawBroken(
                f"the planned entry of '{name}' that pass '{step.name}' leaves {wrong}; this is a bug of the pass."
            )
    return entry


def _guarded(step: Pass, run: Callable[[], Any], found: Plugins) -> dict[str, Any]:
    """What a pass tells. Raises LawBroken where it fails by anything but an OnnxqError, and where reports cannot hold it."""
    try:
        gave = run() or {}
    except OnnxqError:
        raise
    except Exception as error:  # whatever a stranger's code raises
        source = found.sources.get(f"pass {step.name}", "")
        by = f" ({source} {found.versions[source]})" if source in found.versions else ""
        file = getattr(sys.modules.get(type(step).__module__), "__file__", None)
        home = None if file is None else Path(file).parent if Path(file).name == "__init__.py" else Path(file)
        raise LawBroken(
            f"pass '{step.name}'{by} fails with {raised(error, home)}; this is a bug of the pass, or "
            "of what it was given to call."
        ) from error
    try:
        if not isinstance(gave, dict):
            raise TypeError(f"it is a {type(gave).__name__}")
        json.dumps(gave, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise LawBroken(
            f"pass '{step.name}' returns what a report cannot hold ({error}); return a dict of plain numbers, "
            "text, lists and dicts, such as int(n) for a numpy number."
        ) from error
    return gave


def _weights(graph: Graph) -> dict[str, int]:
    """A quick fingerprint of each layer's weight."""
    arrays = {layer.weight: graph.constant(layer.weight) for layer in graph.layers}
    files = {id(array) for array in graph.mapped.arrays.values()}  # they cannot change: they are mapped for reading
    return {name: id(array) if id(array) in files else hash(array.tobytes()) for name, array in arrays.items()}


def _probe(graph: Graph, data: Data | None) -> list[Array]:
    """Outputs of the float model on a few samples, or on noise where there are none (whole numbers: 1, so that they are rows
    of a table, and nothing is masked; images of dynamic size: 128)."""
    feeds: list[dict[str, Array]]
    if data is not None:
        feeds = list(islice(data, 4))
    else:
        rng = np.random.default_rng(0)
        shapes = {
            i.name: [n or (128 if len(i.shape) == 4 and a > 1 else 1) for a, n in enumerate(i.shape)]
            for i in graph_inputs(graph)
        }
        feeds = [
            {
                i.name: (rng.standard_normal(shapes[i.name]) if i.dtype.kind == "f" else np.ones(shapes[i.name])).astype(
                    i.dtype
                )
                for i in graph_inputs(graph)
            }
        ]
    weights: dict[str, Array] = {}
    return runtimes.outputs(runtimes.session(graph.model(weights), weights=weights), feeds)


def _parameters(step: Pass) -> dict[str, Any]:
    table = Recipe(passes=(step,)).to_dict()["pass"][0]
    return {key: value for key, value in table.items() if key != "use"}


def _layer_inputs(job: Job) -> dict[str, str]:
    return {
        y.name: requests.layer_input(job.graph, job.plan, job.target, y) for y in job.graph.layers if y.weight in job.plan
    }


# ---- the report -----------------------------------------------------------------------------------------------------------


def _sign(model: onnx.ModelProto, recipe: Recipe, found: Plugins, seed: int) -> None:
    """Write into the model what is needed to make it again."""
    used = {found.sources[f"pass {step.name}"] for step in recipe.passes} | {found.sources[f"target {recipe.target}"]}
    versions = {name: found.versions.get(name, _version(name)) for name in sorted(used | {"onnxq-plugins"})}
    values = {
        "onnxq.recipe": recipe.to_json(),
        "onnxq.seed": str(seed),
        "onnxq.versions": " ".join(f"{name}=={v}" for name, v in versions.items()),
    }
    kept = [p for p in model.metadata_props if p.key not in values]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in values.items():
        model.metadata_props.add(key=key, value=value)


def recipe_of(path: str | Path) -> tuple[dict[str, Any], int]:
    """The recipe (plain values) and the seed that made a model. Raises OnnxqError if it does not tell."""
    props = {p.key: p.value for p in read_model(Path(path)).metadata_props}
    try:
        recipe, seed = json.loads(props["onnxq.recipe"]), int(props.get("onnxq.seed", 0))
    except (KeyError, ValueError) as error:
        raise OnnxqError(
            f"model '{path}' has no recipe in its metadata; give a model that onnxq made, or a recipe with -r."
        ) from error
    return recipe, seed


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _describe(job: Job, model: onnx.ModelProto, beside: DataFile | None, before: int) -> None:
    """Per-layer table, sizes, kernels and the one-line summary.

    before   bytes of the user's own model
    """
    report = job.report
    if beside is not None:
        beside.flush()
    kernels = audit_model(model, folder=beside.path.parent if beside is not None else None)
    job.graph.mapped.release()
    products = kernels.products()
    if products and any(not job.graph.is_constant(name) for name in job.plan):
        share = share_of_work(job.graph, products)
        work = "" if share is None else f", {100 * share:.1f} % of the multiply-adds"
        report["notes"].append(
            f"products of two activations that run in float: {len(products)}{work}; at their size integer kernels mostly do "
            'not pay, [[layer]] op = "Attention" quantize = true takes them all the same'
        )
    by_name = {entry.name: entry for entry in kernels.layers}
    rows, stored = [], 0.0
    for layer in job.graph.layers:
        spec = job.plan.get(layer.weight)
        entry = by_name.get(layer.name)
        row: dict[str, Any] = {
            "name": layer.name,
            "op": layer.op,
            "kernel": entry.kernel if entry else "removed",
            "parameters": int(np.prod(layer.shape)),
        }
        bits = storage.stored_bits(layer, spec, _rule(job, layer)) if spec is not None else 32.0
        stored += row["parameters"] * bits
        if spec is not None:
            row |= {"weights": spec.describe((layer.out_axis, layer.in_axis)), "bits_per_weight": round(bits, 3)}
        why = report["floats"].get(layer.name) or (entry.why if entry and not entry.quantized else "")
        rows.append(row | ({"why_float": why} if why else {}))
    after = runtimes.size_of(model) + (beside.size if beside is not None else 0)
    report |= {
        "recipe_name": job.recipe.name,
        "recipe": job.recipe.to_dict(),
        "layers": rows,
        "bytes": {"float": before, "quantized": after},
        "kernels": kernels.counts(),
        "float_products": products,
        "machine": {"python": platform.python_version(), "onnxruntime": _version("onnxruntime"), "onnx": onnx.__version__},
    }
    report["bits_per_weight"] = round(stored / max(sum(row["parameters"] for row in rows), 1), 3)
    wide = sum(
        _rule(job, y).activations > 8 and not by_name[y.name].quantized
        for y in job.graph.layers
        if y.weight in job.plan and y.name in by_name
    )
    decoded = sum(_rule(job, y).storage == "float" for y in job.graph.layers if y.weight in job.plan)
    ran = (
        f"{decoded}/{len(rows)} layers decoded at load, run in float"
        if decoded
        else (kernels.summary() if job.target.here else _elsewhere(job, kernels, wide))
    )
    ran += f"; {wide}/{len(rows)} layers with 16-bit activations run in float there" if wide else ""
    report["summary"] = (
        f"{ran} | {before / 1e6:.2f} -> {after / 1e6:.2f} MB, {report['bits_per_weight']:.1f} bits per weight"
    )


def _elsewhere(job: Job, kernels: Audit, wide: int) -> str:
    """What is told of a model for another runtime, which onnxruntime may run otherwise; the audit of that is a command.

    wide   layers in float there that the summary tells of anyhow
    """
    planned = {y.name: y.op for y in job.graph.layers if y.weight in job.plan}
    floats = sum(entry.name in planned and not entry.quantized for entry in kernels.layers) - wide
    if floats <= 0:
        return f"{kernels.summary()} in onnxruntime"
    whole, done = Counter(y.op for y in job.graph.layers), Counter(planned.values())
    counts = "; ".join(f"{done[op]}/{n} {op}" for op, n in whole.items())
    return f"{counts} quantized for {job.target.name}; {floats} run in float in onnxruntime"


def _bytes(graph: Graph, given: Path | onnx.ModelProto | None) -> int:
    """Size of the user's own model; of the graph where none was given."""
    if isinstance(given, Path):
        return bytes_on_disk(given)
    if given is not None:
        return runtimes.size_of(given)
    weights: dict[str, Array] = {}
    return int(graph.model(weights).ByteSize()) + sum(w.nbytes for w in weights.values())


def _rule(job: Job, layer: Layer) -> Rule:
    """The rule of the target that a planned layer falls under."""
    key = requests.layer_input(job.graph, job.plan, job.target, layer)
    rule = job.target.rule(layer, job.plan[layer.weight], job.plan[key].bits if key else 0)
    assert rule is not None
    return rule


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
