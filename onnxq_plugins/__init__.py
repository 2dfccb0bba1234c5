"""onnxq-plugins: post-training quantization of ONNX models as a set of plugins.

The public names are all here, and in the modules that docs/write-a-plugin.md names for plugins; everything else may change.
"""

from onnxq_plugins.calibration import Calibration, Gram, Histogram, Moments
from onnxq_plugins.data import Data, DataOptions, open_data
from onnxq_plugins.edge.audits import audit
from onnxq_plugins.edge.matrix import matrix
from onnxq_plugins.engine import Result, Retargeted, quantize, retarget
from onnxq_plugins.errors import OnnxqError, OnnxqWarning
from onnxq_plugins.export.overrides import ort_arguments, ort_model, ort_overrides
from onnxq_plugins.graph import (
    BatchNorm,
    ChannelGroup,
    Graph,
    Layer,
    channel_groups,
    load,
    permute,
    replace_with_sum,
    rescale,
    split_outputs,
)
from onnxq_plugins.hookspecs import hookimpl
from onnxq_plugins.job import Job, Pass, Recipe
from onnxq_plugins.report.causes import Cause
from onnxq_plugins.report.check import Check
from onnxq_plugins.report.comparison import Comparison
from onnxq_plugins.report.comparison import compare_models as compare
from onnxq_plugins.report.curve import Curve, point_recipe
from onnxq_plugins.report.diagnosis import Diagnosis, diagnose
from onnxq_plugins.report.remedies import Remedy
from onnxq_plugins.runtimes import register_custom_ops
from onnxq_plugins.runtimes.audit import Audit, LayerAudit
from onnxq_plugins.runtimes.onnxruntime import audit_model
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Proof, Runtime
from onnxq_plugins.selection import auto
from onnxq_plugins.spec import Plan, QuantSpec
from onnxq_plugins.targets import Rule, Target

__version__ = "0.1.0"
__all__ = [
    "Audit",
    "BatchNorm",
    "Calibration",
    "Cause",
    "ChannelGroup",
    "Check",
    "Comparison",
    "Curve",
    "Data",
    "DataOptions",
    "Diagnosis",
    "Executed",
    "Gram",
    "Graph",
    "Histogram",
    "Inspection",
    "Job",
    "Layer",
    "LayerAudit",
    "Moments",
    "OnnxqError",
    "OnnxqWarning",
    "Pass",
    "Plan",
    "Proof",
    "QuantSpec",
    "Recipe",
    "Remedy",
    "Result",
    "Retargeted",
    "Rule",
    "Runtime",
    "Target",
    "audit",
    "audit_model",
    "auto",
    "channel_groups",
    "compare",
    "diagnose",
    "hookimpl",
    "load",
    "matrix",
    "open_data",
    "ort_arguments",
    "ort_model",
    "ort_overrides",
    "permute",
    "point_recipe",
    "quantize",
    "register_custom_ops",
    "replace_with_sum",
    "rescale",
    "retarget",
    "split_outputs",
]
