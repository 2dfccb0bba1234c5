"""A scikit-learn pipeline, converted by skl2onnx, with its matrix products in int8. Needs: pip install skl2onnx."""

import numpy as np
from skl2onnx import to_onnx
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import onnxq_plugins as onnxq
from onnxq_plugins import runtimes

features, classes = load_breast_cancer(return_X_y=True)
labels = np.array(["malignant", "benign"])[classes]
train, test, train_labels, test_labels = train_test_split(features.astype(np.float32), labels, random_state=0)
pipeline = make_pipeline(StandardScaler(), MLPClassifier((64, 32), max_iter=300, random_state=0)).fit(train, train_labels)

model = to_onnx(pipeline, train[:1])  # labels are text, probabilities come through a ZipMap
result = onnxq.quantize(model, "int8", train[:200])
print(result.summary)

found, probabilities = runtimes.session(result.model).run(None, {"X": test})
print(f"scikit-learn: accuracy {pipeline.score(test, test_labels):.4f}")
print(f"int8: accuracy {np.mean(found == test_labels):.4f}, the first sample {probabilities[0]}")
