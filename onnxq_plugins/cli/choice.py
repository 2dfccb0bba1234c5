"""The command that finds a recipe: auto."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.markup import escape
from rich.table import Table

from onnxq_plugins.cli.console import echo, err, fail, notify, show, track
from onnxq_plugins.cli.options import (
    ClassAxis,
    DataPath,
    Float32,
    ImageOptions,
    Labels,
    MetricName,
    Model,
    OptionGroup,
    Seed,
    TargetName,
    WorkOptions,
    check_outputs,
    output_option,
    recipe_option,
    search_option,
)
from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.files import write_file
from onnxq_plugins.measure import IDENTICAL
from onnxq_plugins.recipe import to_toml
from onnxq_plugins.report.candidates import Candidate, Prefer
from onnxq_plugins.selection import MAX_DROP, MIN_SQNR, RECIPES, AutoResult, auto


@dataclass(frozen=True)
class ChoiceOptions(OptionGroup):
    """What `auto` keeps, and where it goes."""

    output: Annotated[
        Path | None, output_option("-o", "--output", show_default=False, help="the model; ./MODEL.auto.onnx by default")
    ] = None
    save_recipe: Annotated[
        Path | None, output_option("--save-recipe", metavar="R.TOML", show_default=False, help="the recipe that was kept")
    ] = None
    max_drop: Annotated[
        float | None,
        search_option(show_default=f"{MAX_DROP:g}", help="how far the metric may fall, mostly in percent of samples"),
    ] = None
    min_sqnr: Annotated[
        float | None,
        search_option(show_default=f"{MIN_SQNR:g}", help="dB of the worst output where no output is classes"),
    ] = None
    prefer: Annotated[str, search_option(help="speed, size or accuracy")] = "speed"
    attempts: Annotated[
        int, search_option("--try", help="remedies to try where no recipe is good enough, as diagnose suggests them")
    ] = 4
    test: Annotated[
        str,
        search_option(metavar="PATH", show_default=False, help="samples to judge by; every second one of --data by default"),
    ] = ""

    def path(self, model: Path, data: str) -> Path:
        """Of the model that is kept. Raises OnnxqError for options that make no sense."""
        path = self.output or Path(f"{model.stem}.auto.onnx")
        inputs = {"model": model, "data": Path(data), "test": Path(self.test) if self.test else None}
        check_outputs({"-o": path, "--save-recipe": self.save_recipe}, inputs)
        if self.attempts < 0:
            raise OnnxqError("--try must not be negative.")
        return path

    @property
    def preferred(self) -> Prefer:
        """What --prefer says. Raises OnnxqError for what is unknown."""
        found = next((kind for kind in RECIPES if kind == self.prefer), None)
        if found is None:
            raise OnnxqError(f"--prefer {self.prefer} is unknown; {known(self.prefer, RECIPES)}.")
        return found


def auto_command(
    model: Model,
    *,
    data: DataPath,
    labels: Labels = None,
    images: ImageOptions,
    recipes: Annotated[
        list[str] | None,
        recipe_option(
            "-r", "--recipe", metavar="RECIPE", show_default=False, help="try this instead of the built-in ones; repeatable"
        ),
    ] = None,
    target: TargetName = "",
    seed: Seed = None,
    float32: Float32 = False,
    choice: ChoiceOptions,
    metric: MetricName = "",
    class_axis: ClassAxis = None,
    work: WorkOptions,
) -> None:
    """Try recipes on MODEL from cheap to costly, measure each, and keep the best within a drop of accuracy; or the float
    model, where none is better."""
    path = choice.path(model, data)
    width = max(len(name) for name in recipes or RECIPES[choice.preferred])
    outcome = auto(
        model,
        data,
        max_drop=choice.max_drop,
        min_sqnr=choice.min_sqnr,
        prefer=choice.preferred,
        test=choice.test or None,
        labels=labels,
        metric=metric or None,
        class_axis=class_axis,
        recipes=recipes or (),
        attempts=choice.attempts,
        target=target or None,
        seed=seed or 0,
        workers=work.workers or None,
        cache=work.cache,
        float32=float32,
        options=images.data_options(),
        track=track,
        tell=lambda trial: _show_progress(trial, width),
    )
    outcome.save(path)
    if choice.save_recipe is not None:
        write_file(f"{to_toml(outcome.result.recipe.to_dict())}\n".encode(), choice.save_recipe)
    _show_trials(outcome)
    echo(f"{path}: {outcome.summary}")
    if not outcome.met:
        drop, sqnr = choice.max_drop, choice.min_sqnr
        fail(OnnxqError(_miss(outcome, MAX_DROP if drop is None else drop, MIN_SQNR if sqnr is None else sqnr)), 1)


def _miss(outcome: AutoResult, max_drop: float, min_sqnr: float) -> str:
    """A sentence on why no model is good enough."""
    if outcome.metric == "sqnr":
        return (
            f"no recipe stays at {min_sqnr:g} dB or more; the best, with {outcome.best.sqnr:.1f} dB at the worst output, "
            "was written: lower --min-sqnr, or look at onnxq diagnose."
        )
    if outcome.best.drop <= max_drop:
        return (
            f"no recipe stays within a drop of {max_drop:g} and keeps each output; the best, with {outcome.best.sqnr:.1f} "
            "dB at the worst output, was written: name a --metric if that output does not matter, or look at onnxq diagnose."
        )
    return (
        f"no recipe stays within a drop of {max_drop:g}; the most accurate one was written. Raise --max-drop, or look at "
        "onnxq diagnose."
    )


def _show_progress(trial: Candidate, width: int) -> None:
    """Print a trial in a line, on a terminal, as soon as it is judged; the table at the end holds the same and its speed."""
    if not err.is_terminal:
        return
    drop, sqnr, size, _, seconds = _cells(trial)
    numbers = f"drop {drop}, {sqnr} dB, {size}, {seconds} s"
    notify(f"{trial.recipe:{width}}  {f'not possible: {trial.why}' if trial.why else numbers}")


def _show_trials(outcome: AutoResult) -> None:
    """Print the float model and all trials as a table, how to read it, and notes."""
    table = Table("recipe", "drop", "SQNR dB", "size", "x float", "seconds", "", box=None, header_style="bold")
    for trial in (outcome.unchanged, *outcome.trials):
        best = trial is outcome.best
        cells = ["-"] * 5 if trial.why else _cells(trial)
        last = "kept" if best else "not possible" if trial.why else trial.rejected
        table.add_row(escape(trial.recipe), *cells, escape(last), style="bold" if best else None)
    show(table)
    better = " (below 0: better than float on these samples)" if any(trial.drop < 0 for trial in outcome.trials) else ""
    judged = f"drop{better} is of {outcome.metric} (float: {outcome.reference:.2f})"
    judged = "SQNR, of the worst output, is what counts, and drop what is missing" if outcome.metric == "sqnr" else judged
    echo(f"{judged}; x float is the speed in onnxruntime, one sample, 1 thread, all in turn")
    for note in outcome.notes:
        notify(f"note: {note}")
    for trial in outcome.trials:
        if trial.why:
            notify(f"note: recipe '{trial.recipe}' is not possible: {trial.why}")
    if outcome.reason:
        echo(outcome.reason)


def _cells(trial: Candidate) -> list[str]:
    """Drop, SQNR, size, speed and seconds as text."""
    size = f"{trial.size / 1e6:.2f} MB" if trial.size >= 1e6 else f"{trial.size / 1e3:.0f} kB"
    sqnr = "exact" if trial.sqnr >= IDENTICAL else f"{trial.sqnr:.1f}"
    return [
        f"{trial.drop:.2f}",
        sqnr,
        size,
        f"{trial.speed:.2f}" if trial.speed else "-",
        f"{trial.seconds:.1f}" if trial.seconds else "-",
    ]
