"""What a plugin must be beyond its passes and targets: one function per requirement, check(plugin, bench). The recipe of the
bench is the one that the plugin acts on, such as {"target": "acme.npu"}."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import onnx

from onnxq_plugins.engine import quantize
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.hookspecs import hookimpl
from onnxq_plugins.job import Outcome
from onnxq_plugins.laws import LawBroken
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.report.attempts import with_remedy
from onnxq_plugins.report.causes import KINDS, Cause
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.testing.bench import Bench, outputs

SAME = 40.0  # dB that an exported model and what a plugin makes of it agree to at least
_MODELS = ("cnn", "outliers", "mlp", "mobilenet")


def check_plugin_loads(plugin: object, bench: Bench) -> None:
    """It registers: hooks with known names that return what they must, passes with a vendor's name, recipes that are there.

    Why: whatever is wrong with a plugin sets all of it aside.
    """
    with _alone():
        broken = find_plugins([plugin]).broken
    assert not broken, f"plugin {_name(plugin)} is ignored: {'; '.join(broken.values())}."


def check_plugin_quiet(plugin: object, bench: Bench) -> None:
    """Beside recipes that use nothing of it, it changes nothing: the same bytes as without it, no other file.

    Why: hooks run for every model. Installing a package must change none. Look at ``job.target`` or ``job.recipe`` first.
    """
    found = []
    for plugins in ([], [plugin]):
        with _alone(), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            recipe = {"pass": [{"use": "ranges"}]}
            quantize(bench.model("cnn"), recipe, bench.samples("cnn"), plugins=plugins, output=path, workers=1, check=False)
            found.append((path.read_bytes(), sorted(file.name for file in path.parent.iterdir())))
    (before, _), (after, files) = found
    assert files == ["model.onnx"], (
        f"plugin {_name(plugin)} writes {', '.join(sorted({*files} - {'model.onnx'}))} beside a model that uses nothing of "
        "it; look at job.target or job.recipe before a hook acts."
    )
    assert before == after, (
        f"plugin {_name(plugin)} changes a model whose recipe uses nothing of it; look at job.target or job.recipe before a "
        "hook acts."
    )


def check_plugin_recipes(plugin: object, bench: Bench) -> None:
    """Each of its recipes works on at least one small model, and refuses others in sentences.

    Why: ``onnxq auto`` tries them on whatever model it is given.
    """
    for recipe in plugin.onnxq_recipes():  # type: ignore[attr-defined]
        refused = []
        for name in _MODELS:
            try:
                quantize(bench.model(name), recipe, bench.samples(name), plugins=bench.absent, workers=1, check=False)
            except LawBroken as error:
                raise AssertionError(f"recipe '{recipe}' on model '{name}': {error}") from error
            except OnnxqError as error:
                refused.append(str(error))
        assert len(refused) < len(_MODELS), f"recipe '{recipe}' works on no model of the kit: {refused[0]}"


def check_plugin_remedies(plugin: object, bench: Bench) -> None:
    """``onnxq_remedies`` proposes something for at least one kind of cause; whatever it proposes makes a model by a
    changed recipe; asking changes nothing, and twice gives the same.

    Why: ``diagnose --try`` and ``auto`` run what is proposed, and print it for users to type.
    """
    proposed = 0
    for name in ("outliers", "cnn"):
        result = bench.quantize((), name)
        before = result.float_model.SerializeToString(), json.dumps(result.report)
        remedies, again = ([*_proposed(plugin, result, name)] for _ in range(2))
        assert (result.float_model.SerializeToString(), json.dumps(result.report)) == before, (
            f"onnxq_remedies of plugin {_name(plugin)} changes the job that it is asked about (model '{name}'); only return "
            "remedies, whose passes change models."
        )
        assert [one.typed for one in remedies] == [one.typed for one in again], (
            f"onnxq_remedies of plugin {_name(plugin)} proposes something else when it is asked again (model '{name}')."
        )
        for remedy in {one.typed: one for one in remedies}.values():
            assert remedy.text.strip() and remedy.typed, (
                f"onnxq_remedies of plugin {_name(plugin)} proposes a Remedy without a text, or without a change."
            )
            try:
                with_remedy(result, remedy)
            except OnnxqError as error:
                raise AssertionError(
                    f"the remedy '{remedy.text}' of plugin {_name(plugin)} is refused on model '{name}' "
                    f"({error.problems[0]}); propose only what fits job.recipe and job.target."
                ) from error
        proposed += len(remedies)
    assert proposed, (
        f"onnxq_remedies of plugin {_name(plugin)} proposes nothing for any cause ({', '.join(KINDS)}) of any layer of the "
        "kit's models; is cause.kind spelt as in this list?"
    )


def check_plugin_exporting(plugin: object, bench: Bench) -> None:
    """What ``onnxq_exporting`` makes of a model is valid, is what the target declares, has the same inputs and outputs and
    computes the same in onnxruntime; it changes at least one model.

    Why: it comes last. What the passes and the search judged must be what is written.
    """
    changed = 0
    for name in _MODELS:
        spy = _Spy()
        try:
            result = bench.quantize((), name, watch=spy)
        except OnnxqError as error:
            assert "onnxq_exporting" not in str(error), f"on model '{name}', {error}"
            continue  # the recipe does not suit the model
        (before,), samples = spy.models, bench.unseen(name, 3)
        after = onnx.ModelProto.FromString(result.model.SerializeToString())
        own = [entry for entry in after.metadata_props if not entry.key.startswith("onnxq.")]  # the engine signs it later
        del after.metadata_props[:]
        after.metadata_props.extend(own)
        changed += before != after
        reference, found = (outputs(model, samples, optimize=False) for model in (before, result.model))
        sqnr = worst_sqnr(reference, found)
        assert sqnr >= SAME, (
            f"onnxq_exporting of plugin {_name(plugin)} changes what model '{name}' computes (to {sqnr:.0f} dB of what was "
            "exported); write what it should compute differently as a pass."
        )
    assert changed, (
        f"onnxq_exporting of plugin {_name(plugin)} changes none of the models {', '.join(_MODELS)}; give the kit the "
        "recipe that it acts on (recipe=...)."
    )


def check_plugin_exported(plugin: object, bench: Bench) -> None:
    """``onnxq_exported`` works with a path and without, and leaves the model and its file as they are.

    Why: ``quantize`` in Python mostly writes no file; and what was audited and checked must be what users get.
    """
    for name in _MODELS:
        try:
            result = bench.quantize((), name)
        except OnnxqError:
            continue  # the recipe does not suit the model
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            written = bench.quantize((), name, output=path)
            assert path.is_file() and onnx.load(str(path)) == written.model == result.model, (
                f"onnxq_exported of plugin {_name(plugin)} changes a model that is written; do so in onnxq_exporting."
            )
        return
    raise AssertionError(f"the recipe refuses all of the models {', '.join(_MODELS)}; give the kit another (recipe=...).")


_ALWAYS = (check_plugin_loads, check_plugin_quiet)
_OF_HOOK: dict[str, Callable[[object, Bench], None]] = {
    "onnxq_recipes": check_plugin_recipes,
    "onnxq_remedies": check_plugin_remedies,
    "onnxq_exporting": check_plugin_exporting,
    "onnxq_exported": check_plugin_exported,
}
PLUGIN_CHECKS: Mapping[str, Callable[[object, Bench], None]] = {
    check.__name__: check for check in (*_ALWAYS, *_OF_HOOK.values())
}


def checks_of(plugin: object) -> dict[str, Callable[[object, Bench], None]]:
    """The checks that are about what a plugin has."""
    about = [check for hook, check in _OF_HOOK.items() if hasattr(plugin, hook)]
    return {check.__name__: check for check in (*_ALWAYS, *about)}


# ---- details --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Spy:
    """Keeps each model before other plugins change it."""

    models: list[onnx.ModelProto] = field(default_factory=list)

    @hookimpl(trylast=True)  # which stands first in the list of pluggy, and is called first by `Plugins.each`
    def onnxq_exporting(self, model: onnx.ModelProto) -> onnx.ModelProto:
        self.models.append(onnx.ModelProto.FromString(model.SerializeToString()))
        return model


def _alone() -> mock._patch[mock.MagicMock]:
    """Without what is installed."""
    return mock.patch("onnxq_plugins.plugins.entry_points", return_value=())


def _proposed(plugin: object, result: Outcome, name: str) -> Iterator[Remedy]:
    """What is proposed for each kind of cause, for each layer and for none."""
    assert result.propose is not None  # `quantize` sets it
    try:
        for kind in KINDS:
            for layer in (*(y for y in result.graph.layers if y.weight in result.plan), None):
                yield from result.propose(Cause(kind, "A cause.", 3.0), layer)
    except OnnxqError as error:
        raise AssertionError(f"on model '{name}', {error}") from error


def _name(plugin: object) -> str:
    return f"'{getattr(plugin, '__name__', type(plugin).__name__)}'"
