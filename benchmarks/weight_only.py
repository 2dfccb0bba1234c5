"""What it costs to compute in float with weights in 4 or 8 bits: the evidence for `onnxq_plugins.layers.float_inputs`.

    python -m benchmarks.weight_only

One matrix product with 1024 x 4096 weights, one thread, in turn: in float, in MatMulNBits at accuracy level 4 (the default,
inputs in 8 bits) and at level 1 (float), and with the weight decoded to float at load. Prints Markdown.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from onnx import numpy_helper

import onnxq_plugins as onnxq
from benchmarks.kernels import matmul
from onnxq_plugins import runtimes


def _at_level(model: bytes, level: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def main() -> None:
    print("| bits | rows | float ms | level 4 ms | level 1 ms | decoded ms |\n|---|---|---|---|---|---|")
    for bits in (4, 8):
        recipe = {"weights": {"bits": bits, "block": 32}, "activations": {"bits": 32}}
        for rows in (1, 16, 128):
            model = matmul(rows, 1024, 4096)
            weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
            weight[::32] /= 1000
            model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
            x = np.random.default_rng(1).standard_normal((1, rows, 1024)).astype(np.float32)
            large = x * np.where(np.arange(1024) % 32 == 0, np.float32(1000), 1)  # for such inputs the weight is decoded
            plain, decoded = (onnxq.quantize(model, recipe, [{"x": data}], workers=1).model for data in (x, large))
            levels = [_at_level(plain.SerializeToString(), level) for level in (4, 1)]
            runners = [runtimes.session(model), *levels, runtimes.session(decoded)]
            times = runtimes.latency(runners, {"x": x}, 2.0)
            print(f"| {bits} | {rows} | " + " | ".join(f"{t:.2f}" for t in times) + " |", flush=True)


if __name__ == "__main__":
    main()
