"""Cost of a narrow accumulator: top-1 of ResNet20 over the accumulator width that no input may overflow.

    python -m benchmarks.accumulators [--shared FOLDER] [--model NAME] [--bits 32 20 ...]

Recipe: ranges by MSE, codes by `round` (GPTQ), then `bound-accumulator`; once with 8-bit weights, once with 4-bit ones in
all layers but the first and last. Activations have 8 bits, so inputs are 0..255. Widths are those of the audit: the
smallest signed accumulator that no input overflows, without the bias. "weights kept" is the sum of all |codes| relative to
that at the first width. Widths that change nothing are left out. Prints Markdown.
"""

from __future__ import annotations

import argparse

import numpy as np

import onnxq_plugins as onnxq
from benchmarks.int8 import machine
from benchmarks.models import NAMES, Case, load_case, shared_folder
from onnxq_plugins import runtimes
from onnxq_plugins.measure import sqnr


def recipe(weights: int, bits: int) -> dict[str, object]:
    """All layers bounded; the first and the last have 8-bit weights."""
    ends = [{"position": end, "weights": {"bits": 8}} for end in ("first", "last")]
    passes = [
        {"use": "scale-inputs"},
        {"use": "ranges", "method": "mse"},
        {"use": "round", "method": "gptq"},
        {"use": "bound-accumulator", "bits": bits},
    ]
    return {"weights": {"bits": weights}, "pass": passes, "layer": ends}


def measure(case: Case, weights: int, bits: int) -> tuple[str, int, float, float, float]:
    """Widths of the layers, layers changed, sum of |codes|, SQNR in dB, top-1 in percent."""
    result = onnxq.quantize(case.path, recipe(weights, bits), case.feeds())
    feeds = [{case.input: x[None]} for x in case.test]
    reference = runtimes.outputs(runtimes.session(case.path), feeds)[0]
    logits = runtimes.outputs(runtimes.session(result.model), feeds)[0]
    widths = [y.accumulator for y in onnxq.audit_model(result.model).layers if y.accumulator is not None]
    total = sum(float(np.abs(spec.codes).sum()) for spec in result.plan.values() if spec.codes is not None)
    changed = len(result.report["steps"][-2]["result"]["bounded"])  # the last step is the export
    return (
        f"{min(widths)}..{max(widths)}",
        changed,
        total,
        sqnr(reference, logits),
        100 * float(np.mean(logits.argmax(1) == case.labels)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared")
    parser.add_argument("--model", choices=NAMES, default="resnet20_cifar10")
    parser.add_argument("--bits", type=int, nargs="*", default=[32, 22, 21, 20, 19, 18, 17, 16])
    args = parser.parse_args()
    case = load_case(args.model, shared_folder(args.shared))
    print(f"{machine()}\n\n{args.model}, {len(case.test)} test samples\n")
    print(
        "| weights | accumulator | layers need | layers bounded | weights kept % | SQNR dB | top-1 |\n"
        "|---|---|---|---|---|---|---|"
    )
    for weights in (8, 4):
        whole = 0.0
        for bits in args.bits:
            span, changed, total, db, top1 = measure(case, weights, bits)
            if whole and not changed:
                continue
            whole = whole or total
            cells = f"{span} | {changed} | {100 * total / whole:.1f} | {db:.2f} | {top1:.2f}"
            print(f"| {weights} bits | {bits} bits | {cells} |", flush=True)


if __name__ == "__main__":
    main()
