"""What a pass must do, one function per requirement: check(step, bench). Each returns, or fails with an AssertionError of
one sentence that says what is wrong and what to do.

Every requirement is here because a user's model, an older recipe or another pass in the same recipe relies on it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import random
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import numpy as np

from onnxq_plugins import measure
from onnxq_plugins.engine import Result
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.job import Pass, Recipe, default_of
from onnxq_plugins.laws import DRIFT
from onnxq_plugins.measure.arrays import leaves
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.passes import BUILTIN
from onnxq_plugins.passes.ranges import Ranges
from onnxq_plugins.passes.round import Round
from onnxq_plugins.recipe import parse
from onnxq_plugins.spec import QuantSpec
from onnxq_plugins.targets import BUILTIN as TARGETS
from onnxq_plugins.testing.bench import SAMPLES, Bench, Watch, outputs
from onnxq_plugins.testing.models import HARSH, MORE, ZOO, batch, feeds, harsh, make
from onnxq_plugins.testing.values import in_toml, plain

PLAIN = ("cnn", "mobilenet", "mlp")
HARM = 1.0  # dB that a pass may lose on average over the plain models, whose outputs are few
_ALIKE = {  # targets whose layers have the rules of another one; they differ in what is around these
    target.name for at, target in enumerate(TARGETS) if any(target.rules == other.rules for other in TARGETS[:at])
}
AGREE = 35.0  # dB between two ways of running one model: kernels round ties apart by one code


def check_declaration(step: Pass, bench: Bench) -> None:
    """A frozen dataclass with a name ``vendor.pass``, a docstring, and a default for every parameter that a recipe can hold.

    Why: recipes are text. What a recipe cannot express, users cannot set, and a model's metadata cannot record; a pass
    without defaults cannot be listed with ``use = "..."`` alone; the vendor keeps two packages apart.
    """
    kind = type(step)
    where = f"class {kind.__qualname__}"
    frozen = is_dataclass(kind) and getattr(vars(kind).get("__dataclass_params__"), "frozen", False)
    assert isinstance(step, Pass) and frozen, f"{where} must be a frozen dataclass: write @dataclass(frozen=True) above it."
    assert isinstance(kind.name, str) and "name" not in [f.name for f in fields(kind)], (
        f'{where}: name must belong to the class and not be a parameter; write name: ClassVar[str] = "vendor.pass".'
    )
    word = r"[a-z0-9]+(-[a-z0-9]+)*"
    assert re.fullmatch(word if kind in BUILTIN else rf"{word}(\.{word})+", kind.name), (
        f"{where}: name '{kind.name}' must be lower-case words with a vendor in front, such as acme.clip-weights."
    )
    assert isinstance(kind.exact, bool), f"{where}: exact must be True or False, it is {kind.exact!r}."
    own = vars(kind).get("__doc__") or ""
    assert own.strip() and not own.startswith(f"{kind.__name__}("), (
        f"{where} needs a docstring, which 'onnxq plugins {kind.name}' shows; say what it does, with what parameters."
    )
    for field in fields(kind):
        assert not field.init or field.default is not MISSING or field.default_factory is not MISSING, (
            f"{where}: parameter '{field.name}' has no default; give it one, so that a recipe may leave it out."
        )
    every = {f.name: default_of(f) for f in fields(kind) if f.init}
    for source in ({k: v for k, v in every.items() if v is not None}, bench.table(step)["pass"][-1]):
        for key, value in source.items():
            try:
                again = tomllib.loads(f"v = {in_toml(value)}")["v"]
            except (TypeError, ValueError):
                again = None
            assert json.dumps(again, sort_keys=True) == json.dumps(plain(value), sort_keys=True), (
                f"{where}: {key} = {value!r} cannot be written in TOML and JSON; use numbers, text, booleans, and tuples or "
                "dicts of these."
            )


def check_recipe_round_trip(step: Pass, bench: Bench) -> None:
    """Written as a table, as JSON and into a model's metadata, and read again, the pass is the same one.

    Why: a model records the recipe it was made by, and that recipe must make the same model again.
    """
    passes = {**bench.known.passes, type(step).name: type(step)}
    recipe = Recipe(passes=(step,))
    for how, table in (("a recipe", recipe.to_dict()), ("JSON", json.loads(recipe.to_json()))):
        try:
            again = parse(table, passes).passes[0]
        except OnnxqError as error:
            raise AssertionError(
                f"pass '{step.name}' cannot be read from {how} that it was written to ({error.problems[0]}); "
                "annotate each parameter with the type of its values."
            ) from error
        assert again == step, (
            f"pass '{step.name}' comes back from {how} as {again!r} instead of {step!r}; let parameters "
            "be plain values that __post_init__ does not change."
        )
    result = bench.must((step,), "cnn")
    kept = json.loads(next(p.value for p in result.model.metadata_props if p.key == "onnxq.recipe"))
    again = parse(kept, passes).passes[-1]
    assert again == step, (
        f"pass '{step.name}' is {again!r} in the model's metadata instead of {step!r}; keep parameters plain."
    )


def check_float_function(step: Pass, bench: Bench) -> None:
    """The float model after the pass has the same inputs and outputs, and with ``exact = True`` the same values, to 1e-4 of
    the largest output, on the calibration data (law L1). Lossy changes belong in the plan.

    Why: a wrong rewrite may hide in the noise of quantization for long; compared in float, it cannot.
    """
    for name in (*PLAIN, "transformer", *bench.own):
        original, samples = bench.model(name), bench.samples(name)
        result = bench.must((step,), name)
        rewritten = result.float_model
        for kind in ("input", "output"):
            old, new = ([port.name for port in getattr(m.graph, kind)] for m in (original, rewritten))
            assert old == new, (
                f"pass '{step.name}' changes the {kind}s of model '{name}' from {old} to {new}; keep their names and order."
            )
        results, reference = outputs(rewritten, samples), bench.reference(name, samples)
        assert _finite(results) or not _finite(reference), (
            f"after pass '{step.name}' the float model '{name}' returns NaN or Inf; check the pass for divisions by 0."
        )
        drift = measure.drift(reference, results)
        assert not step.exact or drift <= DRIFT, (
            f"pass '{step.name}' changes the float outputs of model '{name}' by {drift:.1e} (limit {DRIFT:.0e}) though it "
            "declares exact = True; fix the rewrite, or declare exact = False if the change is intended."
        )


def check_plan(step: Pass, bench: Bench) -> None:
    """Each entry of the plan that the pass adds or changes is about the weight of a layer or an activation of the graph as
    the pass leaves it, and is consistent: codes on its grid, scales as requested. The whole can be exported, or is refused
    in sentences. Tried with the recipe as it is, with scales that must be powers of two, and after ``round``, which leaves
    nothing open.

    Why: an entry for a tensor that does not exist quantizes nothing, silently; a scale of 0 or a code off the grid goes
    unnoticed.
    """
    weights = {**bench.recipe.get("weights", {}), "pow2": True}
    attempts: list[tuple[str, tuple[Pass, ...], dict[str, Any]]] = [(name, (step,), {}) for name in (*PLAIN, *bench.own)]
    attempts += [("cnn", (step,), {"weights": weights}), ("cnn", (Ranges(), Round(seconds=0), step), {})]
    for name, steps, changes in attempts:
        try:
            bench.result(steps, name, changes=changes)  # the engine checks each entry after each pass
            continue
        except OnnxqError as error:
            _sentences(step, name, error)
        watch = Watch(step.name)
        with contextlib.suppress(OnnxqError):
            bench.quantize(steps, name, watch=watch, changes=changes)
        assert watch.runs, f"pass '{step.name}' was not run on model '{name}'; give the kit a suitable recipe (recipe=...)."


def check_effect(step: Pass, bench: Bench) -> None:
    """On at least one of the small models the file is another one with the pass than without it.

    Why: a pass whose condition never holds looks like one that works. Give the kit the recipe that the pass is for. A pass
    that only measures, or that acts on nothing the kit has, says so in ``expected_failures``.
    """
    for name in (*bench.own, *PLAIN, *(name for name in (*ZOO, *MORE) if name not in PLAIN)):
        with contextlib.suppress(OnnxqError, AssertionError):  # other checks are about what fails
            files = [bench.result(steps, name).model.graph.SerializeToString() for steps in ((), (step,))]
            if files[0] != files[1]:
                return
    raise AssertionError(
        f"pass '{step.name}' changes nothing on any of the {len(ZOO) + len(MORE)} models of the kit: does its condition "
        "ever hold, and does it assign job.plan (job.plan |= ...), if it plans? Give the kit the recipe it is for "
        "(recipe=...), or a model that has what it looks for (models={'mine': ...})."
    )


def check_solved_left_alone(step: Pass, bench: Bench) -> None:
    """After ``ranges`` and ``round``, a pass of stage ``solve`` leaves every solved entry as it is, and a pass of any stage
    changes no weight without its entry, unless it is a ``rewrite``.

    Why: users put a pass behind another to have both. One that overwrites what was solved, or changes the weights that
    codes were found for, undoes the other in silence. ``finish`` is the stage of passes that work on what was solved.
    """
    for name in PLAIN:
        watch = Watch(step.name)
        with contextlib.suppress(OnnxqError):
            result = bench.quantize((Ranges(), Round(seconds=0), step), name, watch=watch)
            dropped = next((note for note in result.report.notes if f"'{step.name}' changed" in note), "")
            assert not dropped, f"on model '{name}', {dropped}; plan it anew, or declare stage = \"rewrite\"."
        for before, after, *_ in watch.runs:
            solved = {n: spec for n, spec in before.items() if spec.solved and n in after}
            other = [n for n, spec in solved.items() if not _same(spec, after[n])]
            assert not other or step.stage != "solve", (
                f"pass '{step.name}' overwrites {len(other)} entries that an earlier pass has solved, such as '{other[0]}' "
                f"of model '{name}'; skip entries with spec.solved, or, if that is the point, declare stage = \"finish\"."
            )


def check_repeatable(step: Pass, bench: Bench) -> None:
    """One seed, one result: the same bytes in a second run, with two workers, and for any state of numpy's global generator.

    Why: a model that cannot be reproduced cannot be debugged. Draw from ``job.rng``, and before work is distributed.
    """
    first = _bytes(bench.must((step,), "mobilenet"))
    with _global_random_state():
        np.random.seed(12345)  # noqa: NPY002  its state must not matter
        random.seed(12345)
        assert _bytes(bench.must((step,), "mobilenet", anew=True)) == first, (
            f"pass '{step.name}' makes another model when it runs again with the same seed; draw random numbers from "
            "job.rng, do not depend on a clock, and do not loop over a set."
        )
    assert _bytes(bench.must((step,), "mobilenet", anew=True, workers=2)) == first, (
        f"pass '{step.name}' makes another model with two workers than with one; draw random numbers before work is "
        "distributed, and collect results in the order of the layers."
    )


def check_inputs_left_alone(step: Pass, bench: Bench) -> None:
    """The run changes neither the model that was passed in, nor the data, nor the global random states.

    Why: they belong to the caller, who continues to use them.
    """
    for name in PLAIN[:2]:
        model = type(make(name)).FromString(make(name).SerializeToString())
        data = feeds(model, SAMPLES)
        copies = [{k: v.copy() for k, v in feed.items()} for feed in data]
        with _global_random_state() as same:
            bench.must((step,), name, anew=True, model=model, data=data)
            assert same(), f"pass '{step.name}' uses or sets a global random generator; draw from job.rng instead."
        assert model.SerializeToString() == make(name).SerializeToString(), (
            f"pass '{step.name}' changes the model it was given; change job.graph through its methods (set_constant ...), "
            "not the arrays in it."
        )
        assert all(np.array_equal(a[k], b[k]) for a, b in zip(data, copies, strict=True) for k in a), (
            f"pass '{step.name}' changes the calibration data; copy a sample before you write into it."
        )


def check_targets(step: Pass, bench: Bench) -> None:
    """For every built-in target (and the recipe's own), the model is refused in sentences or runs in onnxruntime, with the
    same outputs with and without its graph optimizations.

    Why: unoptimized, the model computes what the file says; optimized, what the integer kernels do. A pass that plans what
    kernels compute differently is wrong in one of the two.
    """
    own = str(bench.recipe.get("target", Recipe.target))
    for target in dict.fromkeys([own, *(t.name for t in TARGETS)]):
        for name in PLAIN[:2] if target not in _ALIKE else PLAIN[1:2]:
            changes = {} if target == own else {"target": target}
            try:
                result = bench.result((step,), name, changes=changes)
            except OnnxqError as error:
                _sentences(step, name, error)
                continue
            agreement = _agreement(bench, result, name, step, f" for target '{target}'")
            # a processor without VNNI saturates with some codes, whatever the pass
            without = 0.0
            if agreement <= AGREE:
                without = _agreement(bench, bench.result((), name, changes=changes), name, step, "")
            assert agreement > AGREE or agreement > without - 6, (
                f"after pass '{step.name}', the outputs of model '{name}' for target '{target}' with and without "
                f"onnxruntime's optimizations agree to {agreement:.0f} dB only; see docs/runtime.md for what its kernels "
                "round."
            )


def check_twice(step: Pass, bench: Bench) -> None:
    """Twice in a row in one recipe, the pass works, and keeps its promise about the float function.

    Why: recipes are assembled by people and by tools. The second time, scales and codes may be solved, layers replaced and
    names in use.
    """
    for name in (*PLAIN, *bench.own):
        result = bench.must((step, step), name, verify=step.exact)
        _agreement(bench, result, name, step, " run twice in a row")


def check_odd_graphs(step: Pass, bench: Bench) -> None:
    """The pass works, and does not change the float function if it is exact, on graphs with shared weights, no layer at all,
    dead channels, channel counts that no block divides, grouped and depthwise convolutions, ConvTranspose, attention,
    control flow, outlier channels and a fixed batch size, and where the recipe leaves every layer float.

    Why: real models have all of these. A pass leaves unchanged what it cannot handle, and reports it; it does not refuse the
    model.
    """
    everything_float = {"layer": [{"quantize": False}]}
    cases: list[tuple[str, dict[str, Any], str]] = [(name, {}, "") for name in (*ZOO, *MORE) if name not in PLAIN]
    for name, changes, how in [*cases, ("cnn", everything_float, " with all layers left float")]:
        try:
            result = bench.result((step,), name, changes=changes, verify=step.exact)
        except OnnxqError as error:
            try:
                bench.result((), name, changes=changes)
            except OnnxqError:
                continue  # the recipe does not suit the model, whatever the pass
            raise AssertionError(
                f"pass '{step.name}' raises an error on model '{name}'{how}, which works without it "
                f"({error.problems[0]}); leave unchanged what it cannot handle."
            ) from error
        _agreement(bench, result, name, step, how)


def check_not_harmful(step: Pass, bench: Bench) -> None:
    """With the pass the outputs are no more than 1 dB further from float, on the average of three small models, than with
    the same recipe without it; nor on that of the models given to the kit; nor where the calibration data mislead: four
    samples, a few values far beyond all others, padded sequences. Judged on other samples.

    Why: users add a pass to gain something. A pass that trades accuracy for something else (size, narrow accumulators) fails
    here by design: list this check in ``expected_failures`` and say what it gains.
    """
    gains, own = (
        {name: _gain(bench, name, [bench.must(steps, name) for steps in ((), (step,))]) for name in names}
        for names in (PLAIN, bench.own)
    )
    misled = {}
    for how in HARSH:
        name, _ = harsh(how)
        with contextlib.suppress(OnnxqError):  # what it refuses it does not harm
            misled[how] = _gain(bench, name, [bench.result(steps, name, misled=how) for steps in ((), (step,))])
    for group in (gains, own, misled):
        loss = -np.mean([*group.values()]) if group else 0.0
        each = ", ".join(f"{how} {gain:+.1f}" for how, gain in group.items())
        assert loss <= HARM, (
            f"pass '{step.name}' loses {loss:.1f} dB compared with the recipe without it ({each}); if it trades that for "
            "something else, say so in expected_failures."
        )


def check_report(step: Pass, bench: Bench) -> None:
    """`apply` returns a dict (or None), and the whole report is JSON without NaN.

    Why: ``--report`` writes it, and tools read it.
    """
    watch = Watch(step.name)
    result = bench.must((step,), "mobilenet", anew=True, watch=watch)
    for *_, returned in watch.runs:
        kind = type(returned).__name__
        assert isinstance(returned, dict), f"pass '{step.name}' returns a {kind}; return a dict, or nothing."
        assert all(isinstance(key, str) for key in returned), f"pass '{step.name}' returns keys that are not text."
    try:
        json.dumps(result.report, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(
            f"after pass '{step.name}' the report is not JSON ({error}); turn numpy values into int, float or list."
        ) from error


def check_without_data(step: Pass, bench: Bench) -> None:
    """Without calibration data the pass works, or a sentence says that data are needed. Tried with activations that need
    ranges, and with weights alone, which need none.

    Why: weights can be quantized without data, and people do so. See ``job.calibration.ready``.
    """
    for how, changes in (("", {}), (" with weights alone", {"target": "storage", "activations": {"bits": 32}})):
        try:
            result = bench.quantize((step,), "cnn", data=None, changes=changes)
        except OnnxqError as error:
            _sentences(step, "cnn", error)
            assert re.search(r"\bdata\b", str(error)), (
                f"pass '{step.name}'{how} raises an error without data that does not mention data ({error.problems[0]}); "
                "job.calibration raises one that does; or leave out what needs data and note it."
            )
        else:
            _agreement(bench, result, "cnn", step, f" without data{how}")


CHECKS: dict[str, Callable[..., None]] = {
    name: check for name, check in list(globals().items()) if name.startswith("check_") and inspect.isfunction(check)
}


# ---- details --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _global_random_state() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether the global generators are unchanged so far; restores them at the end."""
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    before = _random_key()
    try:
        yield lambda: _random_key() == before
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])


