"""The surroundings of a pass under test: the recipe around it, the plugins beside it, the models it runs on.

Passes run through `quantize`, never through `apply` alone: what is promised is promised about the whole. The models come
along, since whoever tests a plugin has none of ours."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins import runtimes
from onnxq_plugins.data import Source, model_inputs, open_data
from onnxq_plugins.engine import Result, quantize
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Graph
from onnxq_plugins.graph.models import Model
from onnxq_plugins.hookspecs import hookimpl
from onnxq_plugins.job import Job, Pass, Recipe
from onnxq_plugins.laws import LawBroken
from onnxq_plugins.plugins import Plugins, find_plugins
from onnxq_plugins.runtimes.audits import file_or_proto
from onnxq_plugins.spec import Array
from onnxq_plugins.testing.exact import exact_session
from onnxq_plugins.testing.models import MORE, ZOO, Feed, feeds, harsh, make

SAMPLES = 8  # of calibration data
UNSEEN = 16  # other samples, to judge by


@dataclass(frozen=True, eq=False)
class Own:
    """A model that is not of the kit.

    name     in messages
    source   the model
    data     samples for it; None for random numbers. Every third calibrates, the others judge
    """

    name: str
    source: Model
    data: Source | None = None

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """As a ModelProto. Raises OnnxqError for what is none."""
        known = file_or_proto(self.source)
        return onnx.load(str(known)) if isinstance(known, Path) else known

    @functools.cached_property
    def samples(self) -> list[Feed]:
        """Up to 24. Raises OnnxqError for data that do not fit, and where random numbers make no inputs."""
        inputs, count = model_inputs(self.model), SAMPLES + UNSEEN
        if self.data is not None:
            return open_data(self.data, inputs).spread(count)
        if odd := next((port for port in inputs if port.dtype.kind != "f"), None):
            raise OnnxqError(
                f"model '{self.name}': input '{odd.name}' has type {odd.dtype}, for which random numbers mean nothing; give "
                f'samples (data={{"{self.name}": ...}}).'
            )
        return feeds(self.model, count)


@dataclass(frozen=True)
class Bench:
    """The surroundings of the pass under test.

    recipe    tables of the recipe that the pass is for, such as {"weights": {"bits": 4}}; the pass runs after its passes
    plugins   plugin objects that recipe and pass need beside the installed ones, for instance with their target
    own       models to try beside those of the kit, by name
    """

    recipe: Mapping[str, Any] = field(default_factory=dict)
    plugins: tuple[object, ...] = ()
    own: Mapping[str, Own] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = next((name for name in self.own if name in ZOO or name in MORE), "")
        OnnxqError.check([f"models: the kit has a model '{taken}'; take another name."] if taken else [])

    def model(self, name: str) -> onnx.ModelProto:
        """The model of that name. Leave it alone."""
        return self.own[name].model if name in self.own else make(name)

    def samples(self, name: str) -> list[Feed]:
        """Those to calibrate on, eight of the kit's models."""
        if name not in self.own:
            return feeds(make(name), SAMPLES)
        return self.own[name].samples[::3] or self.own[name].samples

    def unseen(self, name: str, count: int = UNSEEN) -> list[Feed]:
        """Other samples, `count` at most; the same where there is one only."""
        if name not in self.own:
            return feeds(make(name), count, seed=1)
        every = self.own[name].samples
        return ([feed for at, feed in enumerate(every) if at % 3] or every)[:count]

    def reference(self, name: str, samples: Sequence[Feed]) -> list[Any]:
        """Outputs of a float model."""
        return outputs(self.model(name), samples)

    @functools.cached_property
    def known(self) -> Plugins:
        """The installed plugins and `plugins`."""
        return find_plugins(self.absent)

    @functools.cached_property
    def absent(self) -> list[object]:
        """Those of `plugins` that are not installed."""
        installed = [plugin for _, plugin in find_plugins().manager.list_name_plugin()] if self.plugins else []
        return [plugin for plugin in self.plugins if not any(plugin is other for other in installed)]

    def table(self, *steps: Pass, **changes: Any) -> dict[str, Any]:
        """The recipe with passes appended and tables changed."""
        appended = Recipe(passes=steps).to_dict().get("pass", [])
        return {**self.recipe, **changes, "pass": [*self.recipe.get("pass", []), *appended]}

    def guests(self, *steps: Pass) -> list[object]:
        """Plugin objects for the engine, so that it knows the passes. Fails if one is installed as another class."""
        unknown: list[type[Pass]] = []
        for kind in dict.fromkeys(type(step) for step in steps):
            installed = self.known.passes.get(kind.name)
            if installed is not None and installed is not kind:
                raise AssertionError(
                    f"pass '{kind.name}' is known from '{self.known.sources[f'pass {kind.name}']}' as "
                    f"another class, {installed.__module__}.{installed.__qualname__}; uninstall that package, or "
                    "install this one with: pip install -e ."
                )
            unknown += [kind] if installed is None else []
        return [*self.absent, *([Provider(tuple(unknown))] if unknown else [])]

    def quantize(
        self,
        steps: Sequence[Pass],
        name: str,
        *,
        model: onnx.ModelProto | None = None,
        data: object = ...,
        changes: Mapping[str, Any] | None = None,
        watch: object = None,
        **options: Any,
    ) -> Result:
        """Quantize the model of that name by the recipe and the passes, anew each time; `result` is the one to read from.
        Raises OnnxqError for what the engine refuses, AssertionError for a pass that fails or breaks a law.

        model     in place of the one of that name
        data      in place of its samples
        changes   tables to change in the recipe
        watch     another plugin object
        """
        model = self.model(name) if model is None else model
        plugins = [*self.guests(*steps), *([] if watch is None else [watch])]
        try:
            result = quantize(
                model,
                self.table(*steps, **(changes or {})),
                self.samples(name) if data is ... else data,
                plugins=plugins,
                **{"workers": 1, "check": False, **options},
            )
        except LawBroken as error:
            raise AssertionError(f"on model '{name}', {error}") from error
        try:
            onnx.checker.check_model(result.model, full_check=True)
        except Exception as error:  # the checker raises one type, inference of shapes others
            text = " ".join(str(error).partition("==>")[0].split())[:300].rstrip(".")
            raise AssertionError(
                f"what {_subject(steps)} leaves of model '{name}' is no valid ONNX file: onnx.checker says {text}."
            ) from error
        return result

    def result(
        self,
        steps: Sequence[Pass],
        name: str,
        *,
        changes: Mapping[str, Any] | None = None,
        verify: bool = False,
        misled: str = "",
    ) -> Result:
        """What `quantize` gives, perhaps of a run before: checks that only read it share it.

        misled   by these calibration data, see `models.harsh`, in place of the model's samples
        """
        data = harsh(misled)[1] if misled else ...
        run = partial(self.quantize, tuple(steps), name, changes=changes, verify=verify, data=data)
        try:
            recipe = json.dumps(self.table(*steps, **(changes or {})), sort_keys=True)
        except (TypeError, ValueError):  # no recipe could hold such a pass
            return run()
        around = tuple(map(id, [*self.plugins, *([self.own[name]] if name in self.own else [])]))
        key = _Run(recipe, tuple(map(type, steps)), around, name, verify, misled, run)
        return _shared(key) if steps else _without(key)

    def must(self, steps: Sequence[Pass], name: str, *, anew: bool = False, **options: Any) -> Result:
        """`quantize` (anew) or `result`, where a refusal is a failure too."""
        try:
            return self.quantize(steps, name, **options) if anew else self.result(steps, name, **options)
        except OnnxqError as error:
            raise AssertionError(
                f"{_subject(steps)} raises an error on model '{name}' ({error.problems[0]}) where it must work; "
                "give it a suitable recipe (recipe=...), or plan only what job.target.rule accepts."
            ) from error


