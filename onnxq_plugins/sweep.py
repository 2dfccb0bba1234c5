"""Old path of `onnxq_plugins.layers.sweep`, for plugins that import it."""

from onnxq_plugins.layers.sweep import Seen, sweep

__all__ = ["Seen", "sweep"]
