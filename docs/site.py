"""Pages that are generated when the site is built: one per pass, from its docstring and its measurements; README,
CHANGELOG and CONTRIBUTING from the parent folder. A hook of mkdocs."""

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
    passes = find_plugins().passes
    texts = {f"passes/{name}.md": pass_page(name, kind) for name, kind in passes.items()}
    rows = [f"| [{name}]({name}.md) | {first_sentence(kind)} |" for name, kind in sorted(passes.items())]
    texts["passes/index.md"] = "\n".join(
        [
            "# Passes",
            "",
            "Each pass is one published algorithm; a recipe says which ones run, and in which order.",
            "",
            "| pass | what it does |",
            "|---|---|",
            *rows,
        ]
    )
    links = {"docs/": "", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    texts["index.md"] = relinked(ROOT / "README.md", links)
    texts["changelog.md"] = relinked(ROOT / "CHANGELOG.md", {"docs/": ""})
    texts["contributing.md"] = relinked(ROOT / "CONTRIBUTING.md", {"docs/": ""})
    return texts


def pass_page(name: str, kind: type) -> str:
    """What a pass does, its parameters, the recipes and guides that use it, its measurements."""
    sections = re.split(r"\n\s*\n", inspect.getdoc(kind) or "")
    parameters = {f.name: f for f in dataclasses.fields(kind)}
    descriptions: dict[str, str] = {}
    body = []
    for section in sections:
        described = parameter_list(section, set(parameters))
        descriptions |= described
        if not described:
            body.append(markdown(section))
    hints = typing.get_type_hints(kind)
    rows = [
        f"| `{key}` | {type_name(hints[key])} | `{default_of(f)!r}` | {descriptions.get(key, '')} |"
        for key, f in parameters.items()
    ]
    recipes = [f"`{recipe}`" for recipe, file in builtin_recipes().items() if f'use = "{name}"' in file.read_text("utf-8")]
    mention = re.compile(rf"`{re.escape(name)}[`.]|use = \"{name}\"")
    guides = [f"[{title(page)}](../{page.name})" for page in GUIDES if mention.search(page.read_text("utf-8"))]
    exact = "stays the same (`--verify` checks it)" if getattr(kind, "exact", True) else "changes; the report shows it"
    parts = [f"# {name}", *body, f"The float function {exact}."]
    if rows:
        parts += ["## Parameters", "\n".join(["| parameter | type | default | |", "|---|---|---|---|", *rows])]
    parts.append('## In a recipe\n\n```toml\n[[pass]]\nuse = "' + name + '"\n```')
    if recipes:
        parts.append(f"Built-in recipes with it: {', '.join(recipes)}.")
    if guides:
        parts.append(f"When to use it, and when not: {', '.join(guides)}.")
    if tables := measured(name):
        parts += ["## Measured", *tables]
    return "\n\n".join(parts) + "\n"


def measured(name: str) -> list[str]:
    """The tables about a pass in the guides, each after the command that made it. They are marked by a comment before the
    table, ``measured: passes; command; rows: pattern``; without a pattern, all rows are taken."""
    table = re.compile(r"^<!-- measured: (.+?); (.+?)(?:; rows: (.+))? -->\n\n((?:\|.*\n)+)", re.MULTILINE)
    parts, last = [], ""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for names, command, pattern, text in table.findall(page.read_text("utf-8")):
            if name in names.split(", "):
                head, rule, *rows = text.splitlines()
                rows = [row for row in rows if re.search(pattern, row)]
                source = f"`{command}`; the full results, and the machine, are in [{title(page)}](../{page.name})."
                parts += [source] * (source != last) + ["\n".join([head, rule, *rows])]
                last = source
    return parts


def type_name(hint: Any) -> str:
    """A type in the terms of recipes."""
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    return f"`{hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else hint}`".replace("|", "\\|")


def parameter_list(section: str, names: set[str]) -> dict[str, str]:
    """Name -> text, from a section that lists parameters (a name, two spaces or more, its text); else empty."""
    texts: dict[str, str] = {}
    last: list[str] = []
    for line in section.splitlines():
        start = re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*)(?:\s{2,}(\S.*))?$", line)
        if start and set(start[1].split(", ")) <= names:
            last = start[1].split(", ")
            texts |= dict.fromkeys(last, start[2] or "")
        elif texts and line.startswith("  "):
            texts |= {key: f"{texts[key]} {line.strip()}".strip() for key in last}
        else:
            return {}
    return {key: markdown(text).replace("|", "\\|") for key, text in texts.items()}


def markdown(text: str) -> str:
    """A section of a docstring as Markdown: double backticks become single ones, indented formulas code blocks."""
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


def relinked(page: Path, links: dict[str, str]) -> str:
    """A page of the parent folder, with links relative to docs/."""
    text = page.read_text("utf-8")
    for old, new in links.items():
        text = text.replace(f"]({old}", f"]({new}")
    return text
