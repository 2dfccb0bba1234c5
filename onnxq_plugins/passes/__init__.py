"""Built-in passes, one algorithm a file."""

from onnxq_plugins.job import Pass
from onnxq_plugins.passes.absorb_bias import AbsorbBias
from onnxq_plugins.passes.bias_correct import BiasCorrect
from onnxq_plugins.passes.bound_accumulator import BoundAccumulator
from onnxq_plugins.passes.coding_length import CodingLength
from onnxq_plugins.passes.data_free import DataFree
from onnxq_plugins.passes.equalize import Equalize
from onnxq_plugins.passes.mixed_precision import MixedPrecision
from onnxq_plugins.passes.orthogonality import Orthogonality
from onnxq_plugins.passes.ranges import Ranges
from onnxq_plugins.passes.reorder import Reorder
from onnxq_plugins.passes.residual_ensemble import ResidualEnsemble
from onnxq_plugins.passes.residual_expansion import ResidualExpansion
from onnxq_plugins.passes.round import Round
from onnxq_plugins.passes.scale_inputs import ScaleInputs
from onnxq_plugins.passes.shift_equalize import ShiftEqualize
from onnxq_plugins.passes.split_weights import SplitWeights
from onnxq_plugins.passes.sub_layer import SubLayer
from onnxq_plugins.passes.subtensor import Subtensor
from onnxq_plugins.passes.vector_scale import VectorScale

BUILTIN: tuple[type[Pass], ...] = (
    AbsorbBias,
    BiasCorrect,
    BoundAccumulator,
    CodingLength,
    DataFree,
    Equalize,
    MixedPrecision,
    Orthogonality,
    Ranges,
    Reorder,
    ResidualEnsemble,
    ResidualExpansion,
    Round,
    ScaleInputs,
    ShiftEqualize,
    SplitWeights,
    SubLayer,
    Subtensor,
    VectorScale,
)

__all__ = [
    "BUILTIN",
    "AbsorbBias",
    "BiasCorrect",
    "BoundAccumulator",
    "CodingLength",
    "DataFree",
    "Equalize",
    "MixedPrecision",
    "Orthogonality",
    "Pass",
    "Ranges",
    "Reorder",
    "ResidualEnsemble",
    "ResidualExpansion",
    "Round",
    "ScaleInputs",
    "ShiftEqualize",
    "SplitWeights",
    "SubLayer",
    "Subtensor",
    "VectorScale",
]
