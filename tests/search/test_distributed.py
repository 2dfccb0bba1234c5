"""Searches spread over processes and a Dask cluster: same result, nothing lost, nothing done twice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import joblib
import numpy as np
import pytest

from onnxq_plugins import quantize
from onnxq_plugins.measure import networks
from onnxq_plugins.measure.metrics import percent_agreement
from tests.zoo import feeds, mlp, mobilenet, slowly

RECIPE = {"pass": [{"use": "mixed-precision", "candidates": ["W3A8", "W4A8", "W6A8", "W8A8"], "curve": 4}]}


def half(reference, found, labels):
    """A metric of the user's own."""
    return percent_agreement(reference, found) / 2


pytestmark = pytest.mark.usefixtures("own_kernels")


@pytest.fixture(scope="module")
def here(own_kernels):
    """What threads of this process find."""
    return quantize(mobilenet(), RECIPE, feeds(mobilenet(), 20), workers=2)


@contextlib.contextmanager
def local_cluster():
    """A scheduler and two workers, processes of their own."""
    distributed = pytest.importorskip("distributed", reason="needs the extra dask")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def cluster():
    with local_cluster() as shared:
        yield shared


def same(a, b) -> bool:
    return (
        a.model.SerializeToString() == b.model.SerializeToString()
        and a.report["steps"][0]["result"] == b.report["steps"][0]["result"]
    )


def test_processes_find_what_threads_find(here):
    with joblib.parallel_config(backend="loky"):
        assert same(here, quantize(mobilenet(), RECIPE, feeds(mobilenet(), 20), workers=2))


def test_a_cluster_finds_what_threads_find(here, cluster):
    import distributed

    with distributed.Client(cluster), joblib.parallel_config(backend="dask"):
        there = quantize(mobilenet(), RECIPE, feeds(mobilenet(), 20), metric=half)
    report = there.report["steps"][0]["result"]
    for a, b in zip(here.report["steps"][0]["result"]["curve"], report["curve"], strict=True):
        assert b.pop("half") <= 50
        assert a == b
    assert (report["metric"], report["float"]) == ("half", 50.0)


def test_a_worker_that_dies_takes_nothing_along(here, tmp_path):
    """One of two workers is killed when some networks have been measured; what was there before is not asked for again.
    A cluster of its own, since the shared one is not to lose workers."""
    import distributed

    done, victims = [], []

    def track(items, what, total=None):
        for item in items:
            if what == "sensitivities":
                done.append(len(list(tmp_path.glob("*-scores.npz"))))
                if len(done) == 5:
                    pids = client.run(os.getpid)
                    victims.append(next(iter(pids.values())))
                    os.kill(victims[0], signal.SIGKILL)
            yield item

    with (
        local_cluster() as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask"),
    ):
        there = quantize(mobilenet(), RECIPE, feeds(mobilenet(), 20), cache=tmp_path, track=track)
    assert victims and same(here, there)
    assert all(files >= n for n, files in enumerate(done, 1))  # kept as soon as they came, whatever happened then
    assert len(list(tmp_path.glob("*-scores.npz"))) == there.report["steps"][0]["result"]["networks_measured"]


