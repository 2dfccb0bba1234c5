"""Names of nodes, tensors and operators that arguments hold, looked up in the user's own model."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from onnxq_plugins.files import skeleton
from onnxq_plugins.graph import LAYER_OPS
from onnxq_plugins.graph.normalize import name_nodes
from onnxq_plugins.job import LayerRule
from onnxq_plugins.ort.arguments import Asked, bits_of

_GIVEN = ("scale", "zero_point", "rmin", "rmax")


class Names:
    """The operators and tensors of a model, under the names that they have after import."""

    def __init__(self, model: onnx.ModelProto) -> None:
        shell = skeleton(model)
        name_nodes(shell.graph)
        self.nodes = {node.name: node for node in shell.graph.node}
        self.constants = {t.name for t in (*model.graph.initializer, *(t.values for t in model.graph.sparse_initializer))}
        self.constants |= {o for node in shell.graph.node if node.op_type == "Constant" for o in node.output}

    def tensors(self) -> set[str]:
        """All names of tensors."""
        return self.constants | {name for node in self.nodes.values() for name in (*node.input, *node.output) if name}

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """Layers that read a tensor: as their weight if it is constant, else as their input."""
        at = 1 if tensor in self.constants else 0
        return [n for n in self.nodes.values() if n.op_type in LAYER_OPS and tensor in n.input[at : at + 1]]


def choose(asked: Asked, names: Names, ops: Sequence[str], only: Sequence[str], out: Sequence[str]) -> None:
    """Which operators are quantized. Named ones are, whatever is faster; of the others those that the recipe quantizes.

    ops    kinds of operators, all if there is none
    only   names of operators, all if there is none
    out    names of operators that stay float
    """
    present = {node.op_type for node in names.nodes.values()}
    for op in ops:
        if op not in present and not onnx.defs.has(op):
            near = difflib.get_close_matches(op, [*present, *LAYER_OPS], 1, 0.5)
            asked.refuse(f"op_types_to_quantize: no operator is called '{op}'{f'; use {near[0]}' if near else ''}.")
    for key, given in (("nodes_to_quantize", only), ("nodes_to_exclude", out)):
        for name in given:
            if name not in names.nodes:
                near = difflib.get_close_matches(name, names.nodes, 1) or list(names.nodes)[:3]
                asked.refuse(f"{key}: the model has no node '{name}'; it has {', '.join(near)} and others.")
    if ops or only:
        left = [
            name
            for name, node in names.nodes.items()
            if (not ops or node.op_type in ops) and (not only or name in only) and name not in out
        ]
        asked.exclude += ["*", *(f"!{glob.escape(name)}" for name in left)]
    else:
        asked.exclude += [glob.escape(name) for name in out]
    forced = [n for n in only if n in names.nodes and names.nodes[n].op_type in LAYER_OPS and n not in out]
    if forced:
        asked.rules.append(LayerRule(match=tuple(glob.escape(name) for name in forced), quantize=True))


# ---- overrides of tensors -------------------------------------------------------------------------------------------------


def override(asked: Asked, names: Names, overrides: Mapping[str, Any]) -> None:
    """`TensorQuantOverrides`: widths become rules for the layers that read a tensor, ranges are fixed."""
    for tensor, entries in overrides.items():
        where = f"TensorQuantOverrides['{tensor}']"
        if not isinstance(entries, (list, tuple)) or not entries or not all(isinstance(e, Mapping) for e in entries):
            asked.refuse(f"{where} must be a list of dictionaries.")
        elif tensor not in names.tensors():
            near = difflib.get_close_matches(tensor, names.tensors(), 1)
            asked.refuse(f"{where}: the model has no such tensor{f', but {near[0]!r}' if near else ''}.")
        elif tensor in names.constants:
            _weight(asked, names, tensor, entries, where)
        else:
            _activation(asked, names, tensor, entries, where)


def _weight(asked: Asked, names: Names, tensor: str, entries: Sequence[Mapping[str, Any]], where: str) -> None:
    layers, keys = names.readers(tensor), {key for entry in entries for key in entry}
    if not layers:
        asked.refuse(f"{where}: no Conv, ConvTranspose, Gemm or MatMul has this weight; leave it out.")
    if given := sorted(keys & {*_GIVEN, "convert"}):
        asked.refuse(f"{where}: {given[0]} of a weight follows from its values, which passes change; leave it out.")
    if any(entry.get("symmetric") is False for entry in entries):
        asked.refuse(f"{where}: integer kernels are exact only beside symmetric weights; leave 'symmetric' out.")
    axes = {entry["axis"] for entry in entries if entry.get("axis") is not None}
    if layers and axes and not axes <= _outputs(layers[0]):
        asked.refuse(f"{where}: axis = {min(axes)} holds no outputs of a {layers[0].op_type}; leave it out.")
    kinds = [entry["quant_type"] for entry in entries if "quant_type" in entry]
    bits = max((bits_of(asked, f"{where}: quant_type", kind) for kind in kinds), default=8)
    bits = bits - 1 if any(entry.get("reduce_range") for entry in entries) else bits
    weights = {"bits": bits} | ({"block": "channel"} if axes or len(entries) > 1 else {})
    if layers:
        asked.rules.append(LayerRule(match=tuple(glob.escape(n.name) for n in layers), weights=weights))


def _activation(asked: Asked, names: Names, tensor: str, entries: Sequence[Mapping[str, Any]], where: str) -> None:
    entry, layers = entries[0], names.readers(tensor)
    for key in ("axis", "convert", "reduce_range"):
        if entry.get(key):
            asked.refuse(f"{where}: {key} of an activation has no integer kernel; leave it out.")
    if len(entries) > 1:
        asked.refuse(f"{where}: an activation has one scale; give one dictionary.")
    kind, changes = entry.get("quant_type"), dict[str, Any]()
    if kind is not None and (bits := bits_of(asked, f"{where}: quant_type", kind)) not in (0, 8):
        changes["bits"] = bits
    if entry.get("symmetric"):
        changes["symmetric"] = True
    if changes and not layers:
        asked.refuse(f"{where}: no Conv, ConvTranspose, Gemm or MatMul reads it as its input; leave it out.")
    elif changes:
        asked.rules.append(LayerRule(match=tuple(glob.escape(n.name) for n in layers), activations=changes))
    if (entry.get("rmin") is None) != (entry.get("rmax") is None):
        asked.refuse(f"{where}: give rmin and rmax, or neither.")
    elif (entry.get("scale") is None) != (entry.get("zero_point") is None):
        asked.refuse(f"{where}: give scale and zero_point, or neither.")
    elif entry.get("rmin") is not None:
        asked.ranges[tensor] = (float(entry["rmin"]), float(entry["rmax"]))
    elif entry.get("scale") is not None:
        signed, bits = getattr(kind, "name", "QUInt8").startswith("QI"), changes.get("bits", 8)
        first, scale, zero = (-(2 ** (bits - 1)) if signed else 0), float(entry["scale"]), int(entry["zero_point"])
        asked.ranges[tensor] = (scale * (first - zero), scale * (first + 2**bits - 1 - zero))


def _outputs(node: onnx.NodeProto) -> set[int]:
    """The axis of a layer's weight that holds its outputs, also as counted from behind; -1 means MatMul's only there."""
    if node.op_type == "Gemm":
        return {0, -2} if any(a.name == "transB" and a.i for a in node.attribute) else {1, -1}
    return {"Conv": {0}, "ConvTranspose": {1}, "MatMul": {1, -1}}[node.op_type]
