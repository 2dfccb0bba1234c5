"""Finding plugins: guests beside built-ins, broken ones set aside, clashes told."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest

from onnxq_plugins import OnnxqError, Pass, hookimpl, plugins, quantize
from onnxq_plugins.laws import LawBroken
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import load_recipe
from onnxq_plugins.targets import BUILTIN
from onnxq_plugins.targets.ort_cpu import ORT_CPU
from tests.zoo import cnn, feeds


@dataclass(frozen=True)
class Note(Pass):
    """Writes its parameter into the report."""

    name: ClassVar[str] = "vendor.note"
    text: str = "hello"

    def apply(self, job):
        return {"text": self.text}


class Vendor:
    @hookimpl
    def onnxq_passes(self):
        return [Note]


def brings(*kinds):
    class Brings:
        @hookimpl
        def onnxq_passes(self):
            return list(kinds)

    return Brings()


def targets(*made):
    class Targets:
        @hookimpl
        def onnxq_targets(self):
            return list(made)

    return Targets()


@dataclass
class Entry:
    """What importlib.metadata gives for an entry point; `loads` is the plugin or the exception that import raises."""

    name: str
    loads: object
    distribution: str | None = "some-package"

    @property
    def dist(self):
        return SimpleNamespace(name=self.distribution, version="1.2.3") if self.distribution else None

    def load(self):
        if isinstance(self.loads, BaseException):
            raise self.loads
        return self.loads


@pytest.fixture
def install(monkeypatch):
    def patch(*entries: Entry) -> None:
        def entry_points(group):
            assert group == "onnxq_plugins"
            return entries

        monkeypatch.setattr(plugins, "entry_points", entry_points)

    patch()  # whatever is installed here does not matter
    return patch


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, logger="onnxq_plugins")
    return lambda: [record.getMessage() for record in caplog.records]


# ---- guests -------------------------------------------------------------------------------------------------------------


def test_builtins_come_through_the_same_hooks(install):
    plugins = find_plugins()
    assert {"ranges", "bias-correct", "scale-inputs"} <= set(plugins.passes)
    assert set(plugins.targets) == {target.name for target in BUILTIN}
    assert set(plugins.sources.values()) == {"onnxq-plugins"}
    assert not plugins.broken
    assert not any("." in name for name in plugins.passes)


def test_a_plugin_object_brings_a_pass_that_recipes_can_use(install):
    recipe = {"pass": [{"use": "ranges"}, {"use": "vendor.note", "text": "it ran"}]}
    result = quantize(cnn(), recipe, feeds(cnn(), 2), plugins=[Vendor()], workers=1)
    assert result.report["steps"][1]["result"] == {"text": "it ran"}
    assert result.report["steps"][1]["parameters"] == {"text": "it ran"}


def test_a_module_is_a_plugin_too(install):
    module = SimpleNamespace(__name__="vendor_module", onnxq_passes=hookimpl(lambda: [Note]))
    assert find_plugins([module]).passes["vendor.note"] is Note


def test_entry_points_bring_passes_with_their_source_and_version(install):
    install(Entry("vendor", Vendor(), "vendor-package"))
    plugins = find_plugins()
    assert plugins.sources["pass vendor.note"] == "vendor-package"
    assert plugins.versions["vendor-package"] == "1.2.3"
    result = quantize(cnn(), {"pass": [{"use": "vendor.note"}]}, feeds(cnn(), 2), workers=1)
    versions = next(p.value for p in result.model.metadata_props if p.key == "onnxq.versions")
    assert "vendor-package==1.2.3" in versions


def test_an_entry_point_without_distribution(install):
    install(Entry("vendor", Vendor(), None))
    assert find_plugins().sources["pass vendor.note"] == "vendor"


def test_installing_a_plugin_changes_no_model(install):
    before = quantize(cnn(), "int8", feeds(cnn(), 2), workers=1).model.SerializeToString()
    install(Entry("vendor", Vendor()))
    assert quantize(cnn(), "int8", feeds(cnn(), 2), workers=1).model.SerializeToString() == before


def test_nothing_is_kept_between_calls(install):
    assert "vendor.note" in find_plugins([Vendor()]).passes
    assert "vendor.note" not in find_plugins().passes


def test_a_target_from_a_plugin_works(install):
    narrow = replace(ORT_CPU, name="vendor.npu", max_code=15, doc="codes of 5 bits")
    recipe = {"target": "vendor.npu"}
    result = quantize(cnn(), recipe, feeds(cnn(), 2), plugins=[targets(narrow)], workers=1)
    assert all(spec.bits == 5 for name, spec in result.plan.items() if spec.codes is not None)
    assert result.report["recipe"]["target"] == "vendor.npu"


def test_an_unknown_target_lists_the_known(install):
    with pytest.raises(OnnxqError, match="target 'gpu' is unknown; known: ethos-u, litert, npu, npu4, openvino, ort-cpu"):
        find_plugins().target("gpu")


# ---- broken ones --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoDot(Note):
    name: ClassVar[str] = "note"


@dataclass(frozen=True)
class NoName(Note):
    name: ClassVar[str] = ""


class NoDataclass(Pass):
    name: ClassVar[str] = "vendor.plain"
    threshold: float = 0.5


@dataclass
class Raises:
    error: BaseException

    @hookimpl
    def onnxq_passes(self):
        raise self.error


class Misspelt:
    @hookimpl
    def onnxq_pases(self):
        return [Note]


class WrongArguments:
    @hookimpl
    def onnxq_passes(self, nonsense):
        return [Note]


class NoHooks:
    def onnxq_passes(self):
        return [Note]


@dataclass(frozen=True)
class NoDefault(Pass):
    name: ClassVar[str] = "vendor.value"
    value: int


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        (ImportError("no module named torch"), ": no module named torch"),
        (SyntaxError("bad"), "import failed with SyntaxError"),
        (brings(NoDot), "pass 'note' of class NoDot needs a name like vendor.note"),
        (brings(NoName), "has a name"),
        (brings(NoDataclass), "is not a frozen dataclass"),
        (brings(int), "is not a frozen dataclass"),
        (brings(Note()), "is not a frozen dataclass"),
        (brings(Note, NoDot), "pass 'note'"),
        (targets(Note), "is not a Target"),
        (Raises(RuntimeError("no licence")), "no licence"),
        (Misspelt(), "onnxq_pases"),
        (WrongArguments(), "nonsense"),
        (brings(NoDefault), "parameter 'value' of pass 'vendor.value' has no default"),
        (NoHooks(), "implements no hook"),
        (None, ""),
    ],
)
def test_a_broken_plugin_is_one_warning_and_the_others_work(install, warnings, plugin, words):
    install(Entry("broken", plugin), Entry("fine", brings(Fine), "fine-package"))
    plugins = find_plugins()
    assert set(plugins.broken) == {"broken"}
    assert words in plugins.broken["broken"]
    (warning,) = warnings()
    assert warning.startswith("plugin 'broken' is ignored: ")
    assert words in warning
    assert "\n" not in warning
    assert "vendor.fine" in plugins.passes
    assert "vendor.note" not in plugins.passes  # set aside whole
    assert not plugins.manager.has_plugin("broken")
    assert quantize(cnn(), "int8", feeds(cnn(), 2), workers=1).report["kernels"]


@dataclass(frozen=True)
class Fine(Note):
    name: ClassVar[str] = "vendor.fine"


def test_a_recipe_that_needs_a_broken_plugin_names_it(install):
    install(Entry("vendor", ImportError("no module named torch")))
    with pytest.raises(OnnxqError) as caught:
        quantize(cnn(), {"pass": [{"use": "vendor.note"}]}, feeds(cnn(), 2))
    assert re.match(
        r"Plugin 'vendor' is broken: import failed with ImportError .*: no module named torch\.", caught.value.problems[0]
    )  # the cause first
    assert "'vendor.note' is not a known pass" in caught.value.problems[1]


def test_a_target_of_a_broken_plugin_names_it(install):
    install(Entry("vendor", ImportError("no module named torch")))
    with pytest.raises(OnnxqError, match=r"target 'vendor.npu' is unknown.*Plugin 'vendor' is broken"):
        quantize(cnn(), {"target": "vendor.npu"}, feeds(cnn(), 2))


def test_a_pass_that_crashes_is_named_with_the_line(install):
    """A bug in a stranger's pass is told as one, of the pass; what it raised is the cause."""

    @dataclass(frozen=True)
    class Crash(Pass):
        name: ClassVar[str] = "vendor.crash"

        def apply(self, job):
            raise ZeroDivisionError

    install(Entry("vendor", brings(Crash), "vendor-package"))
    with pytest.raises(
        LawBroken,
        match=r"pass 'vendor.crash' \(vendor-package 1\.2\.3\) fails with ZeroDivisionError in "
        r"tests/test_plugins.py, line \d+; this is a bug of the pass",
    ) as caught:
        quantize(cnn(), {"pass": [{"use": "vendor.crash"}]}, feeds(cnn(), 2))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


