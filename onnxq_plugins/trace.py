"""Shows each hook call: what was asked of whom, what came back, how long it took. Stands on pluggy's own monitoring."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pluggy

from onnxq_plugins.job import Job, Pass
from onnxq_plugins.recipe import Recipe
from onnxq_plugins.targets import Target

Trace = Callable[[str], None]  # takes one line for each hook call, when it ends
_LONGEST = 100  # characters of a value


def follow(manager: pluggy.PluginManager, sources: Mapping[str, str], trace: Trace) -> None:
    """Hand a line to `trace` for each hook call of a manager from now on.

    sources   label of a plugin in the manager -> distribution it comes from
    """
    started: list[float] = []  # calls may be nested

    def before(name: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]) -> None:
        started.append(time.perf_counter())

    def after(
        outcome: pluggy.Result[Any], name: str, implementations: Sequence[pluggy.HookImpl], arguments: Mapping[str, Any]
    ) -> None:
        taken = 1e3 * (time.perf_counter() - started.pop())
        # pluggy calls the last one first
        called = ", ".join(_who(one, sources, name) for one in reversed(implementations)) or "nobody"
        told = ", ".join(f"{key}={short(value)}" for key, value in arguments.items())
        gave = f"raises {short(outcome.exception)}" if outcome.exception else f"-> {short(outcome.get_result())}"
        trace(f"{'  ' * len(started)}{name}({told}) by {called} {gave}  {taken:.1f} ms")

    manager.add_hookcall_monitoring(before, after)


def _who(one: pluggy.HookImpl, sources: Mapping[str, str], hook: str) -> str:
    if hook == "onnxq_run_pass" and one.plugin_name == "built-in":
        return "the pass itself"
    source = sources.get(one.plugin_name, "")
    label = one.plugin_name if source in ("", one.plugin_name) else f"{one.plugin_name} ({source})"
    return f"{label} [wrapper]" if one.wrapper or one.hookwrapper else label


def short(value: object) -> str:
    """A value in a few words."""
    if isinstance(value, Pass):
        table = Recipe(passes=(value,)).to_dict()["pass"][0]
        return " ".join([str(table.pop("use")), *(f"{key}={item!r}" for key, item in table.items())])
    if isinstance(value, Job):
        return f"<job: {len(value.graph.layers)} layers, {len(value.plan)} planned>"
    if isinstance(value, type) and issubclass(value, Pass):
        return value.name
    if isinstance(value, Target):
        return value.name
    if isinstance(value, list) and value and all(isinstance(one, (list, Target, type)) for one in value):
        return _cut(f"[{', '.join(map(short, value))}]")
    if hasattr(value, "SerializeToString"):
        return f"<model: {len(value.graph.node)} nodes>" if hasattr(value, "graph") else f"<{type(value).__name__}>"
    return _cut(" ".join((f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else repr(value)).split()))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."
