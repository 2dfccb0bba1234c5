"""Arguments of `nncf.quantize`: each is mapped, or refused in a sentence. NNCF itself is not imported."""

from __future__ import annotations

import difflib
import glob
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.files import skeleton
from onnxq_plugins.graph.mapped import MappedWeights
from onnxq_plugins.graph.normalize import name_nodes
from onnxq_plugins.graph.reading import read

# Types of OpenVINO -> operators of ONNX that become these.
_TYPES = {
    "Convolution": ("Conv",),
    "GroupConvolution": ("Conv",),
    "ConvolutionBackpropData": ("ConvTranspose",),
    "GroupConvolutionBackpropData": ("ConvTranspose",),
    "MatMul": ("MatMul", "Gemm"),
    "Multiply": ("Mul",),
    "Subtract": ("Sub",),
    "Divide": ("Div",),
    "AvgPool": ("AveragePool",),
    "Swish": ("Swish",),
    "Interpolate": ("Resize", "Upsample"),
    "ReLU": ("Relu",),
    "LSTMSequence": ("LSTM",),
    "GRUSequence": ("GRU",),
}


def refused(mode: Any, preset: Any, device: Any, fast_bias_correction: Any, advanced: Any) -> list[str]:
    """A sentence for each argument that cannot be had."""
    problems = []
    if mode is not None:
        problems.append(f"mode = {_value(mode)}: OpenVINO's CPU runs no float of 8 bits; leave it out.")
    if preset is not None and _value(preset) != "mixed":
        problems.append(
            f"preset = {_value(preset)}: activations have a zero point, with which OpenVINO's kernels run as fast; leave it "
            "out, or say mixed."
        )
    if device is not None and _value(device) not in ("ANY", "CPU", "CPU_SPR"):
        problems.append(
            f"target_device = {_value(device)}: target openvino is proven on the CPU alone; leave it out, or give "
            "onnxq_plugins.quantize the target of that hardware."
        )
    if not fast_bias_correction:
        problems.append("fast_bias_correction = False: recipe int8-rounded goes further; say recipe='int8-rounded'.")
    if advanced is not None:
        problems.append("advanced_parameters are those of NNCF's own algorithms; a recipe says it here: recipe={...}.")
    return problems


def ignored(model: Path | onnx.ModelProto, scope: Any) -> list[str]:
    """The operators that an nncf.IgnoredScope names, as `exclude` takes them. Raises OnnxqError for what the model does not
    have (unless `scope.validate` is false), and for subgraphs."""
    if scope is None:
        return []
    shell = skeleton(read(model, MappedWeights()) if isinstance(model, Path) else model)
    name_nodes(shell.graph)
    nodes = {node.name: node.op_type for node in shell.graph.node}
    ends = {output: node.name for node in shell.graph.node for output in node.output}  # OpenVINO names some after these
    found: list[str] = []
    problems: list[str] = []
    if getattr(scope, "subgraphs", ()):
        problems.append("ignored_scope: subgraphs are not taken; name their operators.")
    for name in scope.names:
        node = name if name in nodes else ends.get(name)
        found += [] if node is None else [node]
        if node is None:
            problems += [f"ignored_scope: the model has no operator '{name}'; {_near(name, nodes)}."]
    for pattern in scope.patterns:
        some = [name for name in nodes if re.match(pattern, name)]
        found += some
        problems += [] if some else [f"ignored_scope: no operator matches '{pattern}'; {_near(pattern, nodes)}."]
    for kind in scope.types:
        some = [name for name, op in nodes.items() if op in _TYPES.get(kind, (kind,))]
        found += some
        problems += [] if some else [f"ignored_scope: the model has no {kind}; {_near(kind, {*nodes.values()})}."]
    if getattr(scope, "validate", True):
        OnnxqError.check(problems)
    return [glob.escape(name) for name in dict.fromkeys(found)]


def _near(name: str, names: Iterable[str]) -> str:
    """The end of a sentence: what the model has instead."""
    there = sorted(names)
    return f"it has {', '.join(difflib.get_close_matches(name, there, 1) or there[:3])} and others"


def _value(member: Any) -> str:
    """The value of a member of an enumeration, or a text as it is."""
    return str(getattr(member, "value", member))