def _random_key() -> str:
    numpys: Iterable[Any] = np.random.get_state()  # noqa: NPY002
    return repr([x.tobytes() if isinstance(x, np.ndarray) else x for x in numpys]) + repr(random.getstate())


def _gain(bench: Bench, name: str, results: Sequence[Result]) -> float:
    """dB by which the second result is nearer to the float model of that name than the first, on other samples."""
    samples = bench.unseen(name)
    reference = bench.reference(name, samples)
    before, after = (worst_sqnr(reference, outputs(result.model, samples)) for result in results)
    return after - before


def _finite(values: Iterable[Any]) -> bool:
    """False if an output holds NaN or Inf."""
    return all(np.isfinite(y).all() for value in values for y in leaves(value) if y.dtype.kind == "f")


def _same(spec: QuantSpec, other: QuantSpec) -> bool:
    """True if two entries are equal, arrays included."""
    return spec is other or all(
        np.array_equal(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else a == b
        for f in fields(spec)
        for a, b in [(getattr(spec, f.name), getattr(other, f.name))]
    )


def _bytes(result: Result) -> bytes:
    return bytes(result.model.SerializeToString())


def _agreement(bench: Bench, result: Result, name: str, step: Pass, how: str) -> float:
    """SQNR between the optimized and the plain run, in dB. Fails if outputs are not finite or have the wrong shape; a model
    of the kit with a dynamic batch runs on one sample and on three."""
    samples = bench.unseen(name, 3)
    fixed = name in bench.own or result.model.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    reference = bench.reference(name, samples)
    runs = [outputs(result.model, samples, optimize) for optimize in (True, False)]
    runs += [] if fixed else [outputs(result.model, [batch(samples)])]
    shapes = [y.shape for value in reference for y in leaves(value)]
    for run in runs:
        alike = [y.shape for value in run for y in leaves(value)] == shapes
        assert alike and (_finite(run) or not _finite(reference)), (
            f"after pass '{step.name}'{how}, model '{name}' returns outputs of another shape, or NaN or Inf; compare "
            "result.float_model with the original."
        )
    return worst_sqnr(runs[0], runs[1])


def _sentences(step: Pass, name: str, error: OnnxqError) -> None:
    """Fails unless a refusal consists of whole sentences, each on one line."""
    for problem in error.problems or ("",):
        assert problem.strip().endswith(".") and "\n" not in problem, (
            f"pass '{step.name}' refuses model '{name}' with {problem!r}; raise OnnxqError with one sentence on one line: "
            "what is wrong, where, and what to do."
        )
