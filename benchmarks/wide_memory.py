"""Peak memory of learned rounding of a very wide MatMul.

    python -m benchmarks.wide_memory [--inputs 16384] [--outputs 512] [--sub-block 16]

A full Gram matrix of 16384 inputs would take 2 GB; above `round.limit` only blocks on its diagonal are kept.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxq_plugins as onnxq
from benchmarks.models import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=16384)
    parser.add_argument("--outputs", type=int, default=512)
    parser.add_argument("--sub-block", type=int, default=0, help="inputs that share a multiplier; 0: no multipliers")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(size=(args.inputs, args.outputs)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "wide")],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [16, args.inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [16, args.outputs])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    data = [{"x": rng.normal(size=(16, args.inputs)).astype(np.float32)} for _ in range(32)]
    before, start = peak_memory(), time.perf_counter()
    weights = {"bits": 4, "sub_block": args.sub_block or "none"}
    onnxq.quantize(model, {"weights": weights, "pass": [{"use": "round", "method": "gptq"}]}, data)
    print(
        f"{args.inputs} x {args.outputs}: peak {peak_memory():.0f} MB, {before:.0f} MB of it before quantizing, "
        f"{time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
