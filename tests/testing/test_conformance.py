"""Every built-in pass goes through the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from onnxq_plugins.passes import (
    BUILTIN,
    AbsorbBias,
    ActivationRanges,
    Align,
    BiasCorrect,
    BoundAccumulator,
    Centre,
    CodingLength,
    DataFree,
    Equalize,
    FixedRanges,
    MixedPrecision,
    Orthogonality,
    OutputNoise,
    Placement,
    Ranges,
    Reorder,
    ResidualEnsemble,
    ResidualExpansion,
    Round,
    ScaleInputs,
    ShiftEqualize,
    SplitChannels,
    SplitHeads,
    SplitOutliers,
    SplitWeights,
    SubLayer,
    Subtensor,
    VectorScale,
    Widen,
)
from onnxq_plugins.testing import CHECKS, cases
from tests.zoo import LONG_CHECKS

TILES = {"weights": {"bits": 4, "sub_block": [1, 16]}}
TENSOR = {"weights": {"block": "tensor"}}
NARROWER = {
    "check_not_harmful": "it makes weights narrower: size for accuracy",
    "check_solved_left_alone": "it chooses the width of every weight, solved or not",
}
NO_EFFECT = {"check_effect": "the inputs and outputs of the kit's models are alike"}

CASES = [
    cases(AbsorbBias()),
    cases(ActivationRanges()),
    cases(BiasCorrect()),
    cases(
        BiasCorrect(method="analytic"),
    ),
    cases(BoundAccumulator(), expected_failures={"check_not_harmful": "codes that fit 16-bit accumulators lose accuracy"}),
    cases(Centre()),
    cases(CodingLength(), expected_failures=NARROWER),
    cases(
        DataFree(samples=8, inputs={"x": [-4.0, 4.0]}),
        expected_failures={"check_not_harmful": "it knows less of the inputs than samples do"},
    ),
    cases(Equalize(), recipe=TENSOR),
    cases(Equalize(by="activations"), recipe=TENSOR),
    cases(MixedPrecision(samples=4, strategy="binary", curve=0, method="nearest"), expected_failures=NARROWER),
    cases(Orthogonality(samples=8), expected_failures=NARROWER),
    cases(FixedRanges(), expected_failures={"check_effect": "without ranges by hand it has nothing to do"}),
    cases(OutputNoise(share=0.2), recipe=TILES),
    cases(Align(), expected_failures={"check_effect": "the models' channels fit blocks of 4, or are slow in no kernel"}),
    cases(Placement(least=0.0, gain=0.0, check=False)),
    cases(Ranges(method="mse")),
    cases(Reorder(sweeps=1), recipe=TILES),
    cases(
        ResidualEnsemble(groups=(1, 1)),
        recipe={"weights": {"bits": 4}},
        expected_failures=dict.fromkeys(
            ("check_float_function", "check_odd_graphs"), "it refuses networks whose operators rule a sum of networks out"
        ),
    ),
    cases(ResidualExpansion(), recipe={"weights": {"bits": 4}}),
    cases(ResidualExpansion(form="branches", share=0.5), recipe={"weights": {"bits": 4}}),
    cases(Round(method="gptq"), expected_failures={"check_solved_left_alone": "it rounds anew"}),
    cases(ScaleInputs()),
    cases(ShiftEqualize(), recipe=TENSOR),
    cases(SplitChannels(gain=0.1, below=100.0)),
    cases(SplitHeads(gain=0.1, below=100.0), expected_failures=NO_EFFECT),
    cases(SplitOutliers(gain=0.1, worth=0.001)),  # the models of the kit are so small that sums cost much
    cases(SplitWeights(gain=1.0, below=200.0)),
    cases(SubLayer(rounds=1), recipe=TILES),
    cases(Subtensor(), recipe=TENSOR),
    cases(Subtensor(split=True), recipe=TENSOR),
    cases(VectorScale(), recipe=TILES),
    cases(Widen(), recipe=TILES),
]


VARIANTS = (
    BiasCorrect(method="analytic"),
    Equalize(by="activations"),
    ResidualExpansion(form="branches", share=0.5),
    Subtensor(split=True),
)


# They change the float network, or choose widths, in the same way for every target.
SAME_FOR_EVERY_TARGET = (
    *(AbsorbBias, BiasCorrect, CodingLength, DataFree, Equalize, Orthogonality, ResidualEnsemble, ScaleInputs),
    *(SplitHeads, SplitWeights),
)


def parameters() -> Iterator[object]:
    """The cases. Of the long ones, those run with the slow tests where another variant of the pass is here, or where targets
    do not matter to it."""
    for several in CASES:
        for name, case in zip(CHECKS, several, strict=True):
            slow = name in LONG_CHECKS and case.values[0] in VARIANTS
            slow |= name == "check_targets" and isinstance(case.values[0], SAME_FOR_EVERY_TARGET)
            yield pytest.param(*case.values, id=case.id, marks=[*case.marks, *[pytest.mark.slow] * slow])


@pytest.mark.parametrize(("step", "check"), parameters())
def test_builtin(step, check):
    check(step)


def test_every_builtin_pass_is_here():
    assert {type(several[0].values[0]) for several in CASES} == set(BUILTIN)
    assert all(len(several) == len(CHECKS) for several in CASES)
