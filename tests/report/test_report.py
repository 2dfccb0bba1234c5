"""The report page: complete, safe against any name of a layer, and at home in a browser. The last needs Chromium and
playwright (pip install playwright; its own browsers are not needed)."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxq_plugins as onnxq
from onnxq_plugins import OnnxqError, cli, runtimes
from onnxq_plugins.report import times
from onnxq_plugins.report.comparison import Comparison, Pair
from onnxq_plugins.report.diagnosis import diagnose
from onnxq_plugins.report.page import check_page
from onnxq_plugins.report.plots import plots
from onnxq_plugins.report.shares import Run
from onnxq_plugins.search.widths import ALONE  # noqa: F401  (imported before matplotlib is hidden)
from tests.zoo import conv_transpose, feeds, mlp, mobilenet, no_layer, transformer

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


pytestmark = pytest.mark.usefixtures("quick")


class Page(HTMLParser):
    """Elements of a page: tags with attributes, text of each kind of element, cells of the sortable table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.inside or self.inside[-1] not in ("script", "style"):
            self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    for node in model.graph.node:
        node.name = names.get(node.name, node.name)
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
    return model


def made(tmp_path: Path, model: onnx.ModelProto, recipe="int8", n: int = 6, data=None, **options) -> tuple[str, dict]:
    result = onnxq.quantize(model, recipe, data or feeds(model, n), workers=1)
    path = result.save_report(tmp_path / "out.html", **options)
    assert path == tmp_path / "out.html"
    return path.read_text("utf-8"), json.loads((tmp_path / "out.json").read_text("utf-8"))


def alone(text: str) -> None:
    """Nothing in a page points outside it."""
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "base", "audio", "video", "img")
        for key, value in attributes.items():
            assert not key.startswith("on"), (tag, key)
            if key in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith("#") or value == "data:,", (tag, key, value)
    assert page.count("script") == 1
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "@import" not in style and "url(" not in style


@pytest.mark.parametrize("model", [mobilenet, transformer, mlp, conv_transpose, no_layer], ids=lambda f: f.__name__)
def test_all_layers_are_there(tmp_path, model):
    text, table = made(tmp_path, model())
    alone(text)
    page = Page(text)
    shown = " ".join(page.text)
    for row in table["layers"]:
        assert row["name"] in shown
    assert page.count("h1") == 1
    for word in ("dB", "ms", "Seed 0", "onnxruntime 1."):
        assert word in shown
    assert {y["name"] for y in table["diagnosis"]["layers"]} >= {row["name"] for row in table["layers"]}
    assert table["measured"]["samples"] == 6 and table["measured"]["milliseconds"]["quantized"] > 0
    for x in table["activations"].values():
        assert x["low"] <= x["percentile_0.1"] <= x["percentile_99.9"] <= x["high"] and 0 <= x["clipped"] <= 1
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))  # of several drawings on one page


def test_names_are_text(tmp_path):
    names = {"conv0": NASTY, "clip2": "a & b $x_1^2$", "conv3": "{{ 7 * 7 }}{% for %}", "t2": "'\"><b>", "x": "<x>"}
    model = renamed(mobilenet(), names)
    model.graph.input[0].name = "<x>"
    data = [{"<x>": f["x"]} for f in feeds(mobilenet(), 4)]
    text, table = made(tmp_path, model, data=data, name="<i>model</i>.onnx", command="onnxq '<script>'")
    alone(text)
    assert Page(text).count("b") == Page(text).count("i") == 0
    shown = "".join(Page(text).text)
    assert NASTY in shown and "{{ 7 * 7 }}" in shown and "<i>model</i>.onnx" in shown and "onnxq '<script>'" in shown
    assert {row["name"] for row in table["layers"]} >= {NASTY}


def test_drawings_follow_the_page(tmp_path):
    text, _ = made(tmp_path, mobilenet())
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 3  # all bits are equal
    for svg in drawings:
        colors = set(re.findall(r"(?:fill|stroke): *([^;\"]+)", svg))
        assert colors <= {"none", *(f"var(--{name})" for name in ("ink", "rule", "blue", "orange", "grey"))}, colors
        assert "<text" in svg and not re.search(r"\bwidth=\"[\d.]+pt", svg)


