"""What a runtime can execute, and how it has to be stored: one file per runtime, as data; and refusals in words."""

from onnxq_plugins.targets.litert import ETHOS_U, LITERT
from onnxq_plugins.targets.npu import NPU, NPU4
from onnxq_plugins.targets.openvino import OPENVINO
from onnxq_plugins.targets.ort_cpu import ORT_CPU, ORT_CPU_AVX2
from onnxq_plugins.targets.per_tensor import PER_TENSOR
from onnxq_plugins.targets.portable import PORTABLE, QOPERATOR
from onnxq_plugins.targets.qnn import QNN
from onnxq_plugins.targets.storage import STORAGE
from onnxq_plugins.targets.target import (
    STORED,
    Granularity,
    Rule,
    Target,
    channel_block,
    channel_multipliers,
    granularity_of,
)
from onnxq_plugins.targets.web import WEB

BUILTIN = (
    ORT_CPU,
    ORT_CPU_AVX2,
    OPENVINO,
    PER_TENSOR,
    NPU,
    NPU4,
    STORAGE,
    LITERT,
    ETHOS_U,
    QNN,
    WEB,
    PORTABLE,
    QOPERATOR,
)

__all__ = [
    "BUILTIN",
    "STORAGE",
    "STORED",
    "Granularity",
    "Rule",
    "Target",
    "channel_block",
    "channel_multipliers",
    "granularity_of",
]
