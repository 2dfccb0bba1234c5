"""Finding plugins: built-ins, then entry points of the group ``onnxq_plugins``, each independent of the others.

Every call makes a manager of its own. A plugin that cannot be imported, or whose hooks are wrong, is ignored with a warning;
it is an error only when a recipe asks for one of its passes or targets.

Each plugin is asked alone, in a manager of its own, and joins the others only when all of it is sound, so that an error has
an owner. A name that two packages bring belongs to neither, and only recipes that use it fail: installing a package must
not change what others do. Built-ins register through the same hooks, but directly rather than by entry point, so that a
checkout works without being installed."""

from __future__ import annotations

import logging
import reprlib
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from importlib.metadata import entry_points
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pluggy

from onnxq_plugins import hookspecs
from onnxq_plugins.errors import OnnxqError, known, raised
from onnxq_plugins.job import Job, Pass, Recipe, Service, Stage
from onnxq_plugins.passes import BUILTIN
from onnxq_plugins.recipe import Settings, builtin_recipes, load_recipe
from onnxq_plugins.targets import BUILTIN as TARGETS
from onnxq_plugins.targets import Target

GROUP = "onnxq_plugins"
BUILTIN_SOURCE = "onnxq-plugins"
log = logging.getLogger("onnxq_plugins")
Trace = Callable[[str], None]  # receives one line per hook call, when it ends


class _Builtins:
    """The built-in passes and targets, through the same hooks as those of other plugins."""

    @hookspecs.hookimpl
    def onnxq_passes(self) -> list[type[Pass]]:
        return list(BUILTIN)

    @hookspecs.hookimpl
    def onnxq_targets(self) -> list[Target]:
        return list(TARGETS)

    @hookspecs.hookimpl
    def onnxq_recipes(self) -> dict[str, Path]:
        return builtin_recipes()

    @hookspecs.hookimpl
    def onnxq_remedies(self, cause: Any) -> list[Any]:
        return list(cause.remedies)

    @hookspecs.hookimpl(trylast=True)
    def onnxq_run_pass(self, step: Pass, job: Any) -> dict[str, Any]:
        return step.apply(job) or {}