# ---- clashes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OtherNote(Note):
    name: ClassVar[str] = "vendor.note"


@dataclass(frozen=True)
class ThirdNote(Note):
    name: ClassVar[str] = "vendor.note"


def test_a_name_from_two_distributions_belongs_to_neither(install, warnings):
    install(
        Entry("a", brings(Note), "first-package"),
        Entry("b", brings(OtherNote, Fine), "second-package"),
        Entry("c", brings(ThirdNote), "third-package"),
    )
    plugins = find_plugins()
    assert "vendor.note" not in plugins.passes and "vendor.fine" in plugins.passes
    assert len(warnings()) == len(plugins.broken) == 2
    assert quantize(cnn(), "int8", feeds(cnn(), 2), workers=1).report["kernels"]  # who does not use it has no trouble
    with pytest.raises(OnnxqError, match=r"'vendor\.note' comes from both 'first-package' and 'second-package'; uninstall"):
        quantize(cnn(), {"pass": [{"use": "vendor.note"}]}, feeds(cnn(), 2))


def test_a_target_of_the_name_of_a_built_in_changes_nothing(install, warnings):
    install(Entry("a", targets(replace(ORT_CPU, doc="another")), "second-package"))
    assert find_plugins().targets["ort-cpu"] is ORT_CPU
    assert "target 'ort-cpu' comes from both 'onnxq-plugins' and 'second-package'" in warnings()[0]


