"""Commands that say what there is: plugins, recipes, costs of kernels, check."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import onnx
import typer
from rich.table import Table

from onnxq_plugins import runtimes
from onnxq_plugins.cli.console import columns, echo, float_lines, notify, show, track
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.cli.options import CustomOps, DataPath, ImageOptions, Settings, ShapeList, TargetName, read_shapes
from onnxq_plugins.data import model_inputs, open_data
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.export.kernel_times import measured, table
from onnxq_plugins.graph import load
from onnxq_plugins.graph.conform import conform
from onnxq_plugins.graph.reading import read
from onnxq_plugins.job import default_of
from onnxq_plugins.plan import requests
from onnxq_plugins.plan.constants import ConstantRequest
from onnxq_plugins.plugins import BUILTIN_SOURCE, Plugins, find_plugins
from onnxq_plugins.runtimes.costs import read_own, table_of, tables, write_own
from onnxq_plugins.runtimes.examples import Shapes, examples, first_running, written
from onnxq_plugins.runtimes.machine import machine_name
from onnxq_plugins.targets.refusals import choices, problems

_NO_TABLE = "none is of this machine's instruction set: models that run on it are placed by the one that their target names"


def plugins_command(
    name: Annotated[str, typer.Argument(help="a pass or target: shows its documentation", show_default=False)] = "",
    trace: Annotated[
        bool, typer.Option("--trace", help="quantize the quickstart model and show each hook call, with who answered it")
    ] = False,
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="the recipe that --trace runs")] = "int8",
) -> None:
    """List the passes and targets that are installed, or explain one."""
    if trace:
        if name:
            raise OnnxqError(f"--trace shows all plugins at work; leave '{name}' out.")
        result = quantize(digits_model_path(), recipe, digits_split()["calibration_images"], trace=echo, check=False)
        echo(f"recipe '{recipe}' on the quickstart model: {result.summary}")
    elif name:
        _explain(name, find_plugins())
    else:
        _list(find_plugins())


def _explain(name: str, plugins: Plugins) -> None:
    """Print all that is known of a pass or target."""
    if name not in plugins.passes and name not in plugins.targets:
        names = [*sorted(plugins.passes), *sorted(plugins.targets)]
        raise OnnxqError(f"'{name}' is neither a pass nor a target; {known(name, names)}." + plugins.excuse())
    if name in plugins.passes:
        echo(inspect.getdoc(plugins.passes[name]))
        for f in dataclasses.fields(plugins.passes[name]):
            echo(f"  {f.name} = {default_of(f)!r}")
    if name in plugins.targets:
        target = plugins.targets[name]
        echo(f"{target.doc}\nruns:")
        for op in dict.fromkeys(rule.op for rule in target.rules):
            echo(f"  {op}: {choices(target, op)}")


def _list(plugins: Plugins) -> None:
    """Print one line per pass and target, then what is broken."""
    passes = {name: inspect.getdoc(kind) or "" for name, kind in plugins.passes.items()}
    targets = {name: target.doc for name, target in plugins.targets.items()}
    width = max(map(len, (*passes, *targets)))
    for kind, docs in (("pass", passes), ("target", targets)):
        sources = {name: plugins.sources[f"{kind} {name}"] for name in docs}
        echo({"pass": "passes", "target": "\ntargets"}[kind])
        for line in summary_lines(docs, sources, width, columns()):
            echo(line)
    echo("\nonnxq plugins NAME explains one.")
    if plugins.broken:
        echo("\nbroken plugins")
        for name, reason in plugins.broken.items():
            echo(f"  {name}: {reason}")


def summary_lines(docs: Mapping[str, str], sources: Mapping[str, str], width: int, terminal: int | None) -> list[str]:
    """Name, first sentence of the documentation, and the distribution of what is not built in.

    docs       name -> documentation
    sources    name -> distribution
    width      of the column of names
    terminal   its width, which no line exceeds where the name leaves room; None: sentences are whole
    """
    lines = []
    for name, doc in sorted(docs.items()):
        sentence = " ".join(doc.partition("\n\n")[0].split()).split(". ")[0].rstrip(".")
        source = "" if sources[name] == BUILTIN_SOURCE else f" ({sources[name]})"
        if terminal is not None:
            sentence = _shorten(sentence, terminal - width - 4 - len(source))
        lines.append(f"  {name:{width}}  {sentence}{source}".rstrip())
    return lines


def _shorten(text: str, width: int) -> str:
    """The first words of a text that fit a width, with an ellipsis where some do not."""
    if len(text) <= width:
        return text
    words = textwrap.shorten(text, max(width - 4, 1), placeholder="", break_on_hyphens=False, break_long_words=False)
    return f"{words.rstrip(' ,;:-(')} ..." if words else ""


def recipes_command(name: Annotated[str, typer.Argument(help="a recipe: prints it", show_default=False)] = "") -> None:
    """List the recipes, or print one (a start for your own)."""
    recipes = find_plugins().recipes
    if name:
        if name not in recipes:
            raise OnnxqError(f"recipe '{name}' is unknown; {known(name, recipes)}.")
        echo(recipes[name].read_text("utf-8").rstrip())
        return
    table = Table("recipe", "about", box=None, header_style="bold")
    for key, file in recipes.items():
        lines = file.read_text("utf-8").splitlines()
        table.add_row(key, " ".join(line.lstrip("# ") for line in lines if line.startswith("#")))
    show(table)


def check_command(
    recipe: Annotated[str, typer.Argument(help="a built-in recipe or a file", show_default=False)],
    model: Annotated[
        Path | None, typer.Argument(help="also check that the recipe fits this model", show_default=False)
    ] = None,
    *,
    target: TargetName = "",
    settings: Settings = None,
    data: DataPath = "",
    images: ImageOptions,
    shape: ShapeList = None,
    custom_ops: CustomOps = None,
) -> None:
    """Check a recipe, whether it fits a model, and whether the model runs on the first sample, without quantizing."""
    plugins = find_plugins()
    parsed = plugins.recipe(recipe, [*(settings or ()), *([f"target={target}"] if target else [])])
    runtime = plugins.target_of(parsed)
    passes = ", ".join(step.name for step in parsed.passes) or "none"
    echo(f"recipe '{recipe}' is valid: target {parsed.target}, passes: {passes}")
    if model is None:
        return
    graph = conform(load(model, flatten=runtime.flatten), runtime.operators)
    request = requests.request(graph, parsed, runtime)
    OnnxqError.check(problems(runtime, graph, request.plan, request.inputs))
    session = runtimes.session(model, optimize=False)  # raises what onnxruntime has against it
    for line in (*float_lines(request.floats), *constant_lines(request.constants)):
        echo(line)
    planned = sum(layer.weight in request.plan for layer in graph.layers)
    echo(f"it quantizes {planned} of {len(graph.layers)} layers of '{model}'")
    if data or shape:
        _check_feed(read(model), session, data, images, read_shapes(shape))


def _check_feed(
    model: onnx.ModelProto, session: runtimes.Session, data: str, images: ImageOptions, shapes: Shapes | None
) -> None:
    """Say whether a model runs on the first sample, or on random numbers of some shapes."""
    feeds = runtimes.rolled(open_data(data, model_inputs(model), images.data_options()), lambda: session) if data else None
    try:
        feed = first_running(itertools.islice(feeds, 1) if feeds is not None else examples([model], shapes), [session])
    except OnnxqError as error:
        notify(f"note: the model does not run {error}" if feeds is None else f"note: {error}")
    else:
        echo(f"it runs on {written(feed)}")


def costs_command(
    measure: Annotated[
        bool, typer.Option("--measure", help="time kernels on this machine, and keep the table for pass placement")
    ] = False,
    rounds: Annotated[int, typer.Option(help="of --measure: a second or two each", min=2)] = 24,
) -> None:
    """List the tables of what kernels cost, by which pass placement decides, or measure this machine's own."""
    if measure:
        file = write_own(table(measured(rounds, seconds=0.4, track=track)))
        echo(f"measured: {machine_name()}\nkept in '{file}': pass placement uses it from now on")
        return
    own = read_own()
    used = table_of("", here=True)
    for costs in (*tables().values(), *([own] if own is not None else [])):
        echo(f"{'*' if used is not None and costs.name == used.name else ' '} {costs.name}: {costs.source}")
    echo("* used by pass placement for models that run on this machine" if used is not None else _NO_TABLE)
    if own is None:
        echo("onnxq costs --measure makes a table of this machine's own")


def constant_lines(requests: Iterable[ConstantRequest]) -> list[str]:
    """A line for each form that constants outside layers get, and for each reason why some stay float."""
    groups: dict[tuple[str, str], list[ConstantRequest]] = {}
    for each in requests:
        form = f"stored in {each.spec.bits} bits, computed in float" if each.spec is not None else f"{each.reason}"
        groups.setdefault(("stored" if each.spec is not None else "float", form), []).append(each)
    lines = []
    for (kind, form), alike in groups.items():
        names = list(dict.fromkeys(name for each in alike for name, _ in each.constant.readers))
        ops = Counter(op for _, op in dict.fromkeys(reader for each in alike for reader in each.constant.readers))
        counts = ", ".join(f"{n} {op}" for op, n in ops.most_common())
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        size = sum(each.constant.bytes for each in alike) / 1e6
        lines.append(f"{kind}: {counts} ({shown}), {size:.2f} MB of float constants: {form}")
    return lines
