"""Networks in LiteRT, beside onnxruntime: what runs as integer, error, time; and what Vela places on an Ethos-U.

    python -m benchmarks.litert [MODEL ...] [--shared FOLDER] [--recipe int8] [--accelerator ethos-u55-128] [--samples 32]

FOLDER (or ONNXQ_SHARED) holds models/ and data/ (`benchmarks.models`), and zoo/ (`benchmarks.zoo`). Each network is
quantized by the recipe twice: for target ort-cpu and for target litert, whose QDQ model is written as .tflite and run in
onnxruntime, too. `dB` is SQNR against float on test samples, of the worst output. `ms` is processor time: the first
decile of runs, one thread, the runtimes in turn, the least of three rounds. `x ort` is LiteRT's time over that of
onnxruntime's own int8 model. Prints Markdown.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from benchmarks.models import NAMES, load_case, shared_folder
from benchmarks.zoo import open_folder
from onnxq_plugins import runtimes
from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.formats import tflite
from onnxq_plugins.measure import sqnr
from onnxq_plugins.runtimes.litert import LITERT
from onnxq_plugins.runtimes.runtime import Inspection
from onnxq_plugins.runtimes.timing import milliseconds
from onnxq_plugins.runtimes.vela import VELA

MODELS = (*NAMES, "efficientnet_lite0", "blazeface", "yunet", "yolox_nano", "oww_embed", "minilm")
COLUMNS = (
    *("model", "ort-cpu dB", "litert's QDQ in onnxruntime dB", "LiteRT dB", "float ms", "ort ms", "LiteRT ms", "x ort"),
    *("integer", "fake", "float", "moves", "what is fake", "NPU", "CPU", "cycles", "SRAM kB"),
)
Feed = dict[str, np.ndarray]


def network(name: str, shared: Path) -> tuple[Path, list[Feed], list[Feed]]:
    """A model, calibration and test samples."""
    if name in NAMES:
        case = load_case(name, shared)
        return case.path, case.feeds(), [{case.input: x[None]} for x in case.test]
    folder = open_folder(shared / "zoo")
    return folder.path(name), folder.feeds(name, "calib"), folder.feeds(name, "test")


def of_one_shape(feeds: Sequence[Feed], shapes: Mapping[str, tuple[int, ...]]) -> list[Feed]:
    """The samples that a file of fixed sizes takes."""
    return [feed for feed in feeds if all(feed[name].shape == shape for name, shape in shapes.items())]


def worst(floats: Sequence[Feed], got: Sequence[Mapping[str, np.ndarray]]) -> float:
    """SQNR in dB of the worst output, over all samples."""
    found = []
    for name in floats[0]:
        one, other = (np.concatenate([np.ravel(each[name]) for each in many]) for many in (floats, got))
        found.append(sqnr(one, other))
    return min(found)


def named(model: Any, feeds: Sequence[Feed]) -> list[Feed]:
    """Outputs in onnxruntime, by name."""
    session = runtimes.session(model)
    names = [o.name for o in session.get_outputs()]
    return [dict(zip(names, session.run(None, feed), strict=True)) for feed in feeds]


def compiled(model: Any, path: Path, accelerator: str) -> Inspection | str:
    """What Vela makes of the model, in the file's own order of axes, with int8 inputs and outputs where the model quantizes
    them; or why it does not."""
    own = {"layout": "native", "int4": "none", "products": "int8"}
    try:
        try:
            path.write_bytes(tflite.write(model, {**own, "io": "int8"}))
        except OnnxqError:
            path.write_bytes(tflite.write(model, own))
        return VELA.inspect(path, [], {"accelerator": accelerator})
    except OnnxqError as error:
        return str(error)


def row(name: str, shared: Path, args: argparse.Namespace) -> tuple[list[str], Iterator[str]]:
    """The cells of one network, and what Vela leaves to the CPU."""
    path, calibration, test = network(name, shared)
    own = onnxq.quantize(path, args.recipe, calibration, check=False).model
    result = onnxq.quantize(path, args.recipe, calibration, target="litert", check=False).model
    shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in result.graph.input}
    test = of_one_shape(test, shapes)[: args.samples]
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / f"{name}.tflite"
        file.write_bytes(tflite.write(result))
        inspection = LITERT.inspect(file, test, {})
        interpreter = Interpreter(str(file), num_threads=1)
        interpreter.allocate_tensors()
        runs = [partial(session.run, None, test[0]) for session in map(runtimes.session, (path, own))]
        least = np.min(
            [[milliseconds(run, clock=time.process_time) for run in (*runs, interpreter.invoke)] for _ in range(3)], axis=0
        )
        npu = compiled(result, file, args.accelerator)
    floats = named(path, test)
    db = [worst(floats, each) for each in (named(own, test), named(result, test), inspection.outputs)]
    counts = inspection.counts()
    fake = Counter(each.op for each in inspection.operators if each.kind == "fake")
    cells = [name, *(f"{x:.1f}" for x in db), *(f"{x:.2f}" for x in least), f"{least[2] / least[1]:.2f}"]
    cells += [str(counts.get(kind, 0)) for kind in ("integer", "fake", "float", "moves")]
    cells.append(", ".join(f"{op} x{n}" for op, n in fake.most_common()))
    if isinstance(npu, str):
        return [*cells, "-", "-", "-", "-"], iter([f"{name}: {npu}"])
    facts = ("operators on the NPU", "operators on the CPU", "cycles", "SRAM kB")
    left = Counter((each.op, each.why) for each in npu.operators if each.where != "NPU")
    return [*cells, *(str(npu.facts[key]) for key in facts)], (
        f"{name}: {op} x{n}: {why[:160]}" for (op, why), n in left.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--shared")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--accelerator", default="ethos-u55-128")
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("ai-edge-litert", "ethos-u-vela"))
    print(f"{machine()}, {versions}; recipe {args.recipe}, {args.accelerator}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    notes: list[str] = []
    for name in args.models:
        cells, left = row(name, shared_folder(args.shared), args)
        notes += left
        print(f"| {' | '.join(cells)} |", flush=True)
    print("\nLeft to the CPU by Vela:\n")
    print("\n".join(f"- {note}" for note in notes))


if __name__ == "__main__":
    main()
