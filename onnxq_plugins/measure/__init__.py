"""How good a network is: arithmetic of arrays, metrics of outputs, networks scored on samples."""

from onnxq_plugins.measure.arrays import IDENTICAL, agreement, drift, sqnr

__all__ = ["IDENTICAL", "agreement", "drift", "sqnr"]
