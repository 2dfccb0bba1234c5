"""Time and peak memory of recipes on networks that are large, or that repeat themselves.

    python -m benchmarks.growth [--recipes int8-rounded int4-weight-only] [--networks stack unrolled]

`stack`: MatMuls 1024 x 4096 and 4096 x 1024 in turn with Relu between them (24: 101 million weights), 16 samples of 16
rows. `unrolled`: a recurrence of 80 steps that share the weights of two Gemms of 512 inputs, as exporters write it. Each
run has a process of its own. `CPU s` is what all threads took, which other processes on the machine change less.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import onnxq_plugins as onnxq
from benchmarks.int8 import machine

WIDTHS = (1024, 4096)


def stack(layers: int) -> tuple[onnx.ModelProto, np.ndarray]:
    """The stack, and samples for it [samples, rows, inputs]."""
    rng, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for n in range(layers):
        rows, columns = WIDTHS[n % 2], WIDTHS[1 - n % 2]
        values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32((2 / rows) ** 0.5)
        weights.append(numpy_helper.from_array(values, f"w{n}"))
        nodes += [helper.make_node("MatMul", [x, f"w{n}"], [f"y{n}"], f"layer{n}")]
        nodes += [helper.make_node("Relu", [f"y{n}"], [f"r{n}"], f"relu{n}")]
        x = f"r{n}"
    return model(nodes, weights, {"x": [16, WIDTHS[0]]}, [x]), rng.standard_normal((16, 16, WIDTHS[0]), dtype=np.float32)


def unrolled(steps: int, size: int = 512) -> tuple[onnx.ModelProto, np.ndarray]:
    """The recurrence h <- tanh(U x + W h), written out, and samples for it [samples, steps, inputs]."""
    rng, nodes = np.random.default_rng(0), []
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32) / np.float32(size**0.5), name)
        for name, shape in (("u", (size, size)), ("w", (size, size)), ("b", (size,)))
    ]
    weights.append(numpy_helper.from_array(np.zeros((1, size), np.float32), "start"))
    nodes.append(helper.make_node("Split", ["x"], [f"x{n}" for n in range(steps)], "split", axis=0, num_outputs=steps))
    h = "start"
    for n in range(steps):
        nodes += [
            helper.make_node("Gemm", [f"x{n}", "u", "b"], [f"ux{n}"], f"input{n}"),
            helper.make_node("Gemm", [h, "w"], [f"wh{n}"], f"state{n}"),
            helper.make_node("Add", [f"ux{n}", f"wh{n}"], [f"s{n}"], f"sum{n}"),
            helper.make_node("Tanh", [f"s{n}"], [f"h{n}"], f"tanh{n}"),
        ]
        h = f"h{n}"
    return model(nodes, weights, {"x": [steps, size]}, [h]), rng.standard_normal((16, steps, size), dtype=np.float32)


def model(nodes: list, weights: list, inputs: dict[str, list[int]], outputs: list[str]) -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "growth", ports, ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def child(network: str, size: int, recipe: str) -> None:
    """Quantize, and print seconds, those of the CPU, the peak in MB, bytes, and the summary."""
    made, samples = {"stack": stack, "unrolled": unrolled}[network](size)
    start, busy = time.perf_counter(), time.process_time()
    result = onnxq.quantize(made, recipe, [{"x": one} for one in samples])
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{seconds:.1f} {busy:.1f} {peak:.0f} {len(result.model.SerializeToString())} {result.summary}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["int8-rounded", "int4-weight-only"])
    parser.add_argument("--networks", nargs="+", choices=["stack", "unrolled"], default=["stack", "unrolled"])
    parser.add_argument("--layers", type=int, default=24, help="of the stack")
    parser.add_argument("--steps", type=int, default=80, help="of the recurrence")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], int(args.child[1]), args.child[2])
        return
    print(f"{machine()}\n\n| network | recipe | seconds | CPU s | peak MB | kB | |\n|---|---|---|---|---|---|---|")
    for network in args.networks:
        size = args.layers if network == "stack" else args.steps
        for recipe in args.recipes:
            command = [sys.executable, "-m", "benchmarks.growth", "--child", network, str(size), recipe]
            run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
            seconds, busy, peak, size_of, summary = run.stdout.split(" ", 4)
            line = summary.strip().replace("|", ",")
            print(
                f"| {network} {size} | {recipe} | {seconds} | {busy} | {peak} | {int(size_of) / 1e3:.0f} | {line} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
