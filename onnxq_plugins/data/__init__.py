"""Sample inputs from anything a user has: files, folders of images, arrays, iterables, readers."""

from onnxq_plugins.data.samples import Data, DataOptions, Input, Source, graph_inputs, model_inputs, open_data

__all__ = ["Data", "DataOptions", "Input", "Source", "graph_inputs", "model_inputs", "open_data"]