@pytest.mark.parametrize("stage", ["sensitivities", *slowly("rounding", "measuring the curve")])
def test_an_interrupted_search_goes_on_where_it_was(here, stage, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    def track(items, what, total=None):
        for n, item in enumerate(items):
            if what == stage and n == 3:
                raise Stop
            yield item

    with pytest.raises(Stop):
        quantize(mobilenet(), RECIPE, feeds(mobilenet(), 20), cache=tmp_path, track=track, workers=1)
    kept = {p.name for p in tmp_path.glob("*") if p.name.endswith(("-codes.npz", "-scores.npz"))}
    assert kept
    ran = []
    whole = networks.score_model
    monkeypatch.setattr(networks, "score_model", lambda *args: (ran.append(1), whole(*args))[1])
    again = quantize(mobilenet(), RECIPE, feeds(mobilenet(), 20), cache=tmp_path, workers=1)
    assert again.model.SerializeToString() == here.model.SerializeToString()
    report = again.report["steps"][0]["result"]
    assert report["curve"] == here.report["steps"][0]["result"]["curve"]
    scored = sum(name.endswith("-scores.npz") for name in kept)
    wanted = here.report["steps"][0]["result"]["networks_measured"]
    assert len(ran) == report["networks_measured"] == wanted - scored
    ran.clear()  # once more: all is there, no network is run and no weight is rounded
    monkeypatch.setattr("onnxq_plugins.search.widths.Problem.of", lambda *_: pytest.fail("rounded again"))
    assert quantize(mobilenet(), RECIPE, feeds(mobilenet(), 20), cache=tmp_path).report["steps"][0]["result"]["curve"]
    assert not ran


def test_a_cache_is_of_its_samples_and_codes(tmp_path):
    model = mlp()
    first = quantize(model, RECIPE, feeds(model, 20), cache=tmp_path, workers=1)
    others = [{"x": -feed["x"]} for feed in feeds(model, 20)]
    second = quantize(model, RECIPE, others, cache=tmp_path, workers=1)
    assert same(second, quantize(model, RECIPE, others, workers=1)) and not same(first, second)
    for file in tmp_path.glob("*-*.npz"):
        file.write_bytes(file.read_bytes()[:20])  # damaged: computed again
    assert same(first, quantize(model, RECIPE, feeds(model, 20), cache=tmp_path, workers=1))


def test_scores_of_metrics_that_may_change_are_not_kept(tmp_path):
    values = iter(range(1000))
    model = mlp()
    found = [
        quantize(model, RECIPE, feeds(model, 20), cache=tmp_path, workers=1, metric=lambda *_: next(values))
        for _ in range(2)
    ]
    last, again = ([p["<lambda>"] for p in one.report["steps"][0]["result"]["curve"]] for one in found)
    assert min(again) > max(last)


@pytest.mark.slow  # fails where the machine is busy
def test_the_command_line_takes_a_cluster(cluster, tmp_path):
    runtime_samples = np.concatenate([feed["x"] for feed in feeds(mlp(), 8)])
    np.save(tmp_path / "x.npy", runtime_samples)
    (tmp_path / "m.onnx").write_bytes(mlp().SerializeToString())
    command = [sys.executable, *["-m", "onnxq_plugins.cli", "quantize", "m.onnx", "-r", "mixed", "--data", "x.npy"]]
    command += ["--set", "mixed-precision.curve=2", "-o"]
    for more in (["a.onnx", "--dask", cluster.scheduler_address], ["b.onnx", "--processes"]):
        found = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
        assert found.returncode == 0, found.stderr
    settings = ["mixed-precision.curve=2"]
    quantize(tmp_path / "m.onnx", "mixed", tmp_path / "x.npy", settings=settings, output=tmp_path / "c.onnx")
    made = {(tmp_path / name).read_bytes() for name in ("a.onnx", "b.onnx", "c.onnx")}
    assert len(made) == 1


def test_a_scheduler_that_is_not_there(tmp_path):
    pytest.importorskip("distributed", reason="needs the extra dask")
    (tmp_path / "m.onnx").write_bytes(mlp().SerializeToString())
    np.save(tmp_path / "x.npy", np.concatenate([feed["x"] for feed in feeds(mlp(), 8)]))
    command = [sys.executable, "-m", "onnxq_plugins.cli", "quantize", "m.onnx", "--data", "x.npy", "--dask", "nonsense"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert found.returncode == 2 and found.stderr.startswith("error: no Dask scheduler answers at 'nonsense'")
    assert len(found.stderr.splitlines()) == 1 and not (tmp_path / "m.int8.onnx").exists()
