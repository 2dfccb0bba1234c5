"""Recipes as text: TOML files that say what to quantize, how, and with which passes, read into validated values and back."""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.job import FLOAT, LayerRule, Pass, Recipe, Stage, TensorRequest

_SECTIONS = ("weights", "activations", "data", "quality")
_KEYS = ("recipe", "target", "exclude", *_SECTIONS, "pass", "layer")
Settings = Iterable[str | Mapping[str, Any]] | Mapping[str, Any]  # or one str, which is an iterable of them


def recipe_folder() -> Path:
    """The folder of the built-in recipes: in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def builtin_recipes() -> dict[str, Path]:
    """Name -> file of the built-in recipes."""
    return {file.stem: file for file in sorted(recipe_folder().glob("*.toml"))}


def load_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    passes: Mapping[str, type[Pass]],
    settings: Settings = (),
    recipes: Mapping[str, Path] | None = None,
) -> Recipe:
    """Make a Recipe.

    recipe     name of a built-in, path of a .toml or .json file, mapping with the same tables, or Recipe; with ``extends``
             it changes another one, see `_extended`
    passes     the known passes by name
    settings   changes such as ``ranges.method=mse`` or ``weights.bits=4``, where the right side is a TOML value or a word;
               or mappings such as {"weights.bits": 4}
    recipes    files of recipes by name; None: the built-in ones

    Raises OnnxqError with all problems at once.
    """
    files = builtin_recipes() if recipes is None else recipes
    if isinstance(recipe, Recipe):
        table, where, name = recipe.to_dict(), "the recipe", recipe.name
    elif isinstance(recipe, Mapping):
        table, where, name = dict(recipe), "the recipe", ""
    elif isinstance(recipe, (str, os.PathLike)):
        table, where = _read(recipe, files)
        name = str(recipe) if str(recipe) in files else Path(recipe).stem
    else:
        raise OnnxqError(
            f"an object of type {type(recipe).__name__} is no recipe; give the name of a built-in, the path of a "
            ".toml or .json file, a mapping with its tables, or a Recipe."
        )
    problems: list[str] = []
    table = _extended(table, where, passes, files, problems)
    settings = texts(settings, problems)
    for setting in settings:
        apply_setting(table, setting, problems)
    where += f" (with {', '.join(settings)})" * bool(settings)
    return parse(table, passes, where, name, problems)


def parse(
    table: Mapping[str, Any],
    passes: Mapping[str, type[Pass]],
    where: str = "the recipe",
    name: str = "",
    problems: list[str] | None = None,
) -> Recipe:
    """The tables of a recipe as a Recipe. Raises OnnxqError with all problems at once."""
    problems = [] if problems is None else problems
    _unknown(table, _KEYS, where, problems)
    if table.get("recipe", 1) != 1:
        problems.append(f"{where}: recipe = {table['recipe']!r} is a version this release does not know; use 1.")
    steps, rules = _passes(table, passes, where, problems), _rules(table, where, problems)
    requests: dict[str, Any] = {}
    for key in _SECTIONS:
        values = table.get(key, {})
        if isinstance(values, Mapping):
            requests[key] = _build(getattr(Recipe, key), values, f"{where}, [{key}]", problems)
        else:
            problems.append(f"{where}: {key} must be a table.")
    target, vendors = _target(table.get("target", Recipe.target), where, problems)
    exclude = _fit(table.get("exclude", []), tuple[str, ...])
    if exclude is _WRONG:
        problems.append(f"{where}: exclude = {table['exclude']!r} must be a list of names of operators.")
    for key in ("weights", "activations"):
        _check_request(requests.get(key), f"{where}, [{key}]", problems)
    OnnxqError.check(problems)
    more: dict[str, Any] = {"vendors": vendors, "exclude": exclude, **requests}
    return Recipe(target, passes=tuple(steps), layers=tuple(rules), name=name, **more)


def to_toml(recipe: Mapping[str, Any]) -> str:
    """A recipe's plain values as a TOML file, to which blocks of `to_block` can be appended."""
    tables = {key: value for key, value in recipe.items() if key not in ("pass", "layer")}
    blocks = [to_block(title, values) for title in ("pass", "layer") for values in recipe.get(title, ())]
    return "\n".join([tomli_w.dumps(tables), *(f"{block}\n" for block in blocks)])


