"""The float model: import, canonical form, layers, channel groups, exact rewrites.

onnx-graphsurgeon is imported in this folder alone.
"""

from onnxq_plugins.graph.affine import add_bias
from onnxq_plugins.graph.channels import channel_axis, channels
from onnxq_plugins.graph.constants import Constant, constants
from onnxq_plugins.graph.core import Graph
from onnxq_plugins.graph.elements import ChannelGroup, Member
from onnxq_plugins.graph.groups import channel_groups, clip_maximum
from onnxq_plugins.graph.importer import load
from onnxq_plugins.graph.layer import LAYER_OPS, BatchNorm, Layer
from onnxq_plugins.graph.models import Model, as_model
from onnxq_plugins.graph.rewrites import (
    permute,
    replace_with_sum,
    rescale,
    split_input,
    split_off_inputs,
    split_outputs,
    split_values,
)
from onnxq_plugins.graph.shifts import Shifts, shift, shifts

__all__ = [
    "LAYER_OPS",
    "BatchNorm",
    "ChannelGroup",
    "Constant",
    "Graph",
    "Layer",
    "Member",
    "Model",
    "Shifts",
    "add_bias",
    "as_model",
    "channel_axis",
    "channel_groups",
    "channels",
    "clip_maximum",
    "constants",
    "load",
    "permute",
    "replace_with_sum",
    "rescale",
    "shift",
    "shifts",
    "split_input",
    "split_off_inputs",
    "split_outputs",
    "split_values",
]