def test_the_same_plugin_object_twice_is_set_aside_once(install, warnings):
    plugin = Vendor()
    plugins = find_plugins([plugin, plugin])
    assert plugins.passes["vendor.note"] is Note
    assert plugins.manager.is_registered(plugin)  # the first time counts
    assert len(warnings()) == len(plugins.broken) == 1


def test_two_plugins_of_one_class_that_bring_different_things_work(install, warnings):
    """Their default name is that of the class: it must not make them one."""
    plugins = find_plugins([brings(Note), brings(Fine)])
    assert {"vendor.note", "vendor.fine"} <= set(plugins.passes)
    assert not warnings()


def test_two_packages_may_give_their_entry_points_one_name(install, warnings):
    first, second = brings(Note), brings(Fine)
    install(Entry("plugin", first, "first-package"), Entry("plugin", second, "second-package"))
    plugins = find_plugins()
    assert {"vendor.note", "vendor.fine"} <= set(plugins.passes)
    assert plugins.manager.is_registered(first)
    assert plugins.manager.is_registered(second)
    assert not warnings()


def test_passes_found_can_be_read_by_recipes(install):
    plugins = find_plugins([Vendor()])
    recipe = load_recipe({"pass": [{"use": "vendor.note"}]}, plugins.passes, ["vendor.note.text=other"])
    assert recipe.passes == (Note("other"),)


# ---- tracing ------------------------------------------------------------------------------------------------------------


class Timer:
    @hookimpl(wrapper=True)
    def onnxq_run_pass(self, step, job):
        told = yield
        return {**told, "timed": True}

    @hookimpl
    def onnxq_exported(self, job, model, path):
        pass


def test_a_trace_shows_each_hook_call_with_who_answered_it(install):
    install(Entry("vendor", Vendor(), "vendor-package"))
    lines: list[str] = []
    recipe = {"pass": [{"use": "vendor.note", "text": "it ran"}, {"use": "ranges"}]}
    quantize(cnn(), recipe, feeds(cnn(), 2), workers=1, plugins=[Timer()], trace=lines.append)
    calls = [line.partition("(")[0] for line in lines]
    assert calls == [
        *("onnxq_passes", "onnxq_targets", "onnxq_recipes"),  # of the built-ins
        *("onnxq_passes", "onnxq_run_pass", "onnxq_run_pass", "onnxq_exported"),
    ]
    assert "by vendor (vendor-package) -> [[vendor.note]]" in lines[3]
    assert "step=vendor.note text='it ran'" in lines[4]
    assert "by Timer (given in Python) [wrapper], the pass itself" in lines[4]
    assert "'timed': True" in lines[4] and "path=None" in lines[6] and "by Timer" in lines[6]
    assert all(line.endswith(" ms") for line in lines)


def test_a_trace_changes_no_model_and_shows_what_is_raised(install):
    plain, traced = (quantize(cnn(), "int8", feeds(cnn(), 2), workers=1, trace=trace) for trace in (None, [].append))
    assert plain.model.SerializeToString() == traced.model.SerializeToString()
    lines: list[str] = []
    assert find_plugins([Raises(RuntimeError("no licence"))], lines.append).broken
    assert any("raises RuntimeError: no licence" in line for line in lines)


def test_a_hook_may_be_implemented_under_another_name(install):
    class Renamed:
        @hookimpl(specname="onnxq_passes")
        def my_passes(self):
            return [Note]

    assert find_plugins([Renamed()]).passes["vendor.note"] is Note


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (Note, "onnxq_passes returns class Note instead of a list; return [Note]"),
        (Note(), "onnxq_passes returns a Note instead of a list"),
        (None, "onnxq_passes returns nothing; end it with: return [MyPass]"),
    ],
)
def test_what_is_no_list_of_passes_is_told(install, returned, why):
    class Plugin:
        @hookimpl
        def onnxq_passes(self):
            return returned

    assert why in find_plugins([Plugin()]).broken["Plugin"]
