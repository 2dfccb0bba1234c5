"""Built-in passes, one algorithm per file. A new one needs its import here, and nothing else in the package."""

from onnxq_plugins.job import Pass as Pass
from onnxq_plugins.passes.absorb_bias import AbsorbBias as AbsorbBias
from onnxq_plugins.passes.activation_ranges import ActivationRanges as ActivationRanges
from onnxq_plugins.passes.align import Align as Align
from onnxq_plugins.passes.bias_correct import BiasCorrect as BiasCorrect
from onnxq_plugins.passes.bound_accumulator import BoundAccumulator as BoundAccumulator
from onnxq_plugins.passes.centre import Centre as Centre
from onnxq_plugins.passes.coding_length import CodingLength as CodingLength
from onnxq_plugins.passes.data_free import DataFree as DataFree
from onnxq_plugins.passes.equalize import Equalize as Equalize
from onnxq_plugins.passes.fixed_ranges import FixedRanges as FixedRanges
from onnxq_plugins.passes.mixed_precision import MixedPrecision as MixedPrecision
from onnxq_plugins.passes.orthogonality import Orthogonality as Orthogonality
from onnxq_plugins.passes.output_noise import OutputNoise as OutputNoise
from onnxq_plugins.passes.placement import Placement as Placement
from onnxq_plugins.passes.ranges import Ranges as Ranges
from onnxq_plugins.passes.reorder import Reorder as Reorder
from onnxq_plugins.passes.residual_ensemble import ResidualEnsemble as ResidualEnsemble
from onnxq_plugins.passes.residual_expansion import ResidualExpansion as ResidualExpansion
from onnxq_plugins.passes.round import Round as Round
from onnxq_plugins.passes.scale_inputs import ScaleInputs as ScaleInputs
from onnxq_plugins.passes.shift_equalize import ShiftEqualize as ShiftEqualize
from onnxq_plugins.passes.split_channels import SplitChannels as SplitChannels
from onnxq_plugins.passes.split_heads import SplitHeads as SplitHeads
from onnxq_plugins.passes.split_outliers import SplitOutliers as SplitOutliers
from onnxq_plugins.passes.split_weights import SplitWeights as SplitWeights
from onnxq_plugins.passes.sub_layer import SubLayer as SubLayer
from onnxq_plugins.passes.subtensor import Subtensor as Subtensor
from onnxq_plugins.passes.vector_scale import VectorScale as VectorScale
from onnxq_plugins.passes.widen import Widen as Widen

BUILTIN: tuple[type[Pass], ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, type) and issubclass(value, Pass) and value is not Pass
)
