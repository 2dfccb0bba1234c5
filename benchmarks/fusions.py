"""Operators that import leaves of models, against what onnxruntime's own preparation leaves.

    python -m benchmarks.fusions FOLDER_OR_FILE ...

Of every model: operators in the file, bodies of control flow included; in the canonical float graph; after
`quant_pre_process` (without its symbolic shape inference where that fails); and of the last two after onnxruntime has
optimized them at load, which fuses what it can of either (one Conv with its Relu, say). The last column names kinds of which
the canonical graph has more than the other, and of which it has fewer. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime as ort

from onnxq_plugins.graph import load


def kinds(graph: onnx.GraphProto) -> Counter[str]:
    """Operators of a graph and of the bodies in it, by kind."""
    found: Counter[str] = Counter()
    for node in graph.node:
        found[node.op_type] += 1
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                found += kinds(body)
    return found


def prepared(path: Path, scratch: Path) -> onnx.ModelProto | None:
    """The model after onnxruntime's preparation; None if that fails."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    for options in ({}, {"skip_symbolic_shape": True}):
        try:
            quant_pre_process(str(path), str(scratch / "prepared.onnx"), **options)
            return onnx.load(str(scratch / "prepared.onnx"))
        except Exception:  # of many types, an assertion among them
            continue
    return None


def at_load(model: onnx.ModelProto, scratch: Path) -> int:
    """Operators that onnxruntime runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return sum(kinds(onnx.load(options.optimized_model_filepath).graph).values())


def models(places: list[Path]) -> Iterator[Path]:
    """The files among these places and below them."""
    for place in places:
        yield from sorted(place.rglob("*.onnx")) if place.is_dir() else [place]


def row(path: Path, scratch: Path) -> list[str]:
    """A row of the table."""
    ours, theirs = load(path).model(), prepared(path, scratch)
    of_file, of_ours = kinds(onnx.load(str(path)).graph), kinds(ours.graph)
    cells = [path.stem, str(sum(of_file.values())), str(sum(of_ours.values()))]
    if theirs is None:
        return [*cells, "fails", str(at_load(ours, scratch)), "", ""]
    of_theirs = kinds(theirs.graph)
    more, fewer = of_ours - of_theirs, of_theirs - of_ours
    unlike = [f"{sign}{n} {op}" for sign, part in (("+", more), ("-", fewer)) for op, n in sorted(part.items())]
    counts = [str(sum(of_theirs.values())), str(at_load(ours, scratch)), str(at_load(theirs, scratch))]
    return [*cells, *counts, ", ".join(unlike)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path)
    args = parser.parse_args()
    columns = ("model", "file", "here", "onnxruntime", "at load, here", "at load, onnxruntime", "kinds")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    with tempfile.TemporaryDirectory() as scratch:
        for path in models(args.places):
            print(f"| {' | '.join(row(path, Path(scratch)))} |", flush=True)


if __name__ == "__main__":
    main()
