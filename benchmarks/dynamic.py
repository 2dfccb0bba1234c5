"""quantize_dynamic by onnxruntime's import and by ours, by the number of rows that a product has.

    python -m benchmarks.dynamic

Three products with 512 x 512 matrices. For each number of rows the time of float over that of: onnxruntime's
quantize_dynamic (activations rounded as it runs), ours (weights of 8 bits in blocks beside float activations: MatMulNBits),
and quantize_static by ours; in turn, one thread. Then the SQNR of each on normal rows, and kB. Prints Markdown.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import quantize_dynamic as theirs

from benchmarks.int8 import machine
from onnxq_plugins import measure, ort, runtimes
from onnxq_plugins.testing.models import Net, feeds

ROWS = (1, 4, 16, 64, 256)


def main() -> None:
    warnings.simplefilter("ignore")  # of results that are slower than float, which is what is measured
    net = Net(["N", 512])
    x = "x"
    for _ in range(3):
        x = net.op("Relu", net.linear(x, 512, 512))
    model = net.model(x)
    samples = feeds(model, 64)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{n}.onnx" for n, name in enumerate(("float", "onnxruntime", "ours", "static"))}
        onnx.save(model, files["float"])
        theirs(files["float"], files["onnxruntime"])
        ort.quantize_dynamic(files["float"], files["ours"])
        ort.quantize_static(files["float"], files["static"], samples)
        sessions = {name: runtimes.session(file) for name, file in files.items()}
        rng = np.random.default_rng(1)
        x_test = rng.normal(size=(256, 512)).astype(np.float32)
        exact = sessions["float"].run(None, {"x": x_test})[0]
        print(f"{machine()}\n")
        print(f"| | {' | '.join(f'x float, {n} rows' for n in ROWS)} | dB | kB |\n|{'---|' * (len(ROWS) + 3)}")
        times = {n: runtimes.latency([*sessions.values()], {"x": x_test[:n]}, 2.0) for n in ROWS}
        labels = ("", "onnxruntime's quantize_dynamic", "our quantize_dynamic", "our quantize_static")
        for k, (name, file) in enumerate(files.items()):
            if k:
                speeds = " | ".join(f"{times[n][0] / times[n][k]:.2f}" for n in ROWS)
                sqnr = measure.sqnr([exact], sessions[name].run(None, {"x": x_test}))
                print(f"| {labels[k]} | {speeds} | {sqnr:.1f} | {file.stat().st_size / 1e3:.0f} |")


if __name__ == "__main__":
    main()
