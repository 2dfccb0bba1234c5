"""The command that writes a solved plan for other targets: export; and files for several targets at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxq_plugins.cli.console import echo, float_lines, notify
from onnxq_plugins.cli.options import Settings, check_outputs, output_option, recipe_option
from onnxq_plugins.engine import Result
from onnxq_plugins.engine.plans import Solved, is_plan, read_plan
from onnxq_plugins.engine.result import encoded
from onnxq_plugins.engine.targets import Retargeted, for_targets, retarget
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import check_writable, save_model, write_file, writing
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.report.summary import set_size

Plan = Annotated[
    Path,
    typer.Argument(
        metavar="PLAN",
        help="a file that quantize --save-plan wrote; or a QDQ .onnx, to change its format",
        show_default=False,
    ),
]


def export_command(
    plan: Plan,
    *,
    target: Annotated[str, recipe_option("--target", metavar="NAME[,NAME]", show_default=False, help="the runtimes")],
    output: Annotated[
        Path | None,
        output_option(
            "-o", "--output", show_default=False, help="the file, or a folder for several; ./PLAN.TARGET.* by default"
        ),
    ] = None,
    report: Annotated[
        Path | None, output_option("--report", show_default=False, help="what became of the plan, as .json")
    ] = None,
    settings: Settings = None,
) -> None:
    """Write a PLAN for other targets, without samples."""
    names = target_names(target)
    places = target_paths(names, output, plan.stem)
    there = {f"--target {name}": path for name, path in places.items() if path.parent.is_dir() or len(names) == 1}
    check_outputs({**there, "--report": report}, {"plan": plan})
    if len(names) == 1:
        made = {names[0]: retarget(plan, names[0], settings=settings or ())}
    elif is_plan(plan):
        made = for_targets(read_plan(plan), names, settings or ())
    else:
        made = {name: retarget(plan, name, settings=settings or ()) for name in names}
    write_all(made, places)
    for name, one in made.items():
        tell(one, places[name])
    if report is not None:
        write_file(json.dumps(reports(made), indent=2).encode(), report)
        echo(f"report: {report}")


def target_names(text: str) -> list[str]:
    """The targets of ``--target``, one or several with commas between. Raises OnnxqError for one that is named twice."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    OnnxqError.check(f"--target: '{name}' is named twice." for name in {n for n in names if names.count(n) > 1})
    return names


def target_paths(names: Sequence[str], output: Path | None, stem: str) -> dict[str, Path]:
    """Target -> the file to write: `output` for one, files in that folder for several. Raises OnnxqError for targets that
    there are not, and for files that could not be written. A folder that does not exist is made when all is ready."""
    plugins = find_plugins()
    suffixes = {name: plugins.target(name).suffix for name in names}
    if len(names) == 1 and output is not None and not output.is_dir():
        return {names[0]: output}
    folder = output or Path()
    if not folder.is_dir():
        check_writable(folder)
        OnnxqError.check([f"-o '{folder}' is a file; several targets need a folder."] if folder.exists() else [])
    places = {name: folder / f"{stem}.{name}{suffix}" for name, suffix in suffixes.items()}
    for path in places.values() if folder.is_dir() else ():
        check_writable(path)
    return places


def write_all(made: Mapping[str, Result | Retargeted], places: Mapping[str, Path]) -> None:
    """Write one file a target. All are made before the first is written."""
    contents = {
        name: encoded(one.target, one.model) if _own_format(one, places[name]) else None for name, one in made.items()
    }
    for name, one in made.items():
        path, content = places[name], contents[name]
        if not path.parent.is_dir():
            with writing(path):
                path.parent.mkdir()
        if content is None:
            save_model(one.model, path)
        else:
            write_file(content, path)
            set_size(one.report, len(content))


def _own_format(one: Result | Retargeted, path: Path) -> bool:
    return one.target.write is not None and path.suffix != ".onnx"


def tell(one: Retargeted, path: Path) -> None:
    """Print what became of a plan, a line and its notes."""
    for note in one.report.notes:
        notify(f"note: {note}")
    for line in float_lines(one.report.floats):
        notify(line)
    echo(f"{path}: {one.summary} | {one.report['seconds']:.1f} s")


def reports(made: Mapping[str, Retargeted]) -> dict[str, Any]:
    """What became of a plan by target, as plain values."""
    return {name: dict(one.report) for name, one in made.items()}


def other_targets(
    result: Result, names: Sequence[str], places: Mapping[str, Path], plan: Path | None
) -> dict[str, Retargeted]:
    """A result for further targets. Writes the files of all, the first target's included, and the plan.

    places   target -> file; {} if there are no others, and the result is in its file
    plan     the file for the solved plan, if it is wanted
    """
    if not names and plan is None:
        return {}
    solved = Solved.of(result)
    made = for_targets(solved, names)
    if places:
        first = next(iter(places))
        write_all({first: result, **made}, places)
    if plan is not None:
        solved.write(plan)
    result.report["targets"] = {
        name: {"changes": one.report["changes"], "summary": one.summary} for name, one in made.items()
    }
    return made
