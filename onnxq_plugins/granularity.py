"""Old path of `onnxq_plugins.layers.blocks`, for plugins that import it."""

from onnxq_plugins.layers.blocks import row_steps, search

__all__ = ["row_steps", "search"]