@dataclass(frozen=True)
class Plugins:
    """What is installed: a pluggy manager, passes and targets by name, the source of each, and broken plugins."""

    manager: pluggy.PluginManager
    passes: dict[str, type[Pass]]
    targets: dict[str, Target]
    sources: dict[str, str]  # "pass NAME" or "target NAME" -> distribution
    versions: dict[str, str]  # distribution -> version
    broken: dict[str, str]  # entry point -> what is wrong
    labels: dict[str, str]  # name of a plugin in the manager -> distribution
    recipes: dict[str, Path]  # by name

    def each(self, hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        """The implementations of a hook, built-ins first: the label of the plugin, and a function of the hook's arguments
        that returns what it returns, None for nothing. It raises OnnxqError with the owner of what fails."""
        for one in getattr(self.manager.hook, hook).get_hookimpls():
            others = [plugin for plugin in self.manager.get_plugins() if plugin is not one.plugin]
            alone = self.manager.subset_hook_caller(hook, others)
            yield one.plugin_name, partial(self._call, f"{hook} of plugin {self.owner(one.plugin_name)}", alone)

    @staticmethod
    def _call(who: str, alone: Callable[..., list[Any]], **arguments: Any) -> Any:
        try:
            found = alone(**arguments)
        except OnnxqError:
            raise
        except Exception as error:  # whatever a stranger's code raises
            raise OnnxqError(f"{who} fails with {raised(error)}; this is a bug of the plugin.") from error
        return found[0] if found else None

    def owner(self, label: str) -> str:
        """A plugin with its package and version, for a sentence."""
        source = self.labels.get(label, "")
        version = f" {self.versions[source]}" if source in self.versions else ""
        return f"'{label}'" + (f" ({source}{version})" if version else "")

    def target(self, name: str) -> Target:
        """The target of that name. Raises OnnxqError listing the known ones."""
        if name not in self.targets:
            raise OnnxqError(f"target '{name}' is unknown; {known(name, sorted(self.targets))}." + self.excuse())
        return self.targets[name]

    def target_of(self, recipe: Recipe) -> Target:
        """The target of a recipe, with what the recipe sets for its vendor."""
        return self.target(recipe.target).with_settings(recipe.vendors)

    def recipe(self, recipe: str | Path | Mapping[str, Any] | Recipe, settings: Settings = ()) -> Recipe:
        """`load_recipe` with these passes. Raises OnnxqError, with broken plugins first: they may be the reason."""
        try:
            return load_recipe(recipe, self.passes, settings, self.recipes)
        except OnnxqError as error:
            raise OnnxqError(*([self.excuse().strip()] if self.broken else []), *error.problems) from None

    def excuse(self) -> str:
        """Sentences about broken plugins, for errors that they may explain."""
        return "".join(f" Plugin '{name}' is broken: {why}." for name, why in self.broken.items())


def find_plugins(extra: Iterable[object] = (), trace: Trace | None = None) -> Plugins:
    """Built-ins, entry points, then `extra` plugin objects (modules or instances), merged by name.

    trace   receives a line of text for each hook call

    A name that two plugins provide belongs to neither: both are left out, and recipes that use it get an error.
    """
    labels: dict[str, str] = {}
    plugins = Plugins(_manager(labels, trace), {}, {}, {}, {}, {}, labels, {})
    _add(plugins, _Builtins(), "built-in", BUILTIN_SOURCE, trace, guest=False)
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        source = point.dist.name if point.dist is not None else point.name
        if point.dist is not None:
            plugins.versions[source] = point.dist.version
        try:
            plugin = point.load()
        except Exception as error:  # whatever a stranger's module raises on import
            _broken(plugins, point.name, f"import failed with {raised(error)}" + _hint(error))
        else:
            _add(plugins, plugin, point.name, source, trace)
    extra = [*extra]
    OnnxqError.check(
        f"plugins: {plugin!r:.80} is no plugin; give a module or an object with hooks, and names of passes in the recipe."
        for plugin in extra
        if isinstance(plugin, (str, int, float, type(None)))
    )
    for plugin in extra:
        _add(plugins, plugin, getattr(plugin, "__name__", type(plugin).__name__), "given in Python", trace)
    return plugins


def _manager(labels: dict[str, str], trace: Trace | None) -> pluggy.PluginManager:
    manager = pluggy.PluginManager("onnxq_plugins")
    manager.add_hookspecs(hookspecs)
    if trace is not None:
        follow(manager, labels, trace)
    return manager


def _add(plugins: Plugins, plugin: object, name: str, source: str, trace: Trace | None, guest: bool = True) -> None:
    """Register one plugin, or ignore it as a whole. Its hooks are called alone, so that errors are known to be its own."""
    label, i = name, 1
    while plugins.manager.has_plugin(label):  # two packages may have entry points of one name
        label, i = f"{name} {i + 1}", i + 1
    plugins.labels[label] = source
    try:
        alone = _manager(plugins.labels, trace)
        if plugins.manager.is_registered(plugin) or alone.register(plugin, label) is None:
            raise ValueError("it is registered already")
        alone.check_pending()
        hooks = {caller.name for caller in alone.get_hookcallers(plugin) or ()}
        passes = _brought(alone, "onnxq_passes", hooks, "MyPass")
        targets = _brought(alone, "onnxq_targets", hooks, "MY_TARGET")
        recipes = _brought_recipes(alone, guest) if "onnxq_recipes" in hooks else []
        for kind in passes:
            _check_pass(kind, guest)
        for target in targets:
            if not isinstance(target, Target):
                raise TypeError(f"{target!r} is not a Target")
        if not hooks:
            raise ValueError("it implements no hook; mark functions with @onnxq_plugins.hookimpl")
        plugins.manager.register(plugin, label)
    except Exception as error:  # a plugin's own code ran
        _broken(plugins, label, " ".join(str(error).split()).rstrip(".") or type(error).__name__)
        return
    registries: tuple[tuple[str, dict[str, Any], list[Any]], ...] = (
        ("pass", plugins.passes, passes),
        ("target", plugins.targets, targets),
        ("recipe", plugins.recipes, recipes),
    )
    taken = set(plugins.sources)
    for what, registry, items in registries:
        for item in items:
            first = plugins.sources.setdefault(key := f"{what} {item.name}", source)
            if key not in taken:
                taken.add(key)
                registry[item.name] = item.file if isinstance(item, _RecipeFile) else item
                continue
            if first != BUILTIN_SOURCE:  # which one a recipe means is not known
                registry.pop(item.name, None)
            _broken(plugins, label, f"{what} '{item.name}' comes from both '{first}' and '{source}'; uninstall one of them")


def _brought(alone: pluggy.PluginManager, hook: str, hooks: Container[str], example: str) -> list[Any]:
    """What a plugin lists through a hook. Raises TypeError for anything but a list, with what was probably meant."""
    if hook not in hooks:
        return []
    found = getattr(alone.hook, hook)()  # pluggy leaves out None
    if not found:
        raise TypeError(f"{hook} returns nothing; end it with: return [{example}]")
    for each in found:
        if not isinstance(each, (list, tuple, set, frozenset)):
            name, what = (each.__name__, "class ") if isinstance(each, type) else (type(each).__name__, "a ")
            raise TypeError(f"{hook} returns {what}{name} instead of a list; return [{name}]")
    return list(chain(*found))


@dataclass(frozen=True)
class _RecipeFile:
    name: str
    file: Path


def _brought_recipes(alone: pluggy.PluginManager, guest: bool) -> list[_RecipeFile]:
    """The recipes of a plugin. Raises TypeError or ValueError for what is no mapping from names to files."""
    found = alone.hook.onnxq_recipes()
    if not found or not isinstance(found[0], Mapping):
        what = f"a {type(found[0]).__name__}" if found else "nothing"
        raise TypeError(f'onnxq_recipes returns {what} instead of a dict; return {{"vendor.name": Path(...)}}')
    for name, file in found[0].items():
        if guest and "." not in name:
            raise ValueError(f"recipe '{name}' needs a name like vendor.{name}")
        if not Path(file).is_file():
            raise ValueError(f"recipe '{name}': there is no file '{file}'; is it part of the wheel?")
    return [_RecipeFile(name, Path(file)) for name, file in found[0].items()]


def _check_pass(kind: Any, guest: bool) -> None:
    """Raise TypeError or ValueError if something that a plugin provides cannot be used as a pass."""
    if not (
        isinstance(kind, type)
        and issubclass(kind, Pass)
        and is_dataclass(kind)
        and kind.name
        and getattr(vars(kind).get("__dataclass_params__"), "frozen", False)
    ):
        raise TypeError(
            f"{kind!r} is not a frozen dataclass that derives from Pass and has a name: write @dataclass(frozen=True) "
            "above it"
        )
    if guest and "." not in kind.name:
        raise ValueError(f"pass '{kind.name}' of class {kind.__qualname__} needs a name like vendor.{kind.name}")
    if kind.stage not in get_args(Stage):
        raise ValueError(f"pass '{kind.name}': stage = {kind.stage!r} must be one of {', '.join(get_args(Stage))}")
    if unknown := sorted({*kind.provides} - {*get_args(Service)}):
        raise ValueError(
            f"pass '{kind.name}' provides {unknown[0]!r}, which nothing knows; known: {', '.join(get_args(Service))}"
        )
    for f in fields(kind):
        if f.init and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"parameter '{f.name}' of pass '{kind.name}' has no default; give it one")


