"""Commands that say what there is: plugins, recipes, costs of kernels, check."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated

import typer
from rich.table import Table

from onnxq_plugins.cli.console import columns, echo, show
from onnxq_plugins.cli.digits import digits_model_path, digits_split
from onnxq_plugins.cli.listed import listed
from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.job import default_of
from onnxq_plugins.plan.constants import ConstantRequest
from onnxq_plugins.plugins import BUILTIN_SOURCE, Plugins, find_plugins
from onnxq_plugins.targets.refusals import choices


def plugins_command(
    name: Annotated[str, typer.Argument(help="a pass or target: shows its documentation", show_default=False)] = "",
    search: Annotated[
        bool, typer.Option("--search", help="list plugins of others, those about NAME if it is given; no network is asked")
    ] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="quantize the quickstart model and show each hook call, with who answered it")
    ] = False,
    recipe: Annotated[str, typer.Option("-r", "--recipe", help="the recipe that --trace runs")] = "int8",
) -> None:
    """List the passes and targets that are installed, or explain one."""
    if search and trace:
        raise OnnxqError("--search lists what could be installed, --trace shows what is; leave one out.")
    if search:
        _search(name, find_plugins())
    elif trace:
        if name:
            raise OnnxqError(f"--trace shows all plugins at work; leave '{name}' out.")
        result = quantize(digits_model_path(), recipe, digits_split()["calibration_images"], trace=echo, check=False)
        echo(f"recipe '{recipe}' on the quickstart model: {result.summary}")
    elif name:
        _explain(name, find_plugins())
    else:
        _list(find_plugins())


def _search(words: str, plugins: Plugins) -> None:
    """Print the entries of the index that match, with what to install."""
    found = [*listed(words)]
    if not found:
        raise OnnxqError(f"no plugin of the index is about '{words}'; onnxq plugins --search lists all.")
    for entry in found:
        echo(f"{entry.name} ({entry.kind}): {entry.about}" + (f" ({entry.paper})" if entry.paper else ""))
        version = plugins.versions.get(entry.package)
        echo(f"  installed: {entry.package} {version}" if version else f"  pip install {entry.install or entry.package}")


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
