"""Pages of the site that are made when it is built: one per pass from its docstring and what was measured of it,
README, CHANGELOG and CONTRIBUTING from the folder above. A hook of mkdocs."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Any

from onnxq_plugins.job import default_of
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import builtin_recipes

ROOT = Path(__file__).parent.parent
GUIDES = sorted(
    page
    for page in (ROOT / "docs").glob("*.md")
    if page.stem
    not in ("design", "benchmarks", "pipelines", "write-a-plugin", "recipes", "report", "troubleshooting", "tutorial")
)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    """Path -> Markdown of each generated page."""
    found = find_plugins()
    made = {f"passes/{name}.md": pass_page(name, kind) for name, kind in found.passes.items()}
    rows = [f"| [{name}]({name}.md) | {first_sentence(kind)} |" for name, kind in sorted(found.passes.items())]
    made["passes/index.md"] = "\n".join(
        [
            "# Passes",
            "",
            "One published algorithm each; a recipe says which run, in which order.",
            "",
            "| pass | what it does |",
            "|---|---|",
            *rows,
        ]
    )
    above = {"docs/": "", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    made["index.md"] = moved(ROOT / "README.md", above)
    made["changelog.md"] = moved(ROOT / "CHANGELOG.md", {"docs/": ""})
    made["contributing.md"] = moved(ROOT / "CONTRIBUTING.md", {"docs/": ""})
    return made


def pass_page(name: str, kind: type) -> str:
    """What a pass does, its parameters, and where it is used and measured."""
    sections = re.split(r"\n\s*\n", inspect.getdoc(kind) or "")
    parameters = {f.name: f for f in dataclasses.fields(kind)}
    told: dict[str, str] = {}
    body = []
    for section in sections:
        mine = parameter_list(section, set(parameters))
        told |= mine
        if not mine:
            body.append(markdown(section))
    hints = typing.get_type_hints(kind)
    rows = [
        f"| `{key}` | {type_name(hints[key])} | `{default_of(f)!r}` | {told.get(key, '')} |" for key, f in parameters.items()
    ]
    used = [f"`{recipe}`" for recipe, file in builtin_recipes().items() if f'use = "{name}"' in file.read_text("utf-8")]
    named = re.compile(rf"`{re.escape(name)}[`.]|use = \"{name}\"")
    guides = [f"[{title(page)}](../{page.name})" for page in GUIDES if named.search(page.read_text("utf-8"))]
    exact = "stays as it is (`--verify` checks it)" if getattr(kind, "exact", True) else "changes; the report shows it"
    parts = [f"# {name}", *body, f"The float function {exact}."]
    if rows:
        parts += ["## Parameters", "\n".join(["| parameter | type | default | |", "|---|---|---|---|", *rows])]
    parts.append('## In a recipe\n\n```toml\n[[pass]]\nuse = "' + name + '"\n```')
    if used:
        parts.append(f"Built-in recipes with it: {', '.join(used)}.")
    if guides:
        parts.append(f"When to use it, and when not: {', '.join(guides)}.")
    found = measured(name)
    if found:
        parts += ["## Measured", *found]
    return "\n\n".join(parts) + "\n"


def measured(name: str) -> list[str]:
    """The tables about a pass that the guides hold, each behind the command that made it. A comment in front of a table,
    ``measured: passes; command; rows: pattern``, says which; without a pattern all rows are meant."""
    table = re.compile(r"^<!-- measured: (.+?); (.+?)(?:; rows: (.+))? -->\n\n((?:\|.*\n)+)", re.MULTILINE)
    parts, last = [], ""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for names, command, pattern, text in table.findall(page.read_text("utf-8")):
            if name in names.split(", "):
                head, rule, *rows = text.splitlines()
                rows = [row for row in rows if re.search(pattern, row)]
                source = f"`{command}`; all of it, and on which machine: [{title(page)}](../{page.name})."
                parts += [source] * (source != last) + ["\n".join([head, rule, *rows])]
                last = source
    return parts


def type_name(hint: Any) -> str:
    """A type as a reader of recipes sees it."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    return f"`{hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint}`".replace("|", "\\|")


def parameter_list(section: str, names: set[str]) -> dict[str, str]:
    """Name -> text of a section that lists parameters: a name, two spaces or more, its text; empty if it does not."""
    found: dict[str, str] = {}
    last: list[str] = []
    for line in section.splitlines():
        start = re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*)(?:\s{2,}(\S.*))?$", line)
        if start and set(start[1].split(", ")) <= names:
            last = start[1].split(", ")
            found |= dict.fromkeys(last, start[2] or "")
        elif found and line.startswith("  "):
            found |= {key: f"{found[key]} {line.strip()}".strip() for key in last}
        else:
            return {}
    return {key: markdown(text).replace("|", "\\|") for key, text in found.items()}


def markdown(text: str) -> str:
    """A part of a docstring as Markdown: double backticks become single ones, indented formulas stay blocks."""
    lines = text.splitlines()
    if all(line.startswith("    ") for line in lines):
        return "```text\n" + inspect.cleandoc(text) + "\n```"
    return re.sub(r"^(Source|Cost):", r"**\1:**", text.replace("``", "`"), flags=re.MULTILINE)


def first_sentence(kind: type) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s", text)[0].rstrip(":.").replace("``", "`").replace("|", "\\|") + "."


def title(page: Path) -> str:
    """The heading of a page."""
    return page.read_text("utf-8").partition("\n")[0].lstrip("# ")


def moved(page: Path, links: dict[str, str]) -> str:
    """A page of the folder above, its links seen from docs/."""
    text = page.read_text("utf-8")
    for old, new in links.items():
        text = text.replace(f"]({old}", f"]({new}")
    return text