@dataclass(frozen=True)
class Provider:
    """A plugin with some passes."""

    passes: tuple[type[Pass], ...]

    @hookimpl
    def onnxq_passes(self) -> list[type[Pass]]:
        return list(self.passes)


@dataclass(eq=False)
class Watch:
    """A plugin that records the runs of one pass: plans before and after, the graph after, the result."""

    name: str
    runs: list[tuple[Any, Any, Graph, object]] = field(default_factory=list)

    @hookimpl(wrapper=True)
    def onnxq_run_pass(self, step: Pass, job: Job) -> Generator[None, dict[str, Any], dict[str, Any]]:
        before = job.plan
        result = yield
        if step.name == self.name:
            self.runs.append((before, job.plan, job.graph.copy(), result))
        return result


@dataclass(frozen=True)
class _Run:
    """What a result depends on, and how to make it."""

    recipe: str
    kinds: tuple[type[Pass], ...]
    around: tuple[int, ...]  # identities of plugins and model, valid as long as `make` holds the bench
    name: str
    verify: bool
    misled: str
    make: Callable[[], Result] = field(compare=False)


@functools.lru_cache(maxsize=64)  # those of a pass on all targets and models
def _shared(run: _Run) -> Result:
    return run.make()


@functools.lru_cache(maxsize=64)
def _without(run: _Run) -> Result:
    """What recipes make without the pass, which those of other passes with such a recipe share."""
    return run.make()


def _subject(steps: Sequence[Pass]) -> str:
    return f"pass '{steps[0].name}'" if steps else "the recipe, without the pass,"


def outputs(model: onnx.ModelProto, samples: Sequence[Mapping[str, Array]], optimize: bool = True) -> list[Any]:
    """Every output over the samples (see `runtimes.outputs`)."""
    return runtimes.outputs(exact_session(model, optimize=optimize), samples)
