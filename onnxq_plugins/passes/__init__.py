"""Built-in passes, one algorithm a file."""

from onnxq_plugins.job import Pass
from onnxq_plugins.passes.bias_correct import BiasCorrect
from onnxq_plugins.passes.ranges import Ranges
from onnxq_plugins.passes.round import Round
from onnxq_plugins.passes.scale_inputs import ScaleInputs
from onnxq_plugins.passes.scales import Scales

BUILTIN: tuple[type[Pass], ...] = (BiasCorrect, Ranges, Round, ScaleInputs, Scales)

__all__ = ["BUILTIN", "BiasCorrect", "Pass", "Ranges", "Round", "ScaleInputs", "Scales"]