def _hint(error: Exception) -> str:
    """How to fix a common import error."""
    return "; passes are frozen dataclasses: write @dataclass(frozen=True)" if "non-frozen dataclass" in str(error) else ""


def _broken(plugins: Plugins, name: str, why: str) -> None:
    plugins.broken[name] = why
    log.warning("plugin '%s' is ignored: %s", name, why)


# ---- trace ----------------------------------------------------------------------------------------------------------------


def follow(manager: pluggy.PluginManager, sources: Mapping[str, str], trace: Trace) -> None:
    """Pass a line to `trace` for each hook call of a manager from now on.

    sources   label of a plugin in the manager -> distribution it comes from
    """
    started: list[float] = []  # calls may be nested

    def before(name: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
        started.append(time.perf_counter())

    def after(
        outcome: pluggy.Result[Any], name: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]
    ) -> None:
        milliseconds = 1e3 * (time.perf_counter() - started.pop())
        # pluggy calls the last one first
        called = ", ".join(_who(one, sources, name) for one in reversed(implementations)) or "nobody"
        values = ", ".join(f"{key}={short(value)}" for key, value in arguments.items())
        result = f"raises {short(outcome.exception)}" if outcome.exception else f"-> {short(outcome.get_result())}"
        trace(f"{'  ' * len(started)}{name}({values}) by {called} {result}  {milliseconds:.1f} ms")

    manager.add_hookcall_monitoring(before, after)


def _who(one: pluggy.HookImpl, sources: Mapping[str, str], hook: str) -> str:
    if hook == "onnxq_run_pass" and one.plugin_name == "built-in":
        return "the pass itself"
    source = sources.get(one.plugin_name, "")
    label = one.plugin_name if source in ("", one.plugin_name) else f"{one.plugin_name} ({source})"
    return f"{label} [wrapper]" if one.wrapper or one.hookwrapper else label


class _Short(reprlib.Repr):
    """Values in a few words."""

    def __init__(self) -> None:
        super().__init__()
        self.maxother = self.maxstring = 100
        self.maxdict = 8

    def repr_Job(self, job: Job, level: int) -> str:
        return f"<job: {len(job.graph.layers)} layers, {len(job.plan)} planned>"

    def repr_Target(self, target: Target, level: int) -> str:
        return target.name

    def repr_ModelProto(self, model: Any, level: int) -> str:
        return f"<model: {len(model.graph.node)} nodes>"

    def repr_type(self, kind: type, level: int) -> str:
        return kind.name if issubclass(kind, Pass) else repr(kind)

    def repr_instance(self, value: object, level: int) -> str:
        if isinstance(value, Pass):
            table = Recipe(passes=(value,)).to_dict()["pass"][0]
            return " ".join([str(table.pop("use")), *(f"{key}={item!r}" for key, item in table.items())])
        if isinstance(value, BaseException):
            return f"{type(value).__name__}: {' '.join(str(value).split())}"[: self.maxother]
        if hasattr(value, "SerializeToString"):  # the text of a large one takes seconds
            return f"<{type(value).__name__}>"
        return " ".join(super().repr_instance(value, level).split())


short = _Short().repr
