"""What to change first: said where something is wrong, with the right thing to do, and nothing where nothing is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxq_plugins.errors import Reason
from onnxq_plugins.runtimes.audit import Audit, LayerAudit
from onnxq_plugins.runtimes.changes import what_to_change
from onnxq_plugins.runtimes.profiles import Profile
from onnxq_plugins.runtimes.speed import Speed
from onnxq_plugins.runtimes.spending import Spending


def spent(**ops: tuple[int, float]) -> Spending:
    """A chain of operators: so many of each, microseconds of each."""
    names = [op for op, (count, _) in ops.items() for _ in range(count)]
    times = [time for count, time in ops.values() for _ in range(count)]
    return in_row(names, times)


def in_row(names: list[str], times: list[float]) -> Spending:
    nodes = [helper.make_node(op, [f"t{n}"], [f"t{n + 1}"], name=f"{op}{n}") for n, op in enumerate(names)]
    types = [json.dumps([{"uint8" if op.startswith(("QLinear", "Deq")) else "float": [1]}]) for op in names]
    return Spending.of(Profile(sum(times) / 1e3, onnx.GraphProto(node=nodes), np.array(times) / 1e3, types))


def audit(before: Spending, after: Spending, layers=(), placed: bool | None = False, nodes=()) -> Audit:
    ratio = before.microseconds / after.microseconds
    speed = Speed(before.microseconds / 1e3, after.microseconds / 1e3, ratio, ratio, ratio, 60)
    return Audit(tuple(layers), {}, speed=speed, speedup=ratio, spending=(before, after), placed=placed, nodes=dict(nodes))


FLOAT = spent(Conv=(10, 50.0), PRelu=(10, 10.0))


def between(count: int, each: float) -> Spending:
    """Integer layers with float operators between two conversions."""
    row = ["QLinearConv", "DequantizeLinear", "PRelu", "QuantizeLinear"] * count
    return in_row(row, [20.0, each, 10.0, each] * count)


def test_nothing_is_said_where_nothing_is_wrong():
    fast = audit(FLOAT, spent(QLinearConv=(10, 15.0), QuantizeLinear=(1, 2.0), PRelu=(10, 1.0)))
    assert what_to_change(fast) == ()
    assert what_to_change(replace(fast, spending=(), speed=None)) == ()
    assert what_to_change(audit(FLOAT, FLOAT)) == ()


def test_a_network_that_is_too_small_stays_float():
    (text,) = what_to_change(audit(spent(Gemm=(2, 10.0)), spent(QGemm=(2, 12.0), QuantizeLinear=(1, 6.0))))
    assert text.startswith("slower than float, 0.67x its speed: keep the float model, whose run of 20 us is mostly the call")


def test_slower_than_float_by_conversions():
    slow = audit(FLOAT, between(10, 40.0))
    (text,) = what_to_change(slow)
    assert "0.55x its speed" in text and "500 us more, 800 for conversions (mostly around 10 PRelu in float)" in text
    assert "-r int8 leaves in float what is faster there" in text and "or keep the float model" in text
    (text,) = what_to_change(slow, placed=True)  # it already did
    assert "-r int8 leaves" not in text and text.endswith(
        "keep the float model (-r int8-storage stores its weights in 8 bits, at its speed)"
    )


def test_slower_than_float_by_layers():
    (text,) = what_to_change(audit(FLOAT, spent(QLinearConv=(10, 90.0), PRelu=(10, 10.0))))
    assert "400 us more, 400 for layers, whose float kernels are faster for these shapes" in text


def test_slower_than_float_by_other_operators():
    (text,) = what_to_change(audit(FLOAT, spent(QLinearConv=(10, 40.0), PRelu=(10, 40.0), QLinearMul=(4, 50.0))))
    assert "400 us more, 300 for activations (10 PRelu), 200 for sums and products (4 QLinearMul): " in text


def test_conversions_of_a_network_that_is_faster_all_the_same():
    fine = audit(FLOAT, between(10, 8.0))
    (text,) = what_to_change(fine)
    assert text.startswith("35% of the time is 20 conversions (mostly around 10 PRelu in float): ")
    assert what_to_change(fine, placed=True) == ()
    assert what_to_change(replace(fine, spending=fine.spending[1:], speed=None)) == (text,)  # of one model alone
    natural = spent(MatMul=(4, 10.0), Transpose=(4, 10.0))  # attention's own
    assert what_to_change(audit(natural, natural)) == ()


@pytest.mark.parametrize(
    ("kind", "ours", "said"),
    [("wide-codes", True, "8 bits for their activations"), ("float-input", False, "quantize their inputs")],
)
def test_layers_that_were_meant_to_be_integer(kind, ours, said):
    rows = [LayerAudit(f"conv{n}", "Conv", True, "QLinearConv", True) for n in range(5)]
    rows += [LayerAudit(f"conv{n}", "Conv", True, "Conv", False, Reason(kind, "because")) for n in range(5, 8)]
    after = in_row(["QLinearConv"] * 5 + ["Conv"] * 3, [20.0] * 5 + [50.0] * 3)
    nodes = {f"conv{n}": f"{'Conv' if n > 4 else 'QLinearConv'}{n}" for n in range(8)}
    theirs = audit(FLOAT, after, rows, False, nodes.items())
    (text,) = what_to_change(theirs)
    assert text.startswith("3 layers run in float, 60% of the time, such as 'conv5': because; ") and said in text
    assert bool(what_to_change(replace(theirs, placed=None))) == ours  # onnxq itself leaves layers in float on purpose
    assert (
        what_to_change(replace(theirs, spending=(FLOAT, in_row(["QLinearConv"] * 5 + ["Conv"] * 3, [50.0] * 5 + [5.0] * 3))))
        == ()
    )


def test_a_network_of_few_layers_is_told_its_limit():
    before = spent(Conv=(2, 50.0), LSTM=(2, 350.0), Resize=(1, 200.0))
    after = spent(QLinearConv=(2, 20.0), LSTM=(2, 350.0), Resize=(1, 200.0))
    (text,) = what_to_change(audit(before, after))
    assert "layers are only 10% of the float model's time (LSTM and the like 70%, Resize and the like 20%)" in text
    assert "1.1x as fast" in text


def test_at_most_three_sentences():
    before = spent(Conv=(1, 50.0), LSTM=(1, 300.0))
    rows = [LayerAudit("c", "Conv", True, "Conv", False, Reason("runtime", "because"))]
    found = what_to_change(
        audit(
            before,
            in_row(["LSTM", "QuantizeLinear", "Conv", "DequantizeLinear"], [300.0, 90.0, 200.0, 90.0]),
            rows,
            False,
            {"c": "Conv2"}.items(),
        )
    )
    assert 2 <= len(found) <= 3 and found[0].startswith("slower than float")
