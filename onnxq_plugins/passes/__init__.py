"""Built-in passes, one algorithm a file."""

from onnxq_plugins.passes.base import Pass
from onnxq_plugins.passes.ranges import Ranges

BUILTIN: tuple[type[Pass], ...] = (Ranges,)

__all__ = ["BUILTIN", "Pass", "Ranges"]
