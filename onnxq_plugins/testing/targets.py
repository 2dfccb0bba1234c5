"""What a target must be: what it declares is what its files have. check(target, bench), as the checks of passes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from onnxq_plugins import runtimes
from onnxq_plugins.engine import Result
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.measure.metrics import worst_sqnr
from onnxq_plugins.passes.ranges import Ranges
from onnxq_plugins.targets import Rule, Target
from onnxq_plugins.targets.misfits import misfits
from onnxq_plugins.testing.bench import SAMPLES, Bench
from onnxq_plugins.testing.models import ZOO, feeds, make

NEAR = 12.0  # dB that a file for a target has at least, in onnxruntime; a wrong zero point leaves next to nothing
_LAYERS = ("cnn", "mobilenet", "mlp", "transformer")


def check_target_declaration(target: Target, bench: Bench) -> None:
    """A name ``vendor.target``, a sentence about it, rules of known operators and widths, opsets in order.

    Why: recipes and reports name it; a rule that nothing can meet makes every model a refusal.
    """
    word = r"[a-z0-9]+(-[a-z0-9]+)*"
    assert re.fullmatch(rf"{word}(\.{word})+", target.name), (
        f"target '{target.name}' needs a name of lower-case words with a vendor in front, such as acme.npu."
    )
    assert target.doc.strip(), f"target '{target.name}' has no doc; say in a sentence what it is."
    assert target.rules, f"target '{target.name}' has no rules, so that it runs no layer quantized."
    for rule in target.rules:
        _check_rule(target, rule)
    low, high = target.opsets
    assert not high or low <= high, f"target '{target.name}' has opsets {target.opsets}; the lowest comes first."
    assert not high or high >= 13, f"target '{target.name}' reads opset {high} at most; scales per channel need 13."
    lost = {rule.op for rule in target.rules} | target.integer_ops
    assert not target.operators or lost <= target.operators, (
        f"target '{target.name}' has rules or integer_ops for {', '.join(sorted(lost - target.operators))}, which is not "
        "among its operators."
    )


def _check_rule(target: Target, rule: Rule) -> None:
    where = f"target '{target.name}', rule for {rule.op}"
    assert rule.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"), f"{where}: there are no layers of that operator."
    assert rule.activations in (0, 4, 8, 16), f"{where}: activations = {rule.activations} must be 0, 4, 8 or 16 bits."
    assert rule.weights and all(2 <= n <= 8 for n in rule.weights), f"{where}: weights must be widths from 2 to 8."
    assert rule.granularity, f"{where}: granularity is empty."


def check_target_files(target: Target, bench: Bench) -> None:
    """Its files have the codes, zero points, biases, operators and opsets that it declares, and pass onnx.checker.

    Why: the hardware's compiler refuses, or misreads, a file that has anything else.
    """
    for name, result in _results(target, bench):
        problems = misfits(target, result.model)
        assert not problems, f"the file of model '{name}' for target '{target.name}' {problems[0]}."


def check_target_values(target: Target, bench: Bench) -> None:
    """In onnxruntime its files compute what the float models do, as far as 8 bits allow; unless it cannot load them.

    Why: a grid that is off by one zero point still looks like a model.
    """
    for name, result in _results(target, bench):
        samples = feeds(make(name), SAMPLES, seed=1)
        try:
            quantized = runtimes.outputs(runtimes.session(result.model, written=True), samples)
        except OnnxqError:
            continue
        sqnr = worst_sqnr(runtimes.outputs(runtimes.session(make(name)), samples), quantized)
        assert sqnr > NEAR, f"the file of model '{name}' for target '{target.name}' has {sqnr:.0f} dB only in onnxruntime."


def check_target_recipe(target: Target, bench: Bench) -> None:
    """The recipe int8 works with it, or refuses a model in whole sentences; at least one model of the kit has a quantized
    layer.

    Why: users write ``-r int8 --target vendor.name`` first.
    """
    quantized = [
        name for name, result in _results(target, bench) if any(y.weight in result.plan for y in result.graph.layers)
    ]
    assert quantized, f"target '{target.name}' quantizes no layer of {', '.join(_LAYERS)}; do its rules fit the recipe int8?"


def _results(target: Target, bench: Bench) -> list[tuple[str, Result]]:
    """The models that int8 quantizes for the target. Fails where a refusal is no sentence."""
    results = []
    for name in _LAYERS + tuple(name for name in ZOO if name not in _LAYERS):
        try:
            results.append((name, bench.result((Ranges(),), name, changes={"target": target.name})))
        except OnnxqError as error:
            for problem in error.problems:
                assert problem.strip().endswith(".") and "\n" not in problem, (
                    f"target '{target.name}' refuses model '{name}' with {problem!r}, which is no sentence."
                )
    assert results, f"target '{target.name}' refuses every model of the kit, the last with: {problem}"
    return results


TARGET_CHECKS: Mapping[str, Callable[[Target, Bench], None]] = {
    check.__name__: check
    for check in (check_target_declaration, check_target_files, check_target_values, check_target_recipe)
}
