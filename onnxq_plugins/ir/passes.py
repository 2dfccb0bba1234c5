"""The passes, and models given back in the form in which they came."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
from onnx_ir.passes import FunctionalPass, PassResult

from onnxq_plugins import engine
from onnxq_plugins.data import Source
from onnxq_plugins.engine import Result
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph import Model, load
from onnxq_plugins.plugins import find_plugins

_TARGET = "storage"  # which takes weights of any granularity


class QuantizePass(FunctionalPass):
    """Quantize by a recipe: float model in, QDQ model out. Raises OnnxqError, within a Sequential as the cause of its error.

    recipe, data, options   as of `onnxq_plugins.quantize`

    result   of the last call: its `summary`, `report`, `check`
    """

    def __init__(self, recipe: Any = "int8", data: Source | None = None, **options: Any) -> None:
        super().__init__()
        self.recipe, self.data, self.options = recipe, data, options
        self.result: Result | None = None

    def call(self, model: onnx_ir.Model) -> PassResult:
        self.result = engine.quantize(model, self.recipe, self.data, **self.options)
        return PassResult(onnx_ir.from_proto(self.result.model), True)


class Fuse(FunctionalPass):
    """The rewrites of import alone: BatchNormalization, padding and constants move into layers, functions that exporters
    wrote out become one operator, layouts are straightened, what computes nothing goes. The float function stays."""

    def call(self, model: onnx_ir.Model) -> PassResult:
        return PassResult(onnx_ir.from_proto(load(model, flatten=False).model()), True)


class RewritePass(FunctionalPass):
    """One exact rewrite of the float model, by the name of its pass, on the model as `Fuse` leaves it: for those who
    quantize elsewhere.

    use          a pass of stage ``rewrite`` that keeps the float function, built-in or a guest
    data         samples; without them it goes by the weights, where it can
    block        granularity of the weights that it is to serve, as recipes write it
    plugins      further plugin objects
    parameters   of the pass
    """

    def __init__(
        self, use: str, data: Source | None = None, block: Any = "channel", plugins: Iterable[object] = (), **parameters: Any
    ) -> None:
        super().__init__()
        self.data, self.plugins = data, list(plugins)
        self.table = {"target": _TARGET, "weights": {"block": block}, "pass": [{"use": use, **parameters}]}
        if data is None:  # what ranges of activations would need
            self.table["activations"] = {"bits": 32}
        (step,) = find_plugins(self.plugins).recipe(self.table).passes
        if step.stage != "rewrite" or not step.exact:
            raise OnnxqError(
                f"pass '{use}' is no exact rewrite of the float model; put it into the recipe of a QuantizePass."
            )

    def call(self, model: onnx_ir.Model) -> PassResult:
        result = engine.quantize(model, self.table, self.data, plugins=self.plugins, check=False)
        return PassResult(onnx_ir.from_proto(result.float_model), True)


class Centre(RewritePass):
    """Channels of linear tensors in the middle of their grid, see ``onnxq plugins centre``."""

    def __init__(self, data: Source, **parameters: Any) -> None:
        super().__init__("centre", data, **parameters)


class Equalize(RewritePass):
    """Channels evened out between layers, by weights, or with data ``by="activations"``, see ``onnxq plugins equalize``."""

    def __init__(self, data: Source | None = None, **parameters: Any) -> None:
        super().__init__("equalize", data, **parameters)


class Reorder(RewritePass):
    """Channels in the order of their ranges, so that weights in a block are alike, see ``onnxq plugins reorder``."""

    def __init__(self, data: Source | None = None, block: Any = (1, 16), **parameters: Any) -> None:
        super().__init__("reorder", data, block, **parameters)


def quantize(
    model: Model, recipe: Any = "int8", data: Source | None = None, *, output: str | Path | None = None, **options: Any
) -> Any:
    """`onnxq_plugins.quantize`, the model given back in the form in which it came: an onnx_ir.Model (also for torch's
    ONNXProgram), a ModelProto, bytes, or for a path that of the file that was written.

    output   the file; for a path MODEL.quantized.onnx beside it by default
    """
    path = Path(model) if isinstance(model, (str, os.PathLike)) else None
    output = path.with_suffix(".quantized.onnx") if path is not None and output is None else output
    made = engine.quantize(model, recipe, data, output=output, **options)
    if made.missed:
        raise OnnxqError(made.missed)
    if path is not None:
        return Path(str(output))
    if isinstance(model, onnx.ModelProto):
        return made.model
    return (
        made.model.SerializeToString()
        if isinstance(model, (bytes, bytearray, memoryview))
        else onnx_ir.from_proto(made.model)
    )
