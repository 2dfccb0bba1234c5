"""Recipes: TOML to validated values and back, settings, layer rules, and the built-in files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxq_plugins import OnnxqError, Pass, Recipe, audit_model, load, quantize
from onnxq_plugins.data import DataOptions
from onnxq_plugins.graph import constants as graph_constants
from onnxq_plugins.job import LayerRule, TensorRequest
from onnxq_plugins.passes import BUILTIN
from onnxq_plugins.plan import requests
from onnxq_plugins.plan.planned import Planned
from onnxq_plugins.plugins import find_plugins
from onnxq_plugins.recipe import builtin_recipes, load_recipe, parse
from onnxq_plugins.targets.ort_cpu import ORT_CPU
from tests.zoo import ZOO, Net, cnn, examples, feeds, mobilenet, resnet20, transformer


@dataclass(frozen=True)
class Everything(Pass):
    """One parameter of every kind."""

    name: ClassVar[str] = "test.everything"
    whole: int = 1
    number: float = 0.5
    flag: bool = False
    word: str = "a"
    choice: Literal["x", "y"] = "x"
    maybe: int | None = None
    numbers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.whole < 0:
            raise ValueError("whole must not be negative")


PASSES = {kind.name: kind for kind in (*BUILTIN, Everything)}


def problems(table, changes=()) -> tuple[str, ...]:
    with pytest.raises(OnnxqError) as caught:
        load_recipe(table, PASSES, changes)
    return caught.value.problems


def using(**parameters) -> dict:
    return {"pass": [{"use": "test.everything", **parameters}]}


# ---- reading ------------------------------------------------------------------------------------------------------------

TOML = """
recipe = 1
target = "ort-cpu-avx2"
[weights]
bits = 4
block = [1, 16]
[activations]
bits = 8
[data]
path = "images"
mean = [0.485, 0.456, 0.406]
std = 0.5
[[pass]]
use = "ranges"
method = "mse"
[[pass]]
use = "test.everything"
number = 2
numbers = [1, 2.5]
[[layer]]
match = "classifier*"
weights.bits = 8
[[layer]]
kind = "depthwise"
quantize = false
"""


@pytest.mark.parametrize("path_type", [str, None])
def test_a_toml_file(tmp_path, path_type):
    file = tmp_path / "my.toml"
    file.write_text(TOML)
    recipe = load_recipe(str(file) if path_type else file, PASSES)
    assert (recipe.name, recipe.target) == ("my", "ort-cpu-avx2")
    assert recipe.weights == TensorRequest(bits=4, block=(1, 16))
    assert recipe.activations == Recipe().activations
    assert recipe.data == DataOptions(path="images", mean=(0.485, 0.456, 0.406), std=(0.5,))
    assert recipe.passes == (PASSES["ranges"](method="mse"), Everything(number=2.0, numbers=(1.0, 2.5)))
    assert isinstance(recipe.passes[1].number, float)
    assert recipe.layers == (
        LayerRule(match="classifier*", weights={"bits": 8}),
        LayerRule(kind="depthwise", quantize=False),
    )


def test_activations_keep_their_own_defaults():
    """An [activations] table changes the defaults of activations, which are not those of weights."""
    recipe = parse({"activations": {"bits": 8, "pow2": True}}, PASSES)
    assert (recipe.activations.symmetric, recipe.activations.block) == (False, "tensor")


def test_an_empty_recipe_is_the_default():
    assert parse({}, PASSES) == Recipe()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weights = [", "cannot be read"),
        ("[weights]\nbits = 8\nbits = 4", "cannot be read"),
        ("\xff", "cannot be read"),
    ],
)
def test_broken_toml_is_told_in_one_sentence(tmp_path, text, words):
    file = tmp_path / "broken.toml"
    file.write_bytes(text.encode("latin1"))
    (problem,) = problems(file)
    assert words in problem
    assert str(file) in problem


def test_json_that_holds_no_tables(tmp_path):
    file = tmp_path / "list.json"
    file.write_text("[1]")
    assert "must hold tables" in problems(file)[0]


def test_neither_builtin_nor_file():
    (problem,) = problems("int9")
    assert "neither a built-in nor a file; known: " in problem
    assert "int8" in problem


# ---- problems -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"weigths": {}}, ("unknown key 'weigths'", "weights")),
        ({"weights": {"bit": 4}}, ("unknown key 'bit'", "bits")),
        ({"weights": 4}, ("weights must be a table",)),
        ({"weights": {"bits": "4"}}, ("bits = '4'", "a whole number")),
        ({"weights": {"bits": 4.0}}, ("bits = 4.0", "a whole number")),
        ({"weights": {"bits": True}}, ("bits = True", "a whole number")),
        ({"weights": {"bits": 1}}, ("bits = 1 is out of range", "2..16", "32")),
        ({"activations": {"bits": 64}}, ("[activations]", "bits = 64 is out of range")),
        ({"weights": {"symmetric": 1}}, ("symmetric = 1", "true or false")),
        ({"weights": {"block": "row"}}, ("block = 'row'", "'tensor'", "'channel'")),
        ({"target": 3}, ("target must be a name",)),
        ({"recipe": 2}, ("recipe = 2", "use 1")),
        ({"pass": {"use": "ranges"}}, ("[[pass]]",)),
        ({"pass": [{"use": "range"}]}, ("'range' is not a known pass", "ranges", "installed")),
        ({"pass": [{"method": "mse"}]}, ("pass 1", "write use =", "ranges")),
        ({"pass": [{"use": "ranges", "mode": "mse"}]}, ("unknown key 'mode'", "method")),
        ({"pass": [{"use": "ranges", "method": "best"}]}, ("method = 'best'", "'minmax', 'percentile', 'mse', 'kl'")),
        ({"pass": [{"use": "ranges", "percentile": 40}]}, ("percentile = 40",)),
        ({"layer": {"match": "*"}}, ("[[layer]]",)),
        ({"layer": [{"name": "conv1"}]}, ("layer 1", "unknown key 'name'", "match")),
        ({"layer": [{"match": 5}]}, ("layer 1", "match = 5", "text")),
        ({"layer": [{"weights": {"bit": 4}}]}, ("layer 1, weights", "unknown key 'bit'")),
        ({"layer": [{"weights": {"bits": 99}}]}, ("layer 1", "bits = 99 is out of range")),
        ({"layer": [{"position": "middle"}]}, ("layer 1", "position = 'middle'", "'first'", "'last'")),
        ({"layer": [{"kind": "deepwise"}]}, ("layer 1", "kind = 'deepwise'", "'depthwise'")),
        ({"layer": [{"op": "Convolution"}]}, ("layer 1", "op = 'Convolution'", "'Conv'")),
        ({"data": {"layout": 3}}, ("[data]", "layout = 3", "text")),
        ({"data": {"mean": ["a"]}}, ("mean = ['a']", "a list of numbers")),
        (using(flag=1), ("flag = 1", "true or false")),
        (using(choice="z"), ("choice = 'z'", "one of 'x', 'y'")),
        (using(maybe="z"), ("maybe = 'z'", "a whole number or nothing")),
        (using(number="2"), ("number = '2'", "a number")),
        (using(whole=-1), ("whole must not be negative",)),
    ],
)
def test_one_wrong_thing_is_one_sentence(table, words):
    (problem,) = problems(table)
    assert all(word in problem for word in words), problem
    assert problem.endswith((".", "?"))


def test_all_problems_are_listed_at_once():
    table = {
        "colour": 1,
        "weights": {"bits": 1, "blok": 2},
        "pass": [{"use": "nope"}, {"use": "ranges", "method": "no"}],
        "layer": [{"mach": "x"}],
    }
    found = problems(table, ["weights.bits", "other.x=1"])
    for word in (
        "colour",
        "blok",
        "'nope' is not",
        "method = 'no'",
        "mach",
        "'weights.bits' must look",
        "no table or pass 'other'",
    ):
        assert sum(word in problem for problem in found) == 1, (word, found)


# ---- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "read", "value"),
    [
        ("weights.bits=4", lambda r: r.weights.bits, 4),
        ("weights.block=tensor", lambda r: r.weights.block, "tensor"),
        ('weights.block="tensor"', lambda r: r.weights.block, "tensor"),
        ("weights.block=32", lambda r: r.weights.block, 32),
        ("weights.block=[1, 16]", lambda r: r.weights.block, (1, 16)),
        ("activations.bits=32", lambda r: r.activations.bits, 32),
        ("data.mean=[0.1, 0.2, 0.3]", lambda r: r.data.mean, (0.1, 0.2, 0.3)),
        ("data.path=some where", lambda r: r.data.path, "some where"),
        ("target=openvino", lambda r: r.target, "openvino"),
        (" target = openvino ", lambda r: r.target, "openvino"),
        ("ranges.method=mse", lambda r: r.passes[0].method, "mse"),
        ("ranges.percentile=99", lambda r: r.passes[0].percentile, 99.0),
        ("test.everything.flag=true", lambda r: r.passes[1].flag, True),  # a guest's name has a dot
        ("test.everything.word=a=b", lambda r: r.passes[1].word, "a=b"),
    ],
)
def test_settings_change_the_recipe(setting, read, value):
    table = {"pass": [{"use": "ranges"}, {"use": "test.everything"}]}
    before = json.dumps(table)
    assert read(load_recipe(table, PASSES, [setting])) == value
    assert json.dumps(table) == before  # the mapping given is left alone


@pytest.mark.parametrize(
    "settings",
    [
        "weights.block=[1, 16]",
        {"weights.block": (1, 16)},
        [{"weights.block": [1, 16]}],
        ["weights.block=8", {"weights.block": [1, 16]}],
    ],
    ids=repr,
)
def test_one_setting_alone_and_mappings_are_settings(settings):
    assert load_recipe({}, PASSES, settings).weights.block == (1, 16)
    both = load_recipe({"pass": [{"use": "ranges"}]}, PASSES, {"ranges.method": "mse", "target": "openvino"})
    assert (both.passes[0].method, both.target) == ("mse", "openvino")


def test_a_setting_reaches_every_pass_of_that_name_and_the_last_wins():
    table = {"pass": [{"use": "ranges", "bins": 512}, {"use": "ranges"}]}
    recipe = load_recipe(table, PASSES, ["ranges.method=mse", "ranges.method=kl"])
    assert [(p.method, p.bins) for p in recipe.passes] == [("kl", 512), ("kl", 2048)]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("weights.bits", "must look like"),
        ("bits=4", "did you mean weights.bits or activations.bits?"),
        ("traget=npu", "did you mean target?"),
        ("weight.bits=4", "did you mean 'weights'?"),
        ("activation.bits=16", "did you mean 'activations'?"),
        ("range.method=mse", "did you mean 'ranges'?"),
        ("weights.bit=4", "did you mean 'bits'?"),
        ("=4", "must look like"),
        ("", "must look like"),
        ("weights.bit=4", "unknown key 'bit'"),
        ("mse.method=x", "no table or pass 'mse'; known: weights, activations, data, quality, target, ranges."),
    ],
)
def test_settings_that_fit_nothing(setting, words):
    assert any(words in problem for problem in problems({"pass": [{"use": "ranges"}]}, [setting]))


@pytest.mark.parametrize(("settings", "words"), [([4], "must be text such as"), ({"weights.bits": None}, "cannot hold")])
def test_settings_that_are_no_text(settings, words):
    assert any(words in problem for problem in problems({}, settings))


def test_settings_work_on_a_recipe_too():
    recipe = load_recipe(Recipe(passes=(Everything(),)), PASSES, ["test.everything.whole=5"])
    assert recipe.passes == (Everything(whole=5),)


# ---- there and back -----------------------------------------------------------------------------------------------------

WORD = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=8)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
BITS = st.integers(2, 16) | st.just(32)
BLOCK = (
    st.sampled_from(["tensor", "channel"])
    | st.integers(1, 512)
    | st.lists(st.integers(0, 64), min_size=1, max_size=4).map(tuple)
)
REQUEST = st.builds(
    TensorRequest,
    bits=BITS,
    symmetric=st.booleans(),
    block=BLOCK,
    pow2=st.booleans(),
    max_multiplier=st.integers(1, 127),
    sub_block=st.just("none") | st.integers(1, 64) | st.lists(st.integers(0, 64), min_size=1, max_size=4).map(tuple),
)
STEP = st.one_of(
    st.builds(PASSES["ranges"], method=st.sampled_from(["minmax", "mse"]), percentile=st.floats(50.5, 100)),
    st.builds(PASSES["bias-correct"]),
    st.builds(
        Everything,
        st.integers(0),
        NUMBER,
        st.booleans(),
        WORD,
        st.sampled_from("xy"),
        st.none() | st.integers(),
        st.lists(NUMBER, max_size=3).map(tuple),
    ),
)
RULE = st.builds(
    LayerRule,
    match=WORD,
    op=st.sampled_from(["", "Conv", "Attention"]),
    kind=st.sampled_from(["", "dense"]),
    position=st.sampled_from(["", "last"]),
    quantize=st.none() | st.booleans(),
    weights=st.fixed_dictionaries({}, optional={"bits": BITS, "block": BLOCK}),
)
DATA = st.builds(DataOptions, path=WORD, samples=st.integers(0, 99), mean=st.lists(NUMBER, min_size=1).map(tuple))
RECIPE = st.builds(
    Recipe,
    target=WORD,
    weights=REQUEST,
    activations=REQUEST,
    data=DATA,
    passes=st.lists(STEP, max_size=3).map(tuple),
    layers=st.lists(RULE, max_size=3).map(tuple),
)


@examples(150)
@given(RECIPE)
def test_a_recipe_survives_the_way_through_plain_values_and_json(recipe):
    table = recipe.to_dict()
    assert parse(table, PASSES).to_dict() == table
    again = parse(json.loads(recipe.to_json()), PASSES)
    assert again.to_json() == recipe.to_json()
    for field in fields(Recipe):
        if field.name not in ("layers", "name"):  # rules hold their tables as written: lists, not tuples
            assert getattr(again, field.name) == getattr(recipe, field.name)


@pytest.mark.parametrize("name", sorted(builtin_recipes()))
def test_every_builtin_recipe_is_valid_and_documented(name):
    plugins = find_plugins()
    recipe = load_recipe(name, plugins.passes)
    assert recipe.target in plugins.targets
    assert recipe.name == name
    assert parse(recipe.to_dict(), plugins.passes).to_dict() == recipe.to_dict()
    assert builtin_recipes()[name].read_text("utf-8").startswith("# ")  # what `onnxq recipes` shows


def test_builtin_recipes_come_along():
    assert "int8" in builtin_recipes()


# ---- layer rules --------------------------------------------------------------------------------------------------------


def bits_of(model, *rules: dict) -> dict[str, int]:
    """Layer name -> bits of its planned weight, 32 for float."""
    graph = load(model)
    plan = requests.request(graph, parse({"layer": list(rules)}, PASSES), ORT_CPU).plan
    return {layer.name: plan[layer.weight].bits if layer.weight in plan else 32 for layer in graph.layers}


FOUR = {"weights": {"bits": 4}}


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        ({}, ["conv0", "conv3", "gemm7"]),
        ({"match": "conv*"}, ["conv0", "conv3"]),
        ({"match": "[cg]???[07]"}, ["conv0", "gemm7"]),
        ({"op": "Gemm"}, ["gemm7"]),
        ({"position": "first"}, ["conv0"]),
        ({"position": "last"}, ["gemm7"]),
        ({"op": "Conv", "position": "last"}, []),
        ({"kind": "depthwise"}, []),
    ],
)
def test_rules_choose_layers(rule, chosen):
    assert [name for name, bits in bits_of(cnn(), {**rule, **FOUR}).items() if bits == 4] == chosen


@pytest.mark.parametrize("rule", [{"match": "conv9"}, {"match": "Conv*"}, {"match": "conv*", "position": "last"}])
def test_a_glob_that_matches_nothing_is_an_error(rule):
    words = f"nothing matches '{re.escape(rule['match'])}'; layers are named conv0, conv3, gemm7"
    with pytest.raises(OnnxqError, match=words):
        bits_of(cnn(), {**rule, **FOUR})


@pytest.mark.parametrize(
    ("model", "kind", "count"),
    [("mobilenet", "depthwise", 2), ("mobilenet", "dense", 6), ("grouped", "grouped", 1), ("conv1d", "depthwise", 1)],
)
def test_rules_choose_kinds(model, kind, count):
    assert list(bits_of(ZOO[model](), {"kind": kind, **FOUR}).values()).count(4) == count


def test_later_rules_win_and_add_up():
    model = mobilenet()
    names = list(bits_of(model))
    found = bits_of(
        model,
        FOUR,
        {"op": "Conv", "weights": {"bits": 6}},
        {"match": names[0], "quantize": False},
        {"match": names[1], "quantize": False},
        {"match": names[1], "quantize": True},
    )
    assert list(found.values()) == [32, 6, 6, 6, 6, 6, 6, 4]


def test_a_rule_changes_only_what_it_names():
    graph = load(cnn())
    recipe = parse({"weights": {"bits": 4, "pow2": True}, "layer": [{"op": "Gemm", "weights": {"block": "tensor"}}]}, PASSES)
    plan = requests.request(graph, recipe, ORT_CPU).plan
    specs = [plan[layer.weight] for layer in graph.layers]
    assert [(s.bits, s.pow2, s.block) for s in specs] == [(4, True, (1, 0, 0, 0))] * 2 + [(4, True, None)]


@pytest.mark.parametrize(
    ("block", "conv", "gemm"),
    [
        ("tensor", None, None),
        ("channel", (1, 0, 0, 0), (1, 0)),
        (32, (1, 32, 0, 0), (1, 32)),
        ([16, 8], (16, 8, 0, 0), (16, 8)),
    ],
)
def test_blocks_follow_the_axes_of_each_weight(block, conv, gemm):
    graph = load(cnn())
    plan = requests.request(graph, parse({"weights": {"block": block}}, PASSES), ORT_CPU).plan
    assert plan[graph.layers[0].weight].block == conv
    assert plan[graph.layers[-1].weight].block == gemm  # transB: [outputs, inputs]
    tokens = load(transformer())
    plan = requests.request(tokens, parse({"weights": {"block": block}}, PASSES), ORT_CPU).plan
    assert plan[tokens.layers[0].weight].block == (gemm[::-1] if gemm else None)  # [inputs, outputs]


def test_a_block_of_the_wrong_rank_is_told_once_for_every_kind_of_layer():
    with pytest.raises(OnnxqError) as caught:
        requests.request(load(mobilenet()), parse({"weights": {"block": [1, 2, 3]}}, PASSES), ORT_CPU)
    assert len(caught.value.problems) == 2  # Conv and Gemm
    assert all("3 sizes" in problem and "[outputs, inputs]" in problem for problem in caught.value.problems)


def test_rules_for_all_layers_do_not_speak_of_attention():
    graph = load(transformer())
    for rule, integer in (({"quantize": True}, False), ({"op": "Attention", "quantize": True}, True)):
        plan = requests.request(graph, parse({"layer": [rule]}, PASSES), ORT_CPU).plan
        softmax = next(node for node in graph.nodes if node.op == "Softmax")
        assert (softmax.outputs[0].name in plan) == integer


# ---- excluded operators, lists of names, recipes that extend others -------------------------------------------------------


def names_of(model, op) -> list[str]:
    return [node.name for node in load(model).nodes if node.op == op]


@pytest.mark.parametrize("op", ["Conv", "Add", "GlobalAveragePool", "Gemm"])
def test_an_excluded_operator_of_any_kind_is_float(op):
    model = resnet20()
    names = names_of(model, op)
    before, after = (
        quantize(model, {}, feeds(model, 4), exclude=names[:1] if out else (), check=False, names="keep")
        for out in (False, True)
    )
    assert names[0] in Planned(before.graph, before.plan, before.target).integer
    assert names[0] not in Planned(after.graph, after.plan, after.target).integer
    kernels = [sum(n for k, n in audit_model(r.model).other.items() if k == f"QLinear{op}") for r in (before, after)]
    assert op in ("Conv", "Gemm") or kernels[1] < kernels[0]
    assert after.report.recipe["exclude"] == names[:1] and not any("exclude" in note for note in after.report.notes)


def test_excluded_tables_are_stored_as_floats():
    net = Net(["N", 4])
    rows = net.op("Gather", net.weight(64, 32), net.op("Cast", "x", to=7))
    model = net.model(net.linear(rows, 32, 8))
    samples = [{"x": np.arange(4, dtype=np.float32)[None] + n} for n in range(4)]
    table = next(each for each in graph_constants(load(model)) if each.op == "Gather")
    plans = [quantize(model, {}, samples, exclude=some, check=False).plan for some in ((), [table.readers[0][0]])]
    assert table.name in plans[0] and table.name not in plans[1]


def test_excluded_names_that_do_not_exist_are_an_error_and_those_merged_a_note(tmp_path):
    net = Net(["N", 3, 8, 8])
    model = net.model(net.head(net.op("Relu", net.batchnorm(net.conv("x", 3, 8), 8)), 8))
    batchnorm = next(n.name for n in model.graph.node if n.op_type == "BatchNormalization")
    with pytest.raises(OnnxqError) as caught:
        quantize(model, {}, feeds(model, 4), exclude=["nowhere", "conv*"], output=tmp_path / "q.onnx")
    assert [p for p in caught.value.problems if "'nowhere'" in p] and not (tmp_path / "q.onnx").exists()
    notes = quantize(model, {}, feeds(model, 4), exclude=[batchnorm], check=False).report.notes
    assert any(f"'{batchnorm}' were merged" in note for note in notes)


def test_exclusions_survive_in_what_recipes_and_their_text_hold():
    recipe = load_recipe({"exclude": ["a", "b/*"]}, PASSES)
    assert recipe.excludes("a") and recipe.excludes("b/c") and not recipe.excludes("b")
    assert parse(json.loads(recipe.to_json()), PASSES) == recipe
    assert Recipe(exclude=("x[0]",)).excludes("x[0]")
    assert "exclude" in problems({"exclude": 3})[0]


def test_match_takes_a_list():
    model = cnn()
    first, second = names_of(model, "Conv")[:2]
    rule = {"match": [first, second], "quantize": False}
    result = quantize(model, {"layer": [rule]}, feeds(model, 4), check=False)
    assert {first, second} == set(result.report.floats)
    assert load_recipe({"layer": [rule]}, PASSES).to_dict()["layer"][0]["match"] == [first, second]
    with pytest.raises(OnnxqError, match="nothing matches 'no' or 'none'"):
        quantize(model, {"layer": [{"match": ["no", "none"], "quantize": False}]}, feeds(model, 4))


def test_a_recipe_extends_another():
    base = load_recipe("int8", PASSES)
    own = load_recipe(
        {
            "extends": "int8",
            "without": ["placement"],
            "weights": {"bits": 7},
            "pass": [{"use": "ranges", "percentile": 99}, {"use": "reorder"}, {"use": "test.everything", "whole": 2}],
            "layer": [{"kind": "depthwise", "quantize": False}],
        },
        PASSES,
    )
    names = [step.name for step in own.passes]
    assert own.weights.bits == 7 and own.weights.block == base.weights.block and own.quality == base.quality
    assert "placement" not in names and set(names) == {s.name for s in base.passes} - {"placement"} | {
        "reorder",
        "test.everything",
    }
    assert next(s for s in own.passes if s.name == "ranges").percentile == 99
    stages = ["rewrite", "solve", "finish"]
    order = [stages.index(step.stage) for step in own.passes]
    assert order == sorted(order) and len(own.layers) == 1
    assert parse(own.to_dict(), PASSES) == own  # what is kept says all by itself


def test_a_recipe_that_extends_nothing_known(tmp_path):
    assert "neither a built-in nor a file" in problems({"extends": "int9"})[0]
    assert "without names 'nowhere'" in problems({"extends": "int8", "without": ["nowhere"]})[0]
    assert "no recipe is extended" in problems({"without": ["ranges"]})[0]
    assert "must be a built-in recipe or a file" in problems({"extends": 3})[0]
    loop = tmp_path / "loop.toml"
    loop.write_text(f'extends = "{loop}"\n')
    assert any("does not extend it" in text for text in problems(loop))


@pytest.mark.parametrize("recipe", [3, None, ["int8"], object()])
def test_what_is_no_recipe(recipe):
    assert "is no recipe" in problems(recipe)[0]
