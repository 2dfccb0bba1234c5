"""Residual expansion: bounds hold, the forms compute the same sum, few channels or all, and the runtime keeps it integer."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import OnnxqError, audit_model, hookimpl, measure, quantize
from onnxq_plugins.graph import channel_groups, load, split_input, split_values
from onnxq_plugins.passes import ResidualExpansion, bias_correct
from onnxq_plugins.solvers import expansion as solver
from onnxq_plugins.spec import QuantSpec, encode, fake, from_range
from onnxq_plugins.targets.npu import NPU4
from tests.zoo import (
    ZOO,
    Net,
    cnn,
    conv_transpose,
    examples,
    feeds,
    mlp,
    mobilenet,
    resnet20,
    run,
    slowly,
    some,
    transformer,
)


def weights(seed, size=1.0, outputs=5):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(outputs, 4, 3)) * np.exp(2 * rng.normal(size=(outputs, 1, 1))) * size
    w[rng.random(outputs) < 0.15] = 0
    return w.astype(np.float32)


def recipe(step=None, bits=4, **more):
    return {"weights": {"bits": bits}, "pass": [{"use": "ranges"}, {"use": "residual-expansion", **(step or {})}], **more}


def float_recipe(step, bits=4):
    return recipe(step, bits, target="storage", activations={"bits": 32})


def told(made):
    return next(step["result"] for step in made.report["steps"] if step["pass"] == "residual-expansion")


# ---- the pass -------------------------------------------------------------------------------------------------------


STEPS = (
    {"form": "branches", "orders": 3},
    {"form": "sparse", "share": 0.3},
    {"share": 0.3},
    {"form": "sparse", "orders": 3, "budget": 0.4, "data": False},
)
NETWORKS = ("mobilenet", "mlp", "transformer", "inception", "dead_channels", "shared_weights", "grouped", "resnet20")
OTHERS = ("conv1d", "odd_channels", "control_flow")
FORMS = ({}, {"form": "branches"}, {"form": "branches", "orders": 3, "bits": [4, 4, 3]}, {"form": "sparse", "share": 0.3})


@pytest.mark.parametrize(
    ("name", "step"),
    some(
        itertools.product((*NETWORKS, *OTHERS), STEPS),
        *(("mobilenet", step) for step in STEPS),
        *((name, STEPS[i % 4]) for i, name in enumerate(NETWORKS[1:])),
    ),
)
def test_function_stays_and_bounds_are_told(name, step):
    model = ZOO[name]()
    samples = feeds(model, 3)
    result = quantize(model, recipe(step), samples, verify=True)
    table = told(result)
    json.dumps(result.report)
    assert table["layers"] and set(table["layers"]) | set(table["left_alone"]) >= {
        y.name for y in load(model).layers if y.weight in result.plan
    }
    for row in table["layers"].values():
        assert row["error"] <= row["error_bound"] * (1 + 1e-4) and row["channels"] == sorted(row["channels"], reverse=True)
    assert all(np.isfinite(y).all() for f in samples for y in run(result.model, f))


@pytest.mark.parametrize(
    ("name", "step"),
    some(
        itertools.product(["mobilenet", "resnet20", "mlp", "transformer", "grouped"], FORMS),
        *(("mobilenet", form) for form in FORMS),
        *[
            ("transformer", FORMS[1]),
            ("transformer", FORMS[3]),
            ("mlp", FORMS[2]),
            ("resnet20", FORMS[3]),
            ("grouped", FORMS[0]),
        ],
    ),
)
def test_every_layer_stays_integer(name, step):
    model = ZOO[name]()
    result = quantize(model, recipe(step), feeds(model, 3))
    kernels = [entry for entry in audit_model(result.model).layers if entry.constant_weight]
    assert all(entry.quantized for entry in kernels), kernels
    assert len(kernels) > len(load(model).layers) or not step
    feed = feeds(model, 1, seed=5)[0]
    assert measure.drift(run(result.model, feed), run(result.model, feed, optimize=False)) < 0.05


@pytest.mark.parametrize("make", [resnet20, mlp, *slowly(mobilenet)])
def test_no_share_is_order_one_and_the_whole_share_is_dense(make):
    model, samples = make(), feeds(make(), 3)
    outputs = {
        key: [run(quantize(model, r, samples).model, f)[0] for f in samples]
        for key, r in {
            "plain": {"weights": {"bits": 4}},
            "none": recipe({"share": 0.0}),
            "dense": recipe({"form": "branches"}),
            "whole": recipe({"share": 1.0, "form": "sparse"}),
            "budget": recipe({"budget": 9.0, "form": "branches"}),
        }.items()
    }
    assert all(map(np.array_equal, outputs["plain"], outputs["none"]))
    assert all(map(np.array_equal, outputs["dense"], outputs["whole"]))
    assert all(map(np.array_equal, outputs["dense"], outputs["budget"]))


@pytest.mark.parametrize("name", ["mobilenet", "transformer", "conv_transpose", "grouped"])
def test_four_orders_of_eight_bits_are_float(name):
    model = ZOO[name]()
    result = quantize(model, float_recipe({"orders": 4}, bits=8), feeds(model, 2))
    assert {row["form"] for row in told(result)["layers"].values()} == {"branches"}
    for feed in feeds(model, 3, seed=9):
        assert measure.drift(run(model, feed), run(result.model, feed)) < 1e-5


@pytest.mark.parametrize("name", ["mobilenet", "transformer", "odd_channels"])
def test_error_falls_with_every_order(name):
    model, samples = ZOO[name](), feeds(ZOO[name](), 4)
    found = []
    for orders in (1, 2, 3):
        result = quantize(model, float_recipe({"orders": orders, "form": "branches"}), samples)
        found.append(np.mean([measure.sqnr(run(model, f)[0], run(result.model, f)[0]) for f in samples]))
    assert found[1] > found[0] + 12 and found[2] > found[1] + 12  # 23 by the bound


def test_two_orders_of_four_bits_are_as_good_as_eight():
    model, samples = mobilenet(), feeds(mobilenet(), 8)

    def noise(r):
        result = quantize(model, r, samples)
        return np.mean([measure.sqnr(run(model, f)[0], run(result.model, f)[0]) for f in samples]), result.report

    eight, _ = noise({"pass": [{"use": "ranges"}]})
    four, _ = noise({"weights": {"bits": 4}, "pass": [{"use": "ranges"}]})
    two, report = noise(recipe())
    assert two > four + 12 and two > eight - 6  # 98 codes or more in place of 127
    assert {row["form"] for row in report["steps"][1]["result"]["layers"].values()} == {"folded"}


def test_sparse_equals_branches_on_the_same_channels():
    """Float activations: the two forms compute the same weights, whether channels could be moved or not."""
    for make in (mlp, resnet20):
        model, samples = make(), feeds(make(), 3)
        a, b = (
            quantize(model, float_recipe({"share": 0.3, "form": form, "data": False}), samples)
            for form in ("branches", "sparse")
        )
        assert [row["channels"] for row in told(a)["layers"].values()] == [
            row["channels"] for row in told(b)["layers"].values()
        ]
        for f in samples:
            assert measure.drift(run(a.model, f), run(b.model, f)) < 1e-5


def test_channels_are_moved_side_by_side():
    result = quantize(mlp(), recipe({"form": "sparse", "share": 0.3}), feeds(mlp(), 3))
    assert told(result)["channel_groups_reordered"] == 2
    gathers = [node for node in result.model.graph.node if node.op_type == "Gather"]
    assert len(gathers) == 1 and any("Gather restores" in note for note in result.report["notes"])  # the model's output


def test_order_by_puts_channels_where_they_are_wanted():
    graph = load(mlp())
    layer = graph.layers[0]
    group = next(g for g in channel_groups(graph, "permute") if layer.output in g.tensors)
    wanted = np.random.default_rng(0).permutation(layer.channels)
    index = next(m.index for m in group.members if m.tensor == layer.output)[:, 0]
    order = group.order_by(layer.output, 1, wanted)
    place = np.arange(layer.channels)
    place[index] = place[index[order]]
    np.testing.assert_array_equal(place, wanted)
    assert group.order_by(layer.output, 0, wanted) is None and group.order_by(layer.output, 1, wanted[:-1]) is None


def test_data_chooses_other_channels_where_inputs_differ():
    """An input that is always large makes the errors of its weights count."""
    net = Net([1, 8])
    w = net.rng.normal(size=(16, 8)).astype(np.float32)
    model = net.model(net.op("Gemm", "x", net.constant(w), transB=1))
    samples = [{"x": f["x"] * np.r_[100, np.full(7, 0.01)].astype(np.float32)} for f in feeds(model, 20)]
    by_data, by_weights = (
        quantize(model, float_recipe({"share": 0.25, "form": "branches", "data": data}), samples) for data in (True, False)
    )
    loss = [np.mean([measure.sqnr(run(model, f)[0], run(m.model, f)[0]) for f in samples]) for m in (by_data, by_weights)]
    assert loss[0] > loss[1] + 1


def test_ranges_of_terms_leave_out_what_is_cut_off():
    """Behind a Relu a term needs no value that the others cannot bring above 0."""
    result = quantize(resnet20(), recipe({"form": "branches"}), feeds(resnet20(), 6))
    low, high = (result.plan["t0"] if "t0" in result.plan else result.plan["t1"]).value_range
    first = next(n for n in result.plan if n.endswith("part1_out"))
    assert result.plan[first].value_range[0] > -high and low == 0


def test_sums_run_from_the_finest_order_to_the_first():
    """Partial sums then have small steps, and their rounding is not heard."""
    result = quantize(mobilenet(), recipe({"form": "branches", "orders": 4}), feeds(mobilenet(), 6))
    sums = [name for name in result.plan if name.endswith("_sum")]
    assert len(sums) == 2 * 7  # the last layer writes float
    for name in sums:
        first = name.replace("_part2_sum", "_part1_out").replace("_part3_sum", "_part2_out")
        assert result.plan[name].scale < result.plan[first].scale / 3


def test_orders_left_for_passes_behind(monkeypatch):
    """`bias-correct` takes the mean error of the whole back by the last order; `round` leaves the orders before it alone."""
    monkeypatch.setattr(bias_correct, "_WORK", 0)  # it is not undone
    model, samples = mobilenet(), feeds(mobilenet(), 6)
    base = recipe({"form": "branches"})
    plain = quantize(model, base, samples)
    corrected = quantize(model, {**base, "pass": [*base["pass"], {"use": "bias-correct"}]}, samples)
    learned = quantize(
        model, {**base, "pass": [*base["pass"], {"use": "round", "method": "gptq", "sequential": False}]}, samples
    )
    firsts = [name for name in plain.plan if name.endswith("_part1")]
    assert len(firsts) == 8
    for name in firsts:
        assert np.abs(corrected.plan[name].shift).max() < 1e-5
        np.testing.assert_array_equal(plain.plan[name].codes, learned.plan[name].codes)
    assert max(np.abs(corrected.plan[name.replace("_part1", "_part2")].shift).max() for name in firsts) > 1e-4


def test_channels_with_one_order_are_stored_in_four_bits():
    model, samples = mlp(), feeds(mlp(), 3)
    whole, some = (quantize(model, recipe({"share": share}), samples) for share in (1.0, 0.25))
    assert some.report["bits_per_weight"] < whole.report["bits_per_weight"] - 2
    for f in samples:  # what is stored is what the plan says
        assert measure.drift(run(some.model, f), run(some.model, f, optimize=False)) < 0.05
    kinds = {t.data_type for t in some.model.graph.initializer}
    assert kinds >= {3, 22}  # INT8 and INT4
    assert all(entry.quantized for entry in audit_model(some.model).layers)


def test_left_alone_with_a_reason():
    model, samples = mobilenet(), feeds(mobilenet(), 2)
    cases = {
        "solved": {"weights": {"bits": 4}, "pass": [{"use": "vector-scale"}, {"use": "residual-expansion"}]},
        "would gain nothing": recipe(bits=8),
        "do not fold": recipe({"form": "folded"}, bits=8),
        "not defined": recipe(weights={"bits": 4, "sub_block": 4}),
        "orders are not": recipe({"bits": [4]}, weights={"bits": 8, "sub_block": 4}),
        "earned a second order": recipe({"share": 0.0}),
    }
    for why, asked in cases.items():
        reasons = told(quantize(model, asked, samples))["left_alone"]
        assert any(why in reason for reason in reasons.values()), (why, reasons)
    fold = quantize(model, recipe(target="ort-cpu-avx2"), samples)
    assert {row["form"] for row in told(fold)["layers"].values()} == {"branches"}  # 98 > 63


def test_auto_takes_the_cheapest_form():
    """Six bits twice do not fold: wide layers are sparse, narrow ones and those with most channels refined are branches."""
    net = Net([1, 16])
    x = net.op("Relu", net.gemm("x", 16, 80))
    model = net.model(net.gemm(net.op("Relu", net.gemm(x, 80, 20)), 20, 64))
    for share, forms in ((0.25, ["sparse", "branches", "sparse"]), (0.75, ["branches"] * 3)):
        result = quantize(model, recipe({"share": share}, bits=6), feeds(model, 3), verify=True)
        assert [row["form"] for row in told(result)["layers"].values()] == forms


def test_layers_with_widths_of_their_own_keep_them():
    result = quantize(
        mlp(), recipe({"bits": [4, 3]}, bits=6, layer=[{"position": "last", "weights": {"bits": 3}}]), feeds(mlp(), 2)
    )
    assert [row["bits"] for row in told(result)["layers"].values()] == [[4, 3], [4, 3], [3, 3]]


def test_conv_transpose_and_blocks_of_weights():
    result = quantize(conv_transpose(), float_recipe({"orders": 3}), feeds(conv_transpose(), 2))
    assert len(told(result)["layers"]) == 4
    net = Net([1, 64])
    model = net.model(net.op("Gemm", "x", net.weight(64, 16)))
    result = quantize(model, recipe(None, activations={"bits": 32}, weights={"bits": 4, "block": 32}), feeds(model, 2))
    assert audit_model(result.model).layers[0].kernel == "MatMulNBits"
    (row,) = told(result)["layers"].values()
    assert row["form"] == "folded" and result.plan[load(model).layers[0].weight].bits == 8


@pytest.mark.parametrize(
    "given_, why",
    [
        ({"orders": 0}, "orders"),
        ({"bits": (1,)}, "bits"),
        ({"bits": (4, 4, 4)}, "bits"),
        ({"share": 1.5}, "share"),
        ({"budget": -1.0}, "budget"),
        ({"budget": 1.0, "share": 0.5}, "set one"),
        ({"activations": 3}, "1 or 2"),
    ],
)
def test_parameters_are_checked(given_, why):
    with pytest.raises(ValueError, match=why):
        replace(ResidualExpansion(), **given_)


# ---- activations ----------------------------------------------------------------------------------------------------


@examples(200)
@given(low=st.floats(-10, 0), span=st.floats(1e-3, 20), bits=st.integers(2, 4), size=st.floats(1e-4, 1e4))
def test_two_orders_of_an_activation_are_the_halves_of_a_code(low, span, bits, size):
    low, high = low * size, (low + span) * size
    first, second, shift = solver.halves(low, high, bits)
    whole = from_range(low, high, QuantSpec(2 * bits, symmetric=False))
    x = np.random.default_rng(0).uniform(low, high, 500).astype(np.float32)
    step = float(first.scale)
    least, most = (code - int(first.zero_point) for code in first.grid)
    coarse = (step * np.clip(np.floor(x / np.float32(step) + np.float32(shift)), least, most)).astype(np.float32)
    np.testing.assert_array_equal(fake(coarse, first), coarse)  # the first order is on its grid
    error = np.abs(coarse + fake(x - coarse, second).astype(np.float64) - x)
    inside = (x >= min(low, 0) + whole.scale / 2) & (x <= max(high, 0) - whole.scale / 2)
    assert error[inside].max(initial=0) <= step / (2 * 2**bits) * (1 + 1e-3)
    codes = 2**bits * encode(coarse, first) + encode(x - coarse, second)
    assert np.mean(codes == encode(x, whole)) > 0.99 and np.abs(codes - encode(x, whole)).max() <= 1  # ties may differ


@pytest.mark.parametrize("shift", [0.5, *slowly(0.03)])
@pytest.mark.parametrize(
    "name", ["mobilenet", "grouped", "mlp", "transformer", "conv_transpose", "shared_weights", "control_flow"]
)
def test_split_inputs_leave_the_function(name, shift):
    model = ZOO[name]()
    graph = load(model)
    for layer in graph.layers:
        before = graph.constant(layer.weight)
        parts = split_values(graph, layer.input, 0.3, shift, -3, 12)
        made = split_input(graph, layer, parts)
        assert len(made) == 2 and [y.input for y in made] == list(parts) and made[0].weight != made[1].weight
        assert made[0].bias is None and made[1].bias == layer.bias
        assert all(np.array_equal(graph.constant(y.weight), before) for y in made)
    for feed in feeds(model, 3):
        assert measure.drift(run(model, feed), run(graph, feed)) < 1e-5


def test_split_inputs_check_their_arguments():
    graph = load(mlp())
    layer = graph.layers[0]
    with pytest.raises(ValueError, match="sum of parts"):
        split_input(graph, layer, [])
    with pytest.raises(ValueError, match="sum of parts"):
        split_input(graph, graph.layers[0], [graph.layers[2].input])
    with pytest.raises(ValueError, match="positive"):
        split_values(graph, layer.input, 0.0, 0.5, -3, 12)


def narrow(bits=4, activations=1, target="npu4", ranges="minmax", **more):
    """Weights so fine that activations are what is heard."""
    step = {"use": "residual-expansion", "orders": 4, "form": "branches", "activations": activations}
    return {
        "target": target,
        "weights": {"bits": 4},
        "activations": {"bits": bits},
        "pass": [{"use": "ranges", "method": ranges, "judged": False}, step, {"use": "bias-correct"}],
        **more,
    }


@pytest.mark.parametrize("name", ["conv1d", "transformer", *slowly("mlp", "mobilenet", "cnn", "resnet20")])
def test_two_orders_of_four_bit_activations_are_eight_bits(name):
    model, samples = ZOO[name](), feeds(ZOO[name](), 6)
    made = {
        key: quantize(model, r, samples, verify=True)
        for key, r in {"one": narrow(), "two": narrow(activations=2), "eight": narrow(8)}.items()
    }
    table = told(made["two"])
    assert table["inputs"] and not table["inputs_left_alone"]
    assert all(row["error_bound"] == pytest.approx(row["step"] / 32) for row in table["inputs"].values())
    grids = {s.bits for n, s in made["two"].plan.items() if not made["two"].graph.is_constant(n)}
    assert grids == {4}
    outputs = {key: [run(m.model, f)[0] for f in samples] for key, m in made.items()}
    noise = {
        key: np.mean([measure.sqnr(run(model, f)[0], y) for f, y in zip(samples, ys, strict=True)])
        for key, ys in outputs.items()
    }
    assert abs(noise["two"] - noise["eight"]) < 0.5 and noise["one"] < noise["eight"] - 15
    for f in samples[:2]:  # codes of 4 bits stay within 4 bits, for any input
        wild = {k: 3 * v for k, v in f.items()}
        assert measure.drift(run(made["eight"].model, wild), run(made["two"].model, wild)) < 0.02
        assert measure.drift(run(made["two"].model, wild), run(made["two"].model, wild, optimize=False)) < 1e-4


def test_one_order_of_activations_is_the_plain_network():
    model, samples = cnn(), feeds(cnn(), 4)
    plain = narrow()
    without = {
        **plain,
        "pass": [plain["pass"][0], {k: v for k, v in plain["pass"][1].items() if k != "activations"}, plain["pass"][2]],
    }
    a, b = (quantize(model, r, samples).model for r in (plain, without))
    assert all(np.array_equal(run(a, f)[0], run(b, f)[0]) for f in samples)


def test_chosen_ranges_of_activations_are_kept():
    """Where `ranges` cut the extremes off, so do the two orders; where it only met a coarse grid, the extremes are back."""
    model, samples = resnet20(), feeds(resnet20(), 6)
    cut, whole = (
        told(quantize(model, narrow(activations=2, ranges=method), samples))["inputs"] for method in ("mse", "minmax")
    )
    assert cut.keys() == whole.keys()
    assert any(cut[n]["step"] < 0.9 * whole[n]["step"] for n in cut)
    assert all(cut[n]["step"] <= 1.05 * whole[n]["step"] for n in cut)


def test_layers_share_the_parts_of_an_input():
    result = quantize(transformer(), narrow(activations=2), feeds(transformer(), 3))
    counts = sorted(row["layers"] for row in told(result)["inputs"].values())
    assert counts[-1] == 12  # query, key and value, of four orders each
    floors = [n for n in result.float_model.graph.node if n.op_type == "Floor"]
    assert len(floors) == len(counts)


def test_inputs_left_alone_with_a_reason():
    model, samples = cnn(), feeds(cnn(), 2)
    eight = told(quantize(model, recipe({"activations": 2}), samples))
    assert not eight["inputs"] and all("8 bits" in reason for reason in eight["inputs_left_alone"].values())
    net = Net(["N", 6, 16])
    y = net.op("Relu", net.linear("x", 16, 16))
    product = net.op("MatMul", y, net.op("Transpose", y, perm=[0, 2, 1]))
    both = net.model(net.linear(y, 16, 5), product)
    asked = narrow(activations=2, layer=[{"op": "Attention", "quantize": True}])
    attention = quantize(both, asked, feeds(both, 2), verify=True)
    assert list(told(attention)["inputs"]) == ["x"]
    (reason,) = told(attention)["inputs_left_alone"].values()
    assert "MatMul" in reason and "takes one code" in reason
    coded = replace(NPU4, name="vendor.npu", output_scale=frozenset({"Conv"}))

    class Vendor:
        @hookimpl
        def onnxq_targets(self):
            return [coded]

    forced = told(quantize(model, narrow(activations=2, target="vendor.npu"), samples, plugins=[Vendor()]))
    assert any("rounds what a Conv writes" in reason for reason in forced["inputs_left_alone"].values())
    with pytest.raises(OnnxqError, match="Target 'npu4' reads 4-bit activations"):
        quantize(model, narrow(target="ort-cpu"), samples)
    with pytest.raises(OnnxqError, match=r"2 to 4-bit weights.*with 4-bit activations"):
        quantize(model, {"target": "npu4", "activations": {"bits": 4}}, samples)
