"""Old path of `onnxq_plugins.layers.sweep`, for plugins that import it."""

from onnxq_plugins.layers.sweep import LayerStatistics as Seen
from onnxq_plugins.layers.sweep import sweep

__all__ = ["Seen", "sweep"]