def test_labels_and_calibration_are_told(tmp_path):
    data = np.concatenate([f["x"] for f in feeds(mlp(), 30)])
    right = runtimes.outputs(runtimes.session(mlp()), [{"x": data}])[0].argmax(1)
    result = onnxq.quantize(mlp(), "int8", data, workers=1, labels=right, samples=20)
    text = result.save_report(tmp_path / "a.html").read_text("utf-8")
    assert "Accuracy (top-1)" in text and "float 100.0 %" in text and "20 calibration samples" in text and "flatter" in text
    assert "accuracy 100.0 %, float 100.0 %;" in text
    other = result.save_report(tmp_path / "b.html", data[:10]).read_text("utf-8")
    assert "flatter" not in other and "10 of 10 samples" in other and "Accuracy (top-1)" not in other


def comparison(sqnr: float, agreement=None, top1=None, speed: float = 2.0) -> Comparison:
    accuracy = None if top1 is None else Pair(90.0, top1)
    return Comparison(8, 8, "the data", True, sqnr, Pair(speed, 1.0), agreement, accuracy)


@pytest.mark.parametrize(
    ("measured", "grade"),
    [
        (comparison(35), "good"),
        (comparison(20), "fair"),
        (comparison(8), "poor"),
        (comparison(20, 99.5), "good"),
        (comparison(35, 96), "fair"),
        (comparison(12, 80), "poor"),
        (comparison(12, 80, 89.5), "good"),
        (comparison(35, 100, 88), "fair"),
        (comparison(35, 100, 80), "poor"),
        (comparison(35, speed=0.8), "fair"),
        (comparison(8, speed=0.8), "poor"),
    ],
)
def test_the_verdict_grades_accuracy_before_agreement_before_noise(measured, grade):
    assert measured.grade == grade and measured.verdict.endswith("8 calibration samples.")
    assert ("slower than the float model" in measured.verdict) == (measured.speed < 1)
    assert ("accuracy" in measured.verdict) == (measured.top1 is not None)


def test_synthetic_samples_are_called_so(tmp_path):
    result = onnxq.quantize(mobilenet(), "int8-data-free", workers=1)
    text = result.save_report(tmp_path / "a.html").read_text("utf-8")
    assert "synthetic samples" in text and "calibration samples" not in text and "for lack of data" in text


def test_the_page_shows_where_the_time_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "what_to_change", lambda audit, placed: (f"change this, {placed} & {NASTY}",))
    text, table = made(tmp_path, mobilenet())
    alone(text)
    assert text.index("What to change first") < text.index('<dl class="cards">') < text.index("Where the time goes")
    assert "change this, True &amp; " in text and NASTY not in text
    time = table["time"]
    for kind, kernel in (("float", "Conv"), ("quantized", "QLinearConv")):
        assert sum(row["share"] for row in time[kind]["classes"].values()) == pytest.approx(1, abs=1e-3)
        assert f"<tr><td>{kernel}</td>" in text and time[kind]["classes"][kernel]["kernels"] > 0
    assert time["changes"] == [f"change this, True & {NASTY}"] and time["shapes"] in text
    monkeypatch.setattr(times, "what_to_change", lambda *_: ())
    text, _ = made(tmp_path, mobilenet())
    assert "What to change first" not in text and "Where the time goes" in text


def test_a_target_that_does_not_run_here_has_no_times(tmp_path):
    text, table = made(tmp_path, mobilenet(), {"target": "openvino"})
    assert table["time"] == {} and "Where the time goes" not in text


def test_bits_are_drawn_where_they_differ(tmp_path):
    recipe = {"pass": [{"use": "ranges"}], "layer": [{"match": "gemm2", "weights": {"bits": 4}}]}
    assert "<h3>Bits</h3>" in made(tmp_path, mlp(), recipe)[0] and "<h3>Bits</h3>" not in made(tmp_path, mlp())[0]


def test_numbers_of_activations_have_names(tmp_path):
    text, table = made(tmp_path, mobilenet())
    listed = text.split('<ol class="names">')[1].split("</ol>")[0]
    assert re.findall("<li>(.*?)</li>", listed) == list(table["activations"])
    for n, name in enumerate(table["activations"], 1):
        assert f"<title>{n} {name}: values" in text


