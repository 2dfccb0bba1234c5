"""Graph: the float model, always runnable. A thin wrapper over onnx-graphsurgeon: layers, tensors, edits."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Collection, Container, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.beside import Beside, split
from onnxq_plugins.graph.editing import caller, operand, replace_reads
from onnxq_plugins.graph.fingerprint import Contents, Fingerprint, is_large
from onnxq_plugins.graph.layer import LAYER_OPS, BatchNorm, Layer
from onnxq_plugins.graph.mapped import MappedWeights
from onnxq_plugins.graph.opsets import expand_all
from onnxq_plugins.spec import Array

__all__ = ["LAYER_OPS", "SHAPE_OPS", "BatchNorm", "Graph", "Layer"]

# Operators that move or select values without computing: input and output share one quantizer. Pad with zeros belongs
# here too, since 0 is always on the grid.
SHAPE_OPS = frozenset(
    {
        "Identity",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Slice",
        "Split",
        "Gather",
        "DepthToSpace",
        "SpaceToDepth",
        "MaxPool",
        "Pad",
        "Resize",
        "Expand",
    }
)


class Graph:
    """The float model. Rewrites change it in place and keep its function; `touched` collects the names of the tensors
    whose values they changed, so that the engine can drop solutions for the old values.

    Made by `onnxq_plugins.graph.load`, never by hand.
    """

    def __init__(
        self,
        graph: gs.Graph,
        beside: Beside,
        batchnorms: dict[str, BatchNorm] | None = None,
        notes: Iterable[str] = (),
        mapped: MappedWeights | None = None,
        versions: tuple[int, int] = (0, 0),
        imported: Collection[str] = (),
    ) -> None:
        self._graph = graph
        self._beside = beside
        self.batchnorms = dict(batchnorms or {})  # by name of the layer output that absorbed it
        self.notes = list(notes)  # what import changed or could not change, for the report
        self.touched: set[str] = set()
        self.mapped = mapped or MappedWeights()  # weights that stay in files
        self.defaults = beside.defaults  # values of inputs that callers may leave out
        self.versions = versions  # opset and IR version of the user's own model
        self._contents = Contents()
        self._written: dict[bool, tuple[str, onnx.ModelProto]] = {}  # by `expand`: structure, the model with placeholders
        self.run_shapes: tuple[str, dict[str, tuple[int, ...]]] = "", {}  # of one sample, see `calibration.shapes`
        self.imported = frozenset(imported)  # names of the operators of the user's own model
        self.floats: frozenset[str] = frozenset()  # operators that stay float, whatever a plan has around them
        self.output_opset = 0  # lowest opset of what is made of it; a pass that needs a newer one raises it

    # ---- queries ---------------------------------------------------------------------------------------------------

    @cached_property
    def _tensors(self) -> dict[str, gs.Tensor]:
        named = {t.name: t for t in (*self._graph.inputs, *self._graph.outputs)} | self._graph.tensors()
        return {name: t for name, t in named.items() if name}

    @property
    def nodes(self) -> list[gs.Node]:
        """The operators in topological order (graphsurgeon nodes: op, name, attrs, inputs, outputs)."""
        return list(self._graph.nodes)

    @property
    def inputs(self) -> list[str]:
        """Names of the model's inputs."""
        return [t.name for t in self._graph.inputs]

    @property
    def outputs(self) -> list[str]:
        """Names of the model's outputs."""
        return [t.name for t in self._graph.outputs]

    @property
    def opset(self) -> int:
        """Version of the ai.onnx operator set."""
        return int(self._graph.opset)

    def tensor(self, name: str) -> gs.Tensor:
        """The graphsurgeon tensor of that name; KeyError if there is none."""
        return self._tensors[name]

    def producer(self, name: str) -> gs.Node | None:
        """The operator that computes a tensor; None for inputs, constants and an optional output that is left out ("")."""
        producers = self.tensor(name).inputs if name else []
        return producers[0] if producers else None

    def consumers(self, name: str) -> list[gs.Node]:
        """The operators that read a tensor, control flow whose bodies read it included."""
        return list(self.tensor(name).outputs) if name else []

    def is_constant(self, name: str) -> bool:
        """True for weights and other constants."""
        return isinstance(self._tensors.get(name), gs.Constant)

    def constant(self, name: str) -> Array:
        """Values of a constant."""
        values: Array = np.asarray(self.tensor(name).values)
        return values

    def shape(self, name: str) -> tuple[int | str | None, ...] | None:
        """Shape as inferred at import (symbols or None for dynamic axes); None if the rank is unknown."""
        shape = self.tensor(name).shape
        return None if shape is None else tuple(shape)

    @property
    def unranked(self) -> list[str]:
        """Names of the activations whose number of axes is unknown."""
        return [t.name for n in self._graph.nodes for t in n.outputs if not t.is_empty() and t.shape is None]

    def set_shape(self, name: str, shape: Sequence[int | str | None], dtype: Any) -> None:
        """The shape of an activation that import could not infer; symbols or None for dynamic axes."""
        tensor = self.tensor(name)
        tensor.shape, tensor.dtype = list(shape), np.dtype(dtype)

    @cached_property
    def layers(self) -> list[Layer]:
        """All layers with a constant weight, in topological order."""
        return [layer for node in self._graph.nodes if (layer := self._layer(node)) is not None]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def layer(self, name: str) -> Layer:
        """The layer of that name; KeyError if there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def _layer(self, node: gs.Node) -> Layer | None:
        if node.op not in LAYER_OPS or node.domain or len(node.inputs) < 2:
            return None
        x, weight = node.inputs[:2]
        if isinstance(x, gs.Constant) or not isinstance(weight, gs.Constant) or weight.dtype != np.float32:
            return None
        bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
        if bias is not None and not isinstance(bias, gs.Constant):
            return None
        shape, groups, attrs = tuple(weight.shape), int(node.attrs.get("group", 1)), dict(node.attrs)
        out_axis, in_axis = 0, 1
        if node.op == "ConvTranspose":
            out_axis, in_axis = 1, 0
        elif node.op in ("Gemm", "MatMul"):
            if len(shape) != 2 or attrs.get("transA", 0):
                return None
            if node.op == "MatMul" or not attrs.get("transB", 0):
                out_axis, in_axis = 1, 0
        channels = shape[1] * groups if node.op == "ConvTranspose" else shape[out_axis]
        if bias is not None and tuple(bias.shape) != (channels,) and node.op != "Gemm":
            return None
        output = node.outputs[0]
        after = self.elided_activation(output.name)
        return Layer(
            node.name,
            node.op,
            x.name,
            output.name,
            after.outputs[0].name if after else output.name,
            weight.name,
            bias.name if bias is not None else None,
            shape,
            out_axis,
            in_axis,
            groups,
            attrs,
        )

    def decided_branches(self) -> dict[str, bool]:
        """If operators whose condition is a constant -> that condition."""
        conditions = {n.name: n.inputs[0] for n in self._graph.nodes if n.op == "If" and not n.domain}
        known = {name: t.values for name, t in conditions.items() if isinstance(t, gs.Constant)}
        return {name: bool(values.item()) for name, values in known.items() if values.size == 1}

    def has_body(self, node: gs.Node) -> bool:
        """True for control flow, such as If and Loop."""
        return self._beside.has_body(node.name)

    @property
    def value_info(self) -> list[onnx.ValueInfoProto]:
        """What the user's model says about its inner tensors."""
        return list(self._beside.header.graph.value_info)

    def elided_activation(self, name: str) -> gs.Node | None:
        """The Relu, or Clip from 0, that is the only consumer of `name`. An output grid that starts at 0 does the same,
        so onnxruntime drops it from a quantized chain."""
        tensor = self._tensors.get(name)
        if tensor is None or len(tensor.outputs) != 1 or tensor in self._graph.outputs:
            return None
        node: gs.Node = tensor.outputs[0]
        if node.op == "Relu":
            return node
        bounds = node.inputs[1:]
        if node.op == "Clip" and bounds and all(isinstance(b, gs.Constant) or b.is_empty() for b in bounds):
            low = bounds[0]
            return node if isinstance(low, gs.Constant) and float(low.values.item()) == 0.0 else None
        return None

    def is_shape_only(self, node: gs.Node) -> bool:
        """True if the node only moves values of its first input, so that one quantizer serves both ends."""
        if node.op not in SHAPE_OPS or node.domain or isinstance(node.inputs[0], gs.Constant):
            return False
        if node.op == "Resize":
            return bool(node.attrs.get("mode", "nearest") == "nearest")
        if node.op == "Pad":
            value = node.inputs[2] if len(node.inputs) > 2 else None
            zero = value is None or value.is_empty() or (isinstance(value, gs.Constant) and not value.values.any())
            return bool(zero or node.attrs.get("mode", "constant") != "constant")
        return len(node.outputs) == 1 or node.op == "Split"

    def root(self, name: str) -> str:
        """The tensor whose quantizer `name` shares: followed upwards through shape-only operators."""
        while (node := self.producer(name)) is not None and self.is_shape_only(node):
            name = node.inputs[0].name
        return name

    # ---- edits --------------------------------------------------------------------------------------------------

    def changed(self) -> None:
        """Forget the layers, which are derived from the structure; every edit of nodes or edges calls it."""
        self.__dict__.pop("layers", None)

    def set_constant(self, name: str, values: Array) -> None:
        """New values for a constant; shape and dtype may change with them."""
        self.tensor(name).values = np.asarray(values, order="C")
        self.touched.add(name)
        self.changed()

    def add_constant(self, name: str, values: Array) -> gs.Constant:
        """A new constant under `name`, or under `name` with a number if that is taken."""
        constant = gs.Constant(self.fresh(name), np.asarray(values, order="C"))
        self._tensors[constant.name] = constant
        return constant

    def add_node(
        self,
        op: str,
        name: str,
        inputs: Sequence[gs.Tensor | str | None],
        outputs: Sequence[gs.Tensor] | None = None,
        before: gs.Node | None = None,
        domain: str = "",
        **attrs: Any,
    ) -> gs.Node:
        """Insert an operator before another, at the end by default; the engine sorts behind each pass.

        name      "" makes one; where another operator has it in the end, the engine numbers the new one
        inputs    tensors or their names; None leaves an optional one out
        outputs   tensors without a producer; None makes one activation, named after the operator
        """
        name = name or self.fresh_node(op.lower(), {node.name for node in self._graph.nodes})
        reads = [operand(self.tensor, t) for t in inputs]
        writes = [self.add_variable(f"{name}_out")] if outputs is None else list(outputs)
        node = gs.Node(op=op, name=name, attrs=attrs, inputs=reads, outputs=writes, domain=domain or None)
        node.made_in = caller()  # for whoever has to say what is wrong with it
        nodes = self._graph.nodes
        position = next((i for i, n in enumerate(nodes) if n is before), len(nodes))
        nodes.insert(position, node)
        self.changed()
        return node

    def set_input(self, node: gs.Node, at: int, tensor: gs.Tensor | str | None) -> None:
        """Let an operator read another tensor, by itself or by name, as input `at`; None leaves that input out. Optional
        inputs before it that it does not have are left out."""
        _ = self._tensors  # what is no longer read stays known by its name until `tidy`
        inputs = list(node.inputs) + [gs.Variable.empty()] * (at + 1 - len(node.inputs))
        inputs[at] = operand(self.tensor, tensor)
        while inputs and inputs[-1].is_empty():
            inputs.pop()
        for old in node.inputs:  # graphsurgeon's own removal goes by equality, and may take an equal operator's place
            kept = [reader for reader in old.outputs if reader is not node]
            list.clear(old.outputs)
            list.extend(old.outputs, kept)
        list.clear(node.inputs)
        node.inputs.extend(inputs)
        self.changed()

    def add_variable(
        self, name: str, like: gs.Tensor | None = None, shape: Sequence[int | str | None] | None = None
    ) -> gs.Variable:
        """A new activation tensor, float32 or with the dtype and shape of another."""
        variable = gs.Variable(
            self.fresh(name),
            dtype=np.float32 if like is None else like.dtype,
            shape=like.shape if like is not None and shape is None else shape,
        )
        self._tensors[variable.name] = variable
        return variable

    def fresh(self, name: str) -> str:
        """`name`, numbered if a tensor already has it."""
        candidate, i = name, 1
        while candidate in self._tensors:
            candidate, i = f"{name}_{i}", i + 1
        return candidate

    def fresh_node(self, name: str, taken: Container[str]) -> str:
        """`name`, numbered if it is among the names of operators that are taken."""
        return next(n for i in itertools.count() if (n := f"{name}_{i}" if i else name) not in taken)

    def bypass(self, node: gs.Node, by: gs.Tensor) -> None:
        """Remove a one-output node; consumers of its output then read `by`. A model output keeps its name."""
        old = node.outputs[0]
        node.outputs.clear()
        if old in self._graph.outputs:
            if isinstance(by, gs.Variable) and by.inputs and by not in self._graph.outputs:
                producer = by.inputs[0]
                replace_reads(by, old)
                producer.outputs[next(i for i, t in enumerate(producer.outputs) if t is by)] = old
                if by.name in self.batchnorms:
                    self.batchnorms[old.name] = self.batchnorms.pop(by.name)
            else:
                self.add_node("Identity", node.name, [by], [old])
        else:
            replace_reads(old, by)
        node.inputs.clear()
        nodes = self._graph.nodes
        del nodes[next(i for i, n in enumerate(nodes) if n is node)]  # `remove` compares operators, which takes long
        self.changed()

    def load_constants(self) -> None:
        """Read every constant now: one that is still lazy keeps the whole imported model in memory."""
        for tensor in self._tensors.values():
            if isinstance(tensor, gs.Constant):
                if tensor.name in self.mapped.arrays:
                    tensor.values, tensor.data_location = self.mapped.arrays[tensor.name], None
                _ = tensor.values

    def tidy(self) -> None:
        """Drop what no output needs and put the operators in topological order."""
        self._graph.cleanup().toposort()
        self.__dict__.pop("_tensors", None)
        self.changed()

    # ---- export ---------------------------------------------------------------------------------------------------

    def model(self, weights: dict[str, Array] | None = None, expand: bool = True) -> onnx.ModelProto:
        """The float model as ONNX, with IR version, opset, metadata and documentation as imported.

        weights   a dict that receives the large constants; the model then has placeholders ("external data") for them and
                  no copy is made. `runtimes.session` takes both. The graph is written anew only if it has changed.
        expand    write operators that the opset lacks, such as Gelu, in elementary ones

        Raises OnnxqError if an attribute cannot be written.
        """
        if weights is None:
            return self._model([], expand)
        large = self._large()
        weights.update((t.name, np.ascontiguousarray(t.values)) for t in large)
        structure, known = self._fingerprint().structure, self._written.get(expand)
        if known is None or known[0] != structure:
            self._written[expand] = known = structure, self._model(large, expand)
        model = onnx.ModelProto()
        model.CopyFrom(known[1])
        return model

    def _large(self) -> list[gs.Constant]:
        """The constants that get placeholders."""
        read = {t.name: t for node in self._graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
        return [t for t in read.values() if is_large(t.values)]

    def _model(self, large: Sequence[gs.Constant], expand: bool) -> onnx.ModelProto:
        """The model, with placeholders for some constants."""
        arrays = [t.values for t in large]
        for tensor, values in zip(large, arrays, strict=True):
            stub = onnx.TensorProto(
                name=tensor.name,
                data_type=onnx.TensorProto.FLOAT,
                dims=values.shape,
                data_location=onnx.TensorProto.EXTERNAL,
            )
            stub.external_data.add(key="location", value="weights")
            tensor.values = LazyValues(stub)
        try:
            model: onnx.ModelProto = gs.export_onnx(self._graph, do_type_check=False)
        except (TypeError, ValueError) as error:  # an empty list as an attribute, say
            raise OnnxqError(
                f"the model cannot be written as ONNX ({' '.join(str(error).split())[:200]}); check it with "
                "onnx.checker.check_model."
            ) from error
        finally:
            for tensor, values in zip(large, arrays, strict=True):
                tensor.values = values
        self._beside.restore(model)
        if expand:
            expand_all(model)
        return model

    def digest(self) -> str:
        """A fingerprint of the float function: equal for equal operators and weights. Copies no weight."""
        return self._fingerprint().whole

    def structure(self) -> str:
        """A fingerprint of all but the values of large weights."""
        return self._fingerprint().structure

    def content(self, name: str) -> bytes:
        """A hash of the values of a constant; of one that is mapped for reading, and so cannot change, its identity."""
        values = self.constant(name)
        return str(id(values)).encode() if id(values) in self._fixed else self._contents.of(values)

    @property
    def _fixed(self) -> set[int]:
        """Identities of arrays that nobody can write to."""
        return {id(array) for array in self.mapped.arrays.values()}

    def _fingerprint(self) -> Fingerprint:
        rest = [a.SerializeToString() for rest in self._beside.rest.values() for a in rest.attributes]
        return Fingerprint(self._graph, rest, self._contents, self._fixed)

    def copy(self) -> Graph:
        """An independent copy; weights are copied too."""
        graph, beside = split(self.model(expand=False), self._beside.header)
        twin = Graph(graph, beside, copy.copy(self.batchnorms), self.notes, versions=self.versions, imported=self.imported)
        twin.output_opset, twin.floats = self.output_opset, self.floats
        return twin