def to_block(title: str, values: Mapping[str, Any]) -> str:
    """One ``[[pass]]`` or ``[[layer]]`` block of a recipe's file; tables in it as dotted keys."""
    lines = [f"[[{title}]]"]
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{_key(key)}.{_key(name)} = {_literal(inner)}" for name, inner in value.items()]
        else:
            lines.append(f"{_key(key)} = {_literal(value)}")
    return "\n".join(lines)


def _key(name: str) -> str:
    """A TOML key, in quotes if it needs them."""
    return tomli_w.dumps({name: 0}).removesuffix(" = 0\n")


def _literal(value: Any) -> str:
    """A value in TOML, lists on one line, which tomli_w cannot do."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    return "{}" if value == {} else tomli_w.dumps({"value": value}).removeprefix("value = ").rstrip("\n")


# ---- details --------------------------------------------------------------------------------------------------------------


def _target(value: Any, where: str, problems: list[str]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The target's name, and settings by vendor: a text, or a table with both."""
    table = dict(value) if isinstance(value, Mapping) else {"use": value}
    name = table.pop("use", Recipe.target)
    if not isinstance(name, str):
        problems.append(f"{where}: target must be a name.")
    if wrong := [key for key, values in table.items() if not isinstance(values, Mapping)]:
        problems.append(
            f"{where}, [target]: '{wrong[0]}' must be a table of settings by vendor, such as [target.acme] with soc = 3; "
            'the name of the target is use = "acme.npu".'
        )
    return str(name), {str(key): dict(values) for key, values in table.items() if isinstance(values, Mapping)}


def _passes(table: Mapping[str, Any], passes: Mapping[str, type[Pass]], where: str, problems: list[str]) -> list[Pass]:
    """The passes of the [[pass]] tables; `problems` gets what is wrong with the others."""
    steps = []
    for number, values in enumerate(_tables(table, "pass", where, problems), 1):
        kind = passes.get(str(values.get("use", "")))
        if "use" not in values:
            problems.append(f'{where}, pass {number}: write use = "NAME"; known: {", ".join(sorted(passes))}.')
        elif kind is None:
            problems.append(
                f"{where}, pass {number}: {values['use']!r} is not a known pass; "
                f"{known(str(values['use']), sorted(passes))}. Is its package installed?"
            )
        else:
            settings = {key: value for key, value in values.items() if key != "use"}
            step = _build(kind, settings, f"{where}, pass '{kind.name}'", problems)
            steps += [step] if step is not None else []
    return steps


def _rules(table: Mapping[str, Any], where: str, problems: list[str]) -> list[LayerRule]:
    """The rules of the [[layer]] tables; `problems` gets what is wrong with the others."""
    rules = []
    for number, values in enumerate(_tables(table, "layer", where, problems), 1):
        place = f"{where}, layer {number}"
        for key in ("weights", "activations"):
            if isinstance(values.get(key), Mapping):
                request = _build(TensorRequest, values[key], f"{place}, {key}", problems)
                _check_request(request, f"{place}, {key}", problems)
        rule = _build(LayerRule, values, place, problems)
        rules += [rule] if rule is not None else []
    return rules