def test_the_worst_bar_has_its_number(tmp_path):
    text, table = made(tmp_path, mobilenet())
    worst = max(table["diagnosis"]["layers"], key=lambda y: y["share"])["name"]
    rows = re.findall(r"<tr[^>]*><td[^>]*>(\d+)</td><td[^>]*>(.*?)</td>", text)
    (number,) = [n for n, name in rows if name == worst]
    drawing = next(svg for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "of the noise" in svg)
    assert len(re.findall(rf"<text[^>]*>{number}</text>", drawing)) == 2  # above its bar, and on the axis


def test_the_bars_add_up(tmp_path):
    """Also where layers compensate for each other's errors."""
    text, table = made(tmp_path, mobilenet(), "int8-rounded")
    drawing = next(svg for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL) if "of the noise" in svg)
    parts = [float(part) for part in re.findall(r"([-0-9.]+) % of the noise", drawing)]
    assert len(parts) == len(table["diagnosis"]["layers"]) and sum(parts) == pytest.approx(100, abs=1)


def test_layers_that_were_measured_together_share_their_bar(tmp_path):
    result = onnxq.quantize(mlp(), "int8", feeds(mlp(), 4), workers=1)
    found = diagnose(result, samples=2)
    names = tuple(name for run in found.runs[:2] for name in run.names)
    runs = (Run(names, sum(run.share for run in found.runs[:2])), *found.runs[2:])
    layers = tuple(replace(y, share=None, alone=None) if y.name in names else y for y in found.layers)
    found = replace(found, runs=runs, layers=layers)
    order = [y.name for y in sorted(found.layers, key=lambda y: y.place)]
    bits = dict.fromkeys(order, (8.0, 8.0))
    drawing = next(plot for plot in plots(found, order, bits) if "hold the error" in plot.title)
    assert "2 together" in drawing.svg and "Pale bars" in drawing.text
    assert any("2 quantizers with little noise" in note for note in found.notes)
    assert found.to_dict()["runs"] == [{"names": list(names), "share": round(runs[0].share, 4)}]


def test_a_search_shows_its_curve(tmp_path):
    recipe = {"pass": [{"use": "ranges"}, {"use": "mixed-precision", "curve": 3, "samples": 4}]}
    text, table = made(tmp_path, mobilenet(), recipe)
    told = next(step["result"] for step in table["steps"] if step["pass"] == "mixed-precision")
    page = Page(text)
    assert "Points of the search" in text and page.count("svg") == 4 + ("<h3>Bits</h3>" in text)
    assert len(re.findall(r"<tr>", text.split("Points of the search")[1].split("</table>")[0])) == len(told["curve"]) + 1


def test_tried_remedies_are_told_apart(tmp_path):
    recipe = {"pass": [{"use": "ranges"}], "layer": [{"match": "gemm2", "weights": {"bits": 2}}]}
    untried, _ = made(tmp_path, mlp(), recipe)
    assert "None of them was tried" in untried and "tried, helps: +" not in untried
    tried, table = made(tmp_path, mlp(), recipe, attempts=1)
    assert "None of them was tried" not in tried and "tried, helps: +" in tried and table["diagnosis"]["tried"]


