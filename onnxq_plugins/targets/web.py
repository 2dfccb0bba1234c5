"""onnxruntime in browsers."""

from __future__ import annotations

from dataclasses import replace

from onnxq_plugins.runtimes.web import WEB as RUNTIME
from onnxq_plugins.targets.ort_cpu import ORT_CPU

WEB = replace(
    ORT_CPU,
    name="web",
    doc="onnxruntime-web: the same kernels compiled to WebAssembly, whose costs are not measured",
    costs="",
    here=False,
    runtime=RUNTIME,
)
