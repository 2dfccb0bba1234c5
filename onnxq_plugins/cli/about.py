"""Commands about what there is: recipes, passes and targets, a new plugin, the quickstart."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from onnxq_plugins import __version__
from onnxq_plugins.cli.console import app, command, float_lines, say, show, track
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.cli.new_plugin import new_plugin
from onnxq_plugins.cli.options import RecipeName, Settings, TargetName
from onnxq_plugins.cli.quickstart import quickstart
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.graph import load
from onnxq_plugins.job import default_of
from onnxq_plugins.plan import requests
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import builtin_recipes
from onnxq_plugins.targets.refusals import choices, problems


@command("plugins")
def plugins_command(
    name: Annotated[str, typer.Argument(help="a pass or target: shows its documentation")] = "",
    trace: Annotated[
        bool, typer.Option("--trace", help=("quantize the quickstart model and show each hook call, with who answered it"))
    ] = False,
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="the recipe that --trace runs")] = "int8",
) -> None:
    """List the passes and targets that are installed, or explain one."""
    if trace:
        if name:
            raise OnnxqError(f"--trace shows all plugins at work; leave '{name}' out.")
        result = quantize(digits_model_path(), recipe, digits_split()["calibration_images"], trace=say)
        say(f"recipe '{recipe}' on the quickstart model: {result.summary}")
        return
    found = find_plugins()
    if name:
        if name not in found.passes and name not in found.targets:
            raise OnnxqError(
                f"'{name}' is neither a pass nor a target; "
                f"{known(name, [*sorted(found.passes), *sorted(found.targets)])}." + found.excuse()
            )
        if name in found.passes:
            say(inspect.getdoc(found.passes[name]))
            for f in dataclasses.fields(found.passes[name]):
                say(f"  {f.name} = {default_of(f)!r}")
        if name in found.targets:
            target = found.targets[name]
            say(f"{target.doc}\nruns:")
            for op in dict.fromkeys(rule.op for rule in target.rules):
                say(f"  {op}: {choices(target, op)}")
        return
    table = Table("kind", "name", "from", "about", box=None, header_style="bold")
    for key, kind in sorted(found.passes.items()):
        about = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
        table.add_row("pass", key, found.sources[f"pass {key}"], escape(about.split(". ")[0].rstrip(".")))
    for key, target in sorted(found.targets.items()):
        table.add_row("target", key, found.sources[f"target {key}"], target.doc)
    for key, why in found.broken.items():
        table.add_row("broken", key, "", why, style="yellow")
    show(table)


@command("new-plugin")
def new_plugin_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="vendor and word, such as acme-clip", show_default=False)],
) -> None:
    """Write a plugin package into ./NAME: a working pass, tests with the conformance kit, README."""
    made = new_plugin(name)
    say(f"{made} has a pass, its tests and a README; next:\n  cd {made}\n  pip install -e '.[test]'\n  pytest")


@command("recipes")
def recipes_command(name: Annotated[str, typer.Argument(help="a recipe: prints it")] = "") -> None:
    """List the built-in recipes, or print one (a start for your own)."""
    recipes = builtin_recipes()
    if name:
        if name not in recipes:
            raise OnnxqError(f"recipe '{name}' is unknown; {known(name, recipes)}.")
        say(recipes[name].read_text("utf-8").rstrip())
        return
    table = Table("recipe", "about", box=None, header_style="bold")
    for key, file in recipes.items():
        lines = file.read_text("utf-8").splitlines()
        table.add_row(key, " ".join(line.lstrip("# ") for line in lines if line.startswith("#")))
    show(table)


@command()
def check(
    recipe: Annotated[str, typer.Argument(help="a built-in recipe or a file")],
    model: Annotated[Path | None, typer.Argument(help="also check that the recipe fits this model")] = None,
    target: TargetName = "",
    set_: Settings = None,
) -> None:
    """Check a recipe, and whether it fits a model, without data and without quantizing."""
    found = find_plugins()
    made = found.recipe(recipe, [*(set_ or ()), *([f"target={target}"] if target else [])])
    chosen = found.target(made.target)
    steps = ", ".join(step.name for step in made.passes) or "none"
    say(f"recipe '{recipe}' is valid: target {made.target}, passes: {steps}")
    if model is not None:
        graph = load(model, flatten=chosen.flatten)
        asked = requests.request(graph, made, chosen)
        OnnxqError.check(problems(chosen, graph, asked.plan, asked.inputs))
        for line in float_lines(asked.floats):
            say(line)
        say(f"it quantizes {sum(y.weight in asked.plan for y in graph.layers)} of {len(graph.layers)} layers of '{model}'")


@command("quickstart")
def quickstart_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the models")] = Path("onnxq-quickstart"),
    recipe: RecipeName = "int8",
) -> None:
    """Quantize a small digits model that comes along, and show what that gives."""
    rows, report = quickstart(output, recipe, track)
    table = Table("model", "accuracy", "SQNR dB", "KB", "ms", box=None, header_style="bold")
    for row in rows:
        table.add_row(
            row.name,
            f"{100 * row.accuracy:.2f}%",
            "-" if row is rows[0] else f"{row.sqnr:.1f}",
            f"{row.size / 1e3:.0f}",
            f"{row.milliseconds:.3f}",
        )
    show(table)
    speed = rows[0].milliseconds / rows[1].milliseconds
    small = ": this model is too small to gain, larger ones do" if speed < 1.2 else ""
    say(f"{rows[1].kernels} | {speed:.2f}x the speed of float{small}")
    if report is not None:
        say(f"layer by layer, with drawings: {report}")
    say(
        f"\n{rows[0].path} and {rows[1].path} are yours to look at. Next, by hand:\n"
        f"  onnxq quantize {rows[0].path} --data {output / 'calibration.npz'} -o my.onnx\n"
        f"  onnxq audit my.onnx --against {rows[0].path}\n"
        f"  onnxq compare {rows[0].path} my.onnx --data {output / 'test.npz'}\n"
        f"  onnxq diagnose {rows[0].path} --data {output / 'calibration.npz'}"
    )


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="show the version and leave")] = False) -> None:
    if version:
        say(f"onnxq-plugins {__version__}")
        raise typer.Exit