def test_json_alone_measures_nothing(tmp_path, monkeypatch):
    result = onnxq.quantize(mlp(), "int8", feeds(mlp(), 2))
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result.save_report(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == result.report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


# ---- the command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quantize(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(mlp(), "model.onnx")
    np.savez("data.npz", x=np.concatenate([f["x"] for f in feeds(mlp(), 4)]))

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["onnxq", "quantize", "model.onnx", "-o", "made.onnx", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capsys.readouterr().err

    return call


def test_the_command_writes_page_and_numbers(quantize):
    assert quantize("--data", "data.npz", "--report", "out.html")[0] == 0
    text = Path("out.html").read_text("utf-8")
    assert "onnxq quantize model.onnx" in text and "model.onnx" in text
    assert json.loads(Path("out.json").read_text())["measured"]["samples"] == 4


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_told_before_anything_is_done(quantize, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, told = quantize("--data", "data.npz", "--report", "out.html")
    assert code == 2 and told.count("\n") == 1 and "onnxq-plugins[report]" in told and missing in told
    assert not Path("made.onnx").exists() and not Path("out.html").exists()
    with pytest.raises(OnnxqError):
        check_page()


def test_a_page_needs_samples(quantize):
    code, told = quantize("--set", "activations.bits=32", "--report", "out.html")
    assert code == 2 and "give --data" in told and not Path("made.onnx").exists()
    code, _ = quantize("--set", "activations.bits=32", "--set", "weights.block=32", "--report", "out.json")
    assert Path("out.json").is_file() == (code == 0)


def test_a_page_may_be_measured_on_other_samples(quantize):
    x = np.concatenate([f["x"] for f in feeds(mlp(), 50)])[10:]
    right = runtimes.outputs(runtimes.session(mlp()), [{"x": x}])[0].argmax(1)
    np.savez("test.npz", x=x, labels=right)
    assert quantize("--data", "data.npz", "--report", "out.html", "--test", "test.npz")[0] == 0
    text, table = Path("out.html").read_text("utf-8"), json.loads(Path("out.json").read_text())
    assert table["measured"]["samples"] == 40 and not table["measured"]["calibrated_on_them"]
    assert table["measured"]["top1"]["float"] == 100 and "40 other samples" in text and "flatter" not in text
    assert "test.npz" in text


def test_other_samples_that_are_of_no_use_are_told_before_anything_is_done(quantize):
    np.savez("short.npz", x=np.ones((4, 8), np.float32), labels=np.zeros(3))
    for arguments, word in (
        (("--test", "data.npz"), "--report NAME.html"),
        (("--test", "nowhere.npz", "--report", "out.html"), "does not exist"),
        (("--test", "short.npz", "--report", "out.html"), "labels"),
    ):
        code, told = quantize("--data", "data.npz", *arguments)
        assert code == 2 and word in told and not Path("made.onnx").exists(), told


@pytest.mark.parametrize(("option", "path"), [("-o", "out.json"), ("--overrides", "out.json")])
def test_the_numbers_beside_the_page_overwrite_nothing(quantize, option, path):
    code, told = quantize("--data", "data.npz", "--report", "out.html", option, path)
    assert code == 2 and "out.json" in told and not Path("out.html").exists()


# ---- in a browser ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on the path: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    model = renamed(conv_transpose(), {"conv0": NASTY, "conv9": "a_very_long_name/" * 12})
    result = onnxq.quantize(model, "int8", feeds(model, 4), workers=1)
    return result.save_report(
        folder / "page.html", name="a_very_long_name_of_a_model_" * 5 + ".onnx", command="onnxq quantize " + "x" * 300
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_in_chromium(browser, page_file, scheme, width):
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
    page = context.new_page()
    told: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: (told.append("dialog"), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri(), wait_until="load")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # what is wider than the page scrolls inside its box
    assert (
        page.evaluate("""[...document.querySelectorAll("main *")].filter(e => !e.closest(".scroll, pre")
                            && e.getBoundingClientRect().right > window.innerWidth + 0.5).length""")
        == 0
    )
    if width == 1280:  # all columns can be seen
        assert page.evaluate("(e => e.scrollWidth <= e.clientWidth)(document.querySelector('.bleed'))")
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{key}") for key in ("backgroundColor", "color"))
    light, dark = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in (paper, ink))
    assert (light > dark + 400) if scheme == "light" else (dark > light + 400)
    line = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert line == ink
    before = page.evaluate("[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[5].textContent)")
    button = page.locator("table.sortable thead th:nth-child(6) button")
    assert button.inner_text() == "accumulated dB"
    button.click()
    rising = page.evaluate("[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[5].textContent)")
    numbers = [float(cell) for cell in rising if cell]
    assert numbers == sorted(numbers) and sorted(rising) == sorted(before)
    button.click()
    falling = page.evaluate("[...document.querySelectorAll('table.sortable tbody tr')].map(r => r.cells[5].textContent)")
    assert [float(cell) for cell in falling if cell] == numbers[::-1]
    assert not told and asked == [page_file.as_uri()]
    context.close()


def test_page_without_scripts(browser, page_file):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 360, "height": 800})
    page = context.new_page()
    page.goto(page_file.as_uri())
    assert page.locator("table.sortable tbody tr").count() >= 4 and not page.locator("#sorting").is_visible()
    context.close()
