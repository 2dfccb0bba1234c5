"""The conformance kit: what users, recipes and other passes rely on, as tests of your pass.

    from onnxq_plugins.testing import parametrize_with_checks

    @parametrize_with_checks([MyPass(), MyPass(alpha=2)])
    def test_my_pass(step, check):
        check(step)

`checks.CHECKS` lists the checks; each is a function whose docstring says what is required, and why. `models.ZOO` holds the
small models they run on, `models.Net` builds others for your own tests. pytest is needed here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from onnxq_plugins.data import Source
from onnxq_plugins.errors import OnnxqError, known
from onnxq_plugins.graph.models import Model
from onnxq_plugins.job import Pass, Recipe
from onnxq_plugins.targets import Target
from onnxq_plugins.testing.bench import Bench, Own
from onnxq_plugins.testing.checks import CHECKS
from onnxq_plugins.testing.hooks import PLUGIN_CHECKS, checks_of
from onnxq_plugins.testing.targets import TARGET_CHECKS

__all__ = [
    "CHECKS",
    "PLUGIN_CHECKS",
    "TARGET_CHECKS",
    "cases",
    "parametrize_plugin",
    "parametrize_target",
    "parametrize_with_checks",
]


def parametrize_with_checks(
    steps: Iterable[Pass],
    *,
    expected_failures: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    plugins: Iterable[object] = (),
    models: Mapping[str, Model] | None = None,
    data: Source | Mapping[str, Source] | None = None,
) -> Callable[..., Any]:
    """Decorate a test function of (step, check) that calls ``check(step)``: one test for each pass and check.

    steps               passes, with the parameters to try
    expected_failures   name of a check -> reason why these passes cannot meet it; such a test must fail, or it is an error
    recipe              tables of the recipe that the passes are for, such as {"weights": {"bits": 4}}, possibly with passes
                        that run before them; int8 by default
    plugins             plugin objects that are needed beside the installed ones; the passes need not be installed
    models              more models to try, by names for messages: paths, or whatever `onnxq_plugins.quantize` takes
    data                samples for them: of each by its name, or one source for all, as `onnxq_plugins.open_data` takes it.
                        24 are used: a third to calibrate, the others to judge. Without, inputs are random numbers

    Raises OnnxqError for a check that does not exist, and for a model with the name of one of the kit's.
    """
    import pytest

    context: dict[str, Any] = {"recipe": recipe, "plugins": tuple(plugins), "models": models, "data": data}
    return pytest.mark.parametrize(
        ("step", "check"),
        [case for step in steps for case in cases(step, expected_failures=expected_failures, **context)],
    )


def cases(
    step: Pass,
    *,
    expected_failures: Mapping[str, str] | None = None,
    recipe: Mapping[str, Any] | None = None,
    plugins: Iterable[object] = (),
    models: Mapping[str, Model] | None = None,
    data: Source | Mapping[str, Source] | None = None,
) -> list[Any]:
    """The tests of one pass as values of ``pytest.mark.parametrize(("step", "check"), ...)``, to join those of passes that
    need different recipes. Parameters as in `parametrize_with_checks`."""
    import pytest

    expected = dict(expected_failures or {})
    if unknown := [name for name in expected if name not in CHECKS]:
        raise OnnxqError(f"expected_failures: there is no check '{unknown[0]}'; {known(unknown[0], CHECKS)}.")
    if not isinstance(step, Pass):
        raise OnnxqError(f"{step!r} is not a pass; give instances, such as MyPass().")
    models = models or {}
    each = data if isinstance(data, Mapping) and data.keys() <= models.keys() else dict.fromkeys(models, data)
    own = {name: Own(name, model, each.get(name)) for name, model in models.items()}
    bench = Bench(dict(recipe or {}), tuple(plugins), own)
    return [
        pytest.param(
            step,
            partial(check, bench=bench),
            id=f"{_label(step)}-{name.removeprefix('check_')}",
            marks=[pytest.mark.xfail(strict=True, raises=AssertionError, reason=expected[name])] if name in expected else [],
        )
        for name, check in CHECKS.items()
    ]


def parametrize_target(target: Target, *, plugins: Iterable[object] = ()) -> Callable[..., Any]:
    """Decorate a test function of (check) that calls ``check()``: one test for each check of `targets.TARGET_CHECKS`.

    plugins   plugin objects that bring the target, if it is not installed
    """
    import pytest

    bench = Bench({}, tuple(plugins))
    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(partial(check, target, bench), id=f"{target.name}-{name.removeprefix('check_target_')}")
            for name, check in TARGET_CHECKS.items()
        ],
    )


def parametrize_plugin(plugin: object, *, recipe: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Decorate a test function of (check) that calls ``check()``: one test for each check of `hooks.PLUGIN_CHECKS` that is
    about a hook which the plugin has.

    plugin   a module or an object with hooks; it need not be installed
    recipe   tables of a recipe that its hooks act on, such as {"target": "acme.npu"}
    """
    import pytest

    bench = Bench({"pass": [{"use": "ranges"}], **(recipe or {})}, (plugin,))
    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(partial(check, plugin, bench), id=name.removeprefix("check_"))
            for name, check in checks_of(plugin).items()
        ],
    )


def _label(step: Pass) -> str:
    """The name of the pass in a test's name, with parameters that differ from their defaults."""
    values = Recipe(passes=(step,)).to_dict()["pass"][0]
    shown = ",".join(f"{key}={value}" for key, value in values.items() if key != "use")
    return f"{step.name}({shown})" if shown else step.name