def _extended(
    table: dict[str, Any],
    where: str,
    passes: Mapping[str, type[Pass]],
    files: Mapping[str, Path],
    problems: list[str],
    seen: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The tables of a recipe with those of the one that it extends. Keys of tables, and parameters of passes that both have,
    are its own; its other passes go behind the last one of their stage or an earlier one; its rules go behind the others."""
    base, without = table.get("extends"), _fit(table.get("without", []), tuple[str, ...])
    own = {key: value for key, value in table.items() if key not in ("extends", "without")}
    if without is _WRONG:
        problems.append(f"{where}: without = {table['without']!r} must be a list of names of passes.")
        return own
    if base is None:
        problems += [f"{where}: without = {list(without)} says nothing where no recipe is extended."] if without else []
        return own
    if not isinstance(base, str) or base in seen:
        other = " that does not extend it" * bool(seen)
        problems.append(f"{where}: extends = {base!r} must be a built-in recipe or a file{other}.")
        return own
    under, place = _read(base, files)
    under = _extended(under, place, passes, files, problems, (*seen, base))
    steps = [dict(step) for step in _tables(under, "pass", place, problems)]
    names = [str(step.get("use")) for step in steps]
    steps = [step for step in steps if step.get("use") not in without]
    unknown = [name for name in without if name not in names]
    problems += [f"{where}: without names '{n}', which {place} does not have; {known(n, names)}." for n in unknown]
    for values in _tables(own, "pass", where, problems):
        same = [step for step in steps if step.get("use") == values.get("use")]
        for step in same:
            step.update(values)
        if not same:
            steps.insert(_place(steps, values, passes), dict(values))
    merged = {**under, **own, "pass": steps}
    for key in ("weights", "activations", "data", "quality", "layer", "exclude"):
        first, second = under.get(key), own.get(key)
        if isinstance(first, dict) and isinstance(second, Mapping):
            merged[key] = {**first, **second}
        elif isinstance(first, list) and isinstance(second, (list, tuple)):
            merged[key] = [*first, *second]
    return merged


def _place(steps: list[dict[str, Any]], values: Mapping[str, Any], passes: Mapping[str, type[Pass]]) -> int:
    """Where a pass goes among others: behind the last one of its stage or an earlier one."""
    stages = get_args(Stage)
    at = [stages.index(passes[use].stage) if (use := str(s.get("use"))) in passes else 0 for s in (*steps, values)]
    return max((n + 1 for n, stage in enumerate(at[:-1]) if stage <= at[-1]), default=0)


def _read(recipe: str | os.PathLike[str], builtin: Mapping[str, Path]) -> tuple[dict[str, Any], str]:
    path = Path(recipe)
    if str(recipe) in builtin:
        path = builtin[str(recipe)]
    elif not path.is_file():
        raise OnnxqError(f"recipe '{recipe}' is neither a built-in nor a file; {known(str(recipe), builtin)}.")
    try:
        text = path.read_text("utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:  # TOMLDecodeError, JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise OnnxqError(f"recipe '{recipe}' cannot be read: {error}.") from error
    if not isinstance(table, dict):
        raise OnnxqError(f"recipe '{recipe}' must hold tables, it holds a {type(table).__name__}.")
    return table, f"recipe '{recipe}'"


def texts(settings: Settings, problems: list[str]) -> list[str]:
    """Settings as texts, one each."""
    texts = []
    for setting in [settings] if isinstance(settings, (str, Mapping)) else settings:
        try:
            pairs = setting.items() if isinstance(setting, Mapping) else ()
            texts += [setting] if isinstance(setting, str) else [f"{key}={_literal(value)}" for key, value in pairs]
        except TypeError as error:  # what TOML does not have
            problems.append(f"setting {setting!r} has a value that a recipe cannot hold ({error}).")
        if not isinstance(setting, (str, Mapping)):
            problems.append(f"setting {setting!r} must be text such as 'weights.bits=4', or a mapping from key to value.")
    return texts


def apply_setting(table: dict[str, Any], setting: str, problems: list[str]) -> None:
    """One ``--set name.key=value``: of a table, or of every pass of that name."""
    left, equals, right = setting.partition("=")
    name, dot, key = left.strip().rpartition(".")
    if not equals or not key or (not dot and key != "target"):
        there = [f"{table}.{f.name}" for table in _SECTIONS for f in fields(getattr(Recipe, table))]
        meant = [one for one in there if one.rpartition(".")[2] == left.strip()]
        meant = meant or difflib.get_close_matches(left.strip(), ["target", *there], 1)
        near = f"; did you mean {' or '.join(meant)}?" if meant and equals else "."
        problems.append(f"--set '{setting}' must look like pass.key=value, weights.bits=4 or target=NAME{near}")
        return
    try:
        value = tomllib.loads(f"v = {right}")["v"]
    except tomllib.TOMLDecodeError:
        value = right.strip()
    if not dot:  # the target
        settings = table.get(key)
        table[key] = {**settings, "use": value} if isinstance(settings, dict) else value
    elif name.startswith("target."):
        chosen = table.get("target", Recipe.target)
        chosen, vendor = dict(chosen) if isinstance(chosen, dict) else {"use": chosen}, name.removeprefix("target.")
        table["target"] = {**chosen, vendor: {**chosen.get(vendor, {}), key: value}}
    elif name in _SECTIONS:
        table[name] = {**table.get(name, {}), key: value}
    else:
        steps = table.get("pass", [])
        matches = [step for step in steps if isinstance(step, dict) and step.get("use") == name]
        if not matches:
            names = [*_SECTIONS, "target", *(str(step.get("use")) for step in steps if isinstance(step, dict))]
            problems.append(f"--set '{setting}': the recipe has no table or pass '{name}'; {known(name, names)}.")
        table["pass"] = [{**step, key: value} if step in matches else step for step in steps]


def _tables(table: Mapping[str, Any], key: str, where: str, problems: list[str]) -> list[Mapping[str, Any]]:
    tables = table.get(key, [])
    if isinstance(tables, list) and all(isinstance(t, Mapping) for t in tables):
        return tables
    problems.append(f"{where}: write [[{key}]] tables.")
    return []


def _unknown(table: Mapping[str, Any], keys: Iterable[str], where: str, problems: list[str]) -> None:
    keys = tuple(keys)
    problems += [f"{where}: unknown key '{key}'; {known(key, keys)}." for key in table if key not in keys]


def _build(base: Any, table: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """A dataclass, or a changed copy of an instance, with the values of a table; None if that fails."""
    kind = base if isinstance(base, type) else type(base)
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind) if f.init]
    before = len(problems)
    _unknown(table, names, where, problems)
    values = {}
    for key, value in table.items():
        if key in names:
            fitted = _fit(value, hints[key])
            if fitted is _WRONG:
                problems.append(f"{where}: {key} = {value!r} must be {_type_name(hints[key])}.")
            values[key] = fitted
    if len(problems) > before:
        return None
    try:
        return kind(**values) if isinstance(base, type) else replace(base, **values)
    except (TypeError, ValueError, OnnxqError) as error:  # a pass checks its own parameters
        problems.append(f"{where}: {error}.")
        return None


def _check_request(request: TensorRequest | None, where: str, problems: list[str]) -> None:
    if request is not None and not (2 <= request.bits <= 16 or request.bits == FLOAT):
        problems.append(f"{where}: bits = {request.bits} is out of range; use 2..16, or {FLOAT} for float.")
    top = 2**15 if request is not None and request.sub_block == "channel" else 127
    if request is not None and not 1 <= request.max_multiplier <= top:
        problems.append(
            f"{where}: max_multiplier = {request.max_multiplier} is out of range; use 1..{top} (15 fits 4 bits; "
            "codes of 4 bits use at most 18, of 3 bits 42)."
        )
    for key in ("block", "sub_block") if request is not None else ():
        sizes = getattr(request, key)
        if (isinstance(sizes, int) and sizes < 1) or (isinstance(sizes, tuple) and (min(sizes, default=-1) < 0)):
            problems.append(
                f"{where}: {key} = {list(sizes) if isinstance(sizes, tuple) else sizes} must hold sizes of 1 or "
                "more, such as 16 or [1, 16] (0 in a list: the whole axis)."
            )


_WRONG = object()


def _fit(value: Any, hint: Any) -> Any:
    """The value as the annotated type, lists as tuples; _WRONG if it is something else."""
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return next((fitted for option in get_args(hint) if (fitted := _fit(value, option)) is not _WRONG), _WRONG)
    if origin is Literal:
        return value if value in get_args(hint) else _WRONG
    if origin is tuple:
        item = get_args(hint)[0]
        items = [_fit(v, item) for v in value] if isinstance(value, (list, tuple)) else [_fit(value, item)]
        return _WRONG if any(i is _WRONG for i in items) else tuple(items)
    if origin is dict:
        item = get_args(hint)[1]
        table = {k: _fit(v, item) for k, v in value.items()} if isinstance(value, Mapping) else {"": _WRONG}
        return _WRONG if any(v is _WRONG for v in table.values()) else table
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None):
        return None if value is None else _WRONG
    kind = origin or hint
    if isinstance(value, kind if isinstance(kind, type) else object) and isinstance(value, bool) == (hint is bool):
        return value
    return _WRONG


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        words = [repr(v) for v in get_args(hint) if v != ""]
        return "one of " + ", ".join(words) if len(words) > 1 else words[0]
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(h) for h in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {_type_name(get_args(hint)[0]).removeprefix('a ')}s"
    if get_origin(hint) is dict:
        return f"a table of {_type_name(get_args(hint)[1]).removeprefix('a ')}s"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}.get(
        hint, "a table"
    )
