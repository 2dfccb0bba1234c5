"""Pipelines of scikit-learn, converted by skl2onnx and quantized: what is kept, and what it costs.

    python -m benchmarks.sklearn_pipelines

Data sets that scikit-learn ships, half of each for training, a quarter of it for calibration, the other half to test on.
Classifiers give labels as text, and their probabilities through a ZipMap. Columns: layers in integer kernels, operators of
ai.onnx.ml in both files, score in percent (accuracy; R2 for regression) of scikit-learn, of the converted model and of the
quantized one, SQNR of the probabilities or values, samples whose prediction stays, time of float over quantized for 64 rows
(in turn, one thread), kB. Prints Markdown.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import onnx
from skl2onnx import to_onnx
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from sklearn.decomposition import PCA
from sklearn.ensemble import GradientBoostingClassifier, RandomForestRegressor, VotingClassifier, VotingRegressor
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from onnxq_plugins import measure, runtimes


def pipelines() -> dict[str, tuple[Any, Any]]:
    """Name -> an untrained pipeline and its data set."""
    mlp = {"hidden_layer_sizes": (256, 128), "max_iter": 60, "random_state": 0}
    trees = GradientBoostingClassifier(n_estimators=20, random_state=0)
    forest = RandomForestRegressor(20, max_depth=6, random_state=0)
    both = make_column_transformer((StandardScaler(), slice(0, 15)), (MinMaxScaler(), slice(15, 30)))
    vote = VotingClassifier([("mlp", MLPClassifier(**mlp)), ("trees", trees)], voting="soft", flatten_transform=False)
    return {
        "digits: scaler, PCA, MLP": (make_pipeline(MinMaxScaler(), PCA(32), MLPClassifier(**mlp)), load_digits),
        "breast cancer: two scalers, MLP and trees": (make_pipeline(both, vote), load_breast_cancer),
        "breast cancer: trees": (make_pipeline(StandardScaler(), trees), load_breast_cancer),
        "diabetes: scaler, MLP and forest": (
            make_pipeline(StandardScaler(), VotingRegressor([("mlp", MLPRegressor(**mlp)), ("forest", forest)])),
            load_diabetes,
        ),
    }


def ml_operators(model: onnx.ModelProto) -> Counter[str]:
    """Operators of ai.onnx.ml."""
    return Counter(node.op_type for node in model.graph.node if node.domain == "ai.onnx.ml")


def outputs(model: onnx.ModelProto, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predictions, and the numbers behind them: probabilities of a ZipMap as an array, or the predictions themselves."""
    first, *rest = runtimes.session(model).run(None, {"X": rows})
    numbers = np.array([list(row.values()) for row in rest[0]]) if rest else np.asarray(first)
    return np.asarray(first).reshape(len(rows)), numbers


def row(name: str, pipeline: Any, load: Any) -> str:
    """A row of the table."""
    x, y = load(return_X_y=True)
    classifier = load is not load_diabetes
    y = np.array([f"class {n}" for n in y]) if classifier else y
    x, x_test, y, y_test = train_test_split(x.astype(np.float32), y, test_size=0.5, random_state=0)
    pipeline.fit(x, y)
    model = to_onnx(pipeline, x[:1], target_opset={"": 18, "ai.onnx.ml": 3})
    result = onnxq.quantize(model, "int8", x[::4], check=False)
    kept, before = ml_operators(result.model), ml_operators(model)
    (own, exact), (mine, numbers) = outputs(model, x_test), outputs(result.model, x_test)

    def score(predictions: np.ndarray) -> float:
        if classifier:
            return 100 * float(np.mean(predictions == y_test))
        return 100 * (1 - float(np.sum((predictions - y_test) ** 2) / np.sum((y_test - y_test.mean()) ** 2)))

    same = f"{100 * np.mean(own == mine):.1f}" if classifier else "-"
    ms = runtimes.latency([runtimes.session(m) for m in (model, result.model)], {"X": x_test[:64]}, 1.0)
    scores = " / ".join(f"{score(p):.1f}" for p in (pipeline.predict(x_test), own, mine))
    ops = ", ".join(f"{n} {op}" for op, n in kept.items()) + ("" if kept == before else f" of {sum(before.values())}")
    audit = onnxq.audit(result.model)
    layers = [layer for layer in audit.layers if layer.constant_weight]
    count = f"{sum(layer.quantized for layer in layers)} of {len(layers)}"
    sizes = " -> ".join(f"{m.ByteSize() / 1e3:.0f}" for m in (model, result.model))
    sqnr = measure.sqnr(exact.astype(np.float32), numbers.astype(np.float32))
    return f"| {name} | {count} | {ops} | {scores} | {sqnr:.1f} | {same} | {ms[0] / ms[1]:.2f} | {sizes} |"


def main() -> None:
    warnings.simplefilter("ignore")  # scikit-learn's, of training that stops early
    print(f"{machine()}\n")
    print("| pipeline | integer layers | ai.onnx.ml kept | score: scikit-learn / ONNX / int8 | dB | same | x float | kB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (pipeline, load) in pipelines().items():
        print(row(name, pipeline, load), flush=True)


if __name__ == "__main__":
    main()
