"""Sample inputs from anything a user has: files, folders of images, arrays, iterables, readers."""

from onnxq_plugins.data.inputs import Input
from onnxq_plugins.data.options import DataOptions
from onnxq_plugins.data.ports import graph_inputs, model_inputs
from onnxq_plugins.data.samples import Data, batches
from onnxq_plugins.data.sources import Source, open_data

__all__ = ["Data", "DataOptions", "Input", "Source", "batches", "graph_inputs", "model_inputs", "open_data"]
