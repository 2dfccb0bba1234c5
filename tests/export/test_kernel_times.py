"""Which table of costs decides, that a damaged one is told, and that times of kernels become one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from onnxq_plugins import OnnxqError, quantize
from onnxq_plugins.cli import costs as costs_cli
from onnxq_plugins.export.kernel_times import Sample, drawn, errors, fitted, measured, table
from onnxq_plugins.runtimes import costs
from onnxq_plugins.runtimes.costs import FEATURES, OWN, Kernel, read_own, table_of, tables, write_own
from tests.zoo import Net, feeds

NAMED = "avx512-vnni"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXQ_CACHE", str(tmp_path / "cache"))


def with_flags(monkeypatch, *flags):
    monkeypatch.setattr(costs, "processor", lambda: {"flags": " ".join(flags)} if flags else {})


def test_every_class_has_a_number_for_each_feature():
    for one in tables().values():
        for kind, row in one.table.items():
            assert len(row) == (2 if kind in (*costs.CONVERSIONS, "call") else len(FEATURES)), (one.name, kind)
            assert all(np.isfinite(c) and c >= 0 for c in row)
        assert {"Add float", "Add int", "Conv dense float", "Conv dense int", *costs.CONVERSIONS} <= set(one.table)


def test_the_table_is_that_of_the_instructions_where_models_run_here_and_the_named_one_elsewhere(monkeypatch):
    for flags, name in (
        (("avx512_vnni", "amx_int8"), "amx"),
        (("avx2", "avx512_vnni"), NAMED),
        (("avx2",), "avx2"),
        ((), NAMED),
    ):
        with_flags(monkeypatch, *flags)
        assert table_of(NAMED, here=True).name == name
        assert table_of(NAMED).name == NAMED
    with_flags(monkeypatch, "avx2", "avx512_vnni")
    assert table_of("avx2", here=True).name == "avx2"  # made for less than this machine has
    with_flags(monkeypatch)
    assert table_of("none of these") is None and table_of("", here=True) is None


def test_a_table_of_ones_own_counts_first_and_only_here():
    write_own(tables()[NAMED].table)
    own = table_of(NAMED, here=True)
    assert own.name == OWN and table_of(OWN).table == own.table
    assert table_of(NAMED).name == NAMED
    assert own.of(Kernel("Relu", ((1, 1000),), (1, 1000))) == tables()[NAMED].of(Kernel("Relu", ((1, 1000),), (1, 1000)))


@pytest.mark.parametrize(
    "change",
    [
        lambda _: "",
        lambda text: text[:100],
        lambda _: "[]",
        lambda text: text.replace("Add int", "Add nothing"),
        lambda text: json.dumps({**json.loads(text), "kernels": {**json.loads(text)["kernels"], "Add int": [1.0]}}),
        lambda text: json.dumps({**json.loads(text), "kernels": {**json.loads(text)["kernels"], "quantize": [-1.0, 1.0]}}),
    ],
)
def test_a_damaged_table_is_told(change):
    file = write_own(tables()[NAMED].table)
    file.write_text(change(file.read_text()))
    with pytest.raises(OnnxqError, match="is damaged; onnxq costs --measure makes it again"):
        read_own()


def test_a_folder_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONNXQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OnnxqError, match=r"cannot be made .* ONNXQ_CACHE names another folder"):
        write_own({})


def test_a_recipe_names_its_table():
    net = Net([1, 16, 96, 96])
    x = net.op("Relu", net.conv("x", 16, 64))
    model = net.model(net.head(net.op("Relu", net.conv(x, 64, 64)), 64))

    def placed(**options):
        step = {"use": "placement", "check": False, "least": 0.0, **options}
        return quantize(model, {"pass": [step, {"use": "ranges"}]}, feeds(model, 2), workers=1).report.steps[0]["result"]

    assert placed(table=NAMED)["table"] == NAMED and placed(table="amx")["table"] == "amx"
    with pytest.raises(OnnxqError, match=r"no table 'amz' of costs.*did you mean 'amx'"):
        placed(table="amz")
    with pytest.raises(OnnxqError, match="not measured on this machine; run onnxq costs --measure"):
        placed(table=OWN)
    write_own(tables()["amx"].table)
    assert placed(table=OWN)["table"] == placed()["table"] == OWN


def test_float_convolutions_that_have_no_blocks_are_another_class():
    def conv(inputs, outputs, groups=1):
        return Kernel("Conv", ((1, inputs, 8, 8),), (1, outputs, 8, 8), (outputs, inputs // groups, 3, 3), groups)

    for inputs, outputs, groups, blocked in (
        (3, 16, 1, True),
        (16, 18, 1, True),
        (18, 16, 1, False),
        (20, 20, 20, True),
        (18, 18, 18, False),
        (32, 32, 2, True),
        (24, 24, 2, False),
    ):
        kernel = conv(inputs, outputs, groups)
        assert kernel.blocked is blocked and (" plain" in kernel.kind(False)) is not blocked
        assert " plain" not in kernel.kind(True)


def test_a_recurrent_operator_costs_its_products():
    small, large = (Kernel("LSTM", ((8, 1, n),), (8, 1, 1, n), attrs={"hidden_size": n}) for n in (32, 256))
    two = Kernel("LSTM", ((8, 1, 256),), (8, 2, 1, 256), attrs={"hidden_size": 256, "direction": "bidirectional"})
    amx = tables()["amx"]
    assert 3 * amx.of(small) < amx.of(large) < amx.of(two)


def test_coefficients_are_found_again():
    rng = np.random.default_rng(0)
    found = []
    for kernel in (kernel for kernels in drawn(rng, 6) for kernel in kernels if kernel.op == "Conv"):
        features = kernel.features(True)
        found.append(Sample("Conv", features, float(np.dot(features, [3, 2, 0, 0.1, 0, 0, 0, 0]) * rng.uniform(0.98, 1.02))))
    assert np.median(errors(found)) < 0.05
    assert fitted(found)[:2] == pytest.approx([3, 2], rel=0.2)


def test_every_kind_of_kernel_is_drawn():
    kernels = [kernel for some in drawn(np.random.default_rng(0), 12) for kernel in some]
    kinds = {kernel.kind(integer) for kernel in kernels for integer in (False, True)}
    assert set(tables()["amx"].table) - {*costs.CONVERSIONS, "call"} <= kinds


def test_measuring_makes_a_whole_table():
    samples = measured(rounds=2, seconds=0.01)
    rows = table(samples)
    assert {"Add float", "call"} <= set(rows) and set(costs.CONVERSIONS) <= set(rows)
    assert all(sample.time > 0 for sample in samples)


def test_the_command_lists_tables_and_says_which_is_used(onnxq, monkeypatch):
    with_flags(monkeypatch, "amx_int8")
    text = onnxq("costs").out
    assert "* amx: " in text and f"  {NAMED}: " in text and "onnxq costs --measure" in text
    write_own(tables()["amx"].table)
    assert "* own: " in onnxq("costs").out
    with_flags(monkeypatch)
    costs.own_file().unlink()
    assert "none is of this machine's instruction set" in onnxq("costs").out


def test_the_command_measures_and_keeps_a_table(onnxq, monkeypatch):
    monkeypatch.setattr(costs_cli, "measured", lambda rounds, seconds, track: measured(2, 0.01, track=track))
    monkeypatch.setattr(costs_cli, "table", lambda samples: {**tables()["amx"].table, **table(samples)})
    ran = onnxq("costs", "--measure")
    assert ran.code == 0 and "pass placement uses it from now on" in ran.out
    assert table_of(NAMED, here=True).name == OWN
    assert onnxq("costs", "--measure", "--rounds", 1).code == 2
