"""The laws of the layout, read off the source: each check passes on the package and fails on a made-up violation."""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import onnxq_plugins
from onnxq_plugins.passes import BUILTIN as PASSES
from onnxq_plugins.targets import BUILTIN as TARGETS

NAME = "onnxq_plugins"
ROOT = Path(onnxq_plugins.__file__).parent
TOP = 14  # modules
LINES, FUNCTION = 450, 60

# Along the data flow: what stands on one line imports from the lines above it alone. A module at the top of the package is a
# room of its own; "" is the package's face.
FLOORS = [
    ["errors", "parallel"],
    ["spec"],
    ["files", "solvers"],
    ["graph"],
    ["data"],
    ["runtimes", "formats"],
    ["targets"],
    ["calibration"],
    ["job"],
    ["recipe", "hookspecs", "plan"],
    ["export"],
    ["measure"],
    ["layers"],
    ["search", "sweep", "granularity"],
    ["passes"],
    ["plugins", "report"],
    ["laws"],
    ["engine"],
    ["selection", "ort", "ir", "edge"],
    [""],
    ["testing"],
    ["cli"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

Sources = Mapping[str, str]  # dotted name of a module -> its text; a package's own text has its name


@functools.cache
def package() -> Sources:
    """The sources of the package."""
    modules = {}
    for file in ROOT.rglob("*.py"):
        parts = (NAME, *file.relative_to(ROOT).with_suffix("").parts)
        modules[".".join(parts).removesuffix(".__init__")] = file.read_text("utf-8")
    return modules


@functools.cache
def tree(text: str) -> ast.Module:
    """The syntax tree of a module, made once for all checks."""
    return ast.parse(text)


@functools.cache
def nodes(text: str) -> tuple[ast.AST, ...]:
    """All nodes of a module."""
    return tuple(ast.walk(tree(text)))


def room(module: str) -> str:
    """The first part of a module's name below the package; "" for the face."""
    return module.partition(".")[2].partition(".")[0]


def imports(sources: Sources, module: str) -> Iterator[tuple[str, str, str]]:
    """(imported module, imported name, name it is bound to) of every import from the package, in functions and for types
    alike; name "" where a whole module is imported."""
    for node in nodes(sources[module]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                target = (whole, "") if whole in sources else (str(node.module), alias.name)
                yield (*target, alias.asname or alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == NAME:
                    yield alias.name, "", alias.asname or alias.name


def functions(sources: Sources) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module, text in sources.items():
        for node in nodes(text):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield module, node


# ---- checks: what breaks a law, one line each -----------------------------------------------------------------------------


def unknown_rooms(sources: Sources) -> list[str]:
    return [f"{module}: no floor for room '{room(module)}'" for module in sources if room(module) not in FLOOR]


def upward_imports(sources: Sources) -> list[str]:
    return [
        f"{module} imports {target}"
        for module in sources
        for target, _, _ in imports(sources, module)
        if room(target) != room(module) and FLOOR.get(room(target), -1) >= FLOOR.get(room(module), -1)
    ]


def circles(sources: Sources) -> list[str]:
    graph = {module: {target for target, _, _ in imports(sources, module)} - {module} for module in sources}
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def stray_graphsurgeon(sources: Sources) -> list[str]:
    found = []
    for module, text in sources.items():
        for node in nodes(text):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.startswith("onnx_graphsurgeon") for name in names) and room(module) != "graph":
                found.append(f"{module}, line {node.lineno}")
    return found


def stray_quantizers(sources: Sources) -> list[str]:
    """Calls that make a node of one of the two operators: it is their first argument that is text."""
    found = []
    for module, text in sources.items():
        for node in nodes(text):
            if isinstance(node, ast.Call) and room(module) != "export":
                texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                if texts and texts[0] in ("QuantizeLinear", "DequantizeLinear"):
                    found.append(f"{module}, line {node.lineno}")
    return found


def long_files(sources: Sources) -> list[str]:
    return [f"{module}: {n} lines" for module, text in sources.items() if (n := text.count("\n")) > LINES]


def long_functions(sources: Sources) -> list[str]:
    sizes = ((module, f.name, (f.end_lineno or 0) - f.lineno + 1) for module, f in functions(sources))
    return [f"{module}.{name}: {size} lines" for module, name, size in sizes if size > FUNCTION]


def borrowed_private_names(sources: Sources) -> list[str]:
    """Names with an underscore from another room: imported, or looked up in a module that was imported."""
    found = []
    for module, text in sources.items():
        modules = {}
        for target, name, bound in imports(sources, module):
            if room(target) != room(module):
                modules |= {} if name else {bound: target}
                found += [f"{module} imports {target}.{name}"] if name.startswith("_") and not name.endswith("__") else []
        for node in nodes(text):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                private = node.attr.startswith("_") and not node.attr.endswith("__")
                found += [f"{module} uses {modules[node.value.id]}.{node.attr}"] if private else []
    return found


def crowded_top(sources: Sources) -> list[str]:
    packages = {module.rpartition(".")[0] for module in sources}
    top = [module for module in sources if module.count(".") <= 1 and (module == NAME or module not in packages)]
    return [f"{len(top)} modules: {', '.join(sorted(top))}"] if len(top) > TOP else []


def unlisted_public_names(sources: Sources) -> list[str]:
    """Names that the package's face binds beside those in its `__all__`, or the other way round."""
    bound: set[str] = set()
    listed: list[str] = []
    for node in tree(sources[NAME]).body:
        if isinstance(node, (ast.ImportFrom, ast.Import)):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            bound |= {name for name in names if not name.startswith("__")}
            listed = list(ast.literal_eval(node.value)) if names == ["__all__"] else listed
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
    public = {name for name in bound if not name.startswith("_")}
    twice = {name for name in listed if listed.count(name) > 1}
    return sorted(public ^ set(listed) | twice)


def decisions_by_name(sources: Sources) -> list[str]:
    """Comparisons with the name of a built-in pass or target: guests are believed as built-ins are."""
    builtin = {step.name for step in PASSES} | {target.name for target in TARGETS}
    found = []
    for module, text in sources.items():
        for node in nodes(text):
            if isinstance(node, ast.Compare):
                sides = ast.dump(node.left), *map(ast.dump, node.comparators)
                named = any("attr='name'" in side or "Constant(value='use')" in side for side in sides)
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                if named and constants & builtin:
                    found.append(f"{module}, line {node.lineno}: {sorted(constants & builtin)}")
    return found


LONG = "def f():\n" + "    pass\n" * FUNCTION
VIOLATIONS: dict[Callable[[Sources], list[str]], Sources] = {
    unknown_rooms: {f"{NAME}.cellar.wine": ""},
    upward_imports: {f"{NAME}.graph.core": f"def f():\n    from {NAME}.cli import main\n", f"{NAME}.cli": "main = 1\n"},
    circles: {
        f"{NAME}.plan.a": f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {NAME}.plan.b import B\n",
        f"{NAME}.plan.b": f"from {NAME}.plan import a\nclass B: ...\n",
    },
    stray_graphsurgeon: {f"{NAME}.passes.round": "import onnx_graphsurgeon as gs\n"},
    stray_quantizers: {f"{NAME}.passes.round": "helper.make_node('QuantizeLinear', ['x', 's'], ['y'])\n"},
    long_files: {f"{NAME}.spec": "\n" * (LINES + 1)},
    long_functions: {f"{NAME}.spec": LONG},
    borrowed_private_names: {f"{NAME}.passes.round": f"from {NAME}.spec import _encoded\n", f"{NAME}.spec": ""},
    crowded_top: {f"{NAME}.m{n}": "" for n in range(TOP + 1)},
    unlisted_public_names: {NAME: f"from {NAME}.spec import Plan, QuantSpec\n__all__ = ['Plan']\n"},
    decisions_by_name: {
        f"{NAME}.search.trial": "corrects = any(step.name in ('bias-correct', 'round') for step in steps)\n"
    },
}


@pytest.mark.parametrize("check", VIOLATIONS, ids=lambda check: check.__name__)
def test_the_package_obeys(check):
    assert not check(package())


@pytest.mark.parametrize("check", VIOLATIONS, ids=lambda check: check.__name__)
def test_a_violation_is_seen(check):
    assert check(VIOLATIONS[check])


def test_a_private_name_of_a_module_is_seen():
    sources = {f"{NAME}.passes.round": f"from {NAME} import spec\nspec._encoded(1)\n", f"{NAME}.spec": ""}
    assert borrowed_private_names(sources)


def test_every_room_has_a_docstring_that_says_what_it_is_for():
    assert all(ast.get_docstring(tree(text)) for module, text in package().items() if module.count(".") <= 1)


def test_tests_mirror_the_rooms():
    rooms = {room(module) for module in package() if module.count(".") > 1}
    folders = {file.parent.name for file in Path(__file__).parent.glob("*/test_*.py")}
    assert folders <= rooms
