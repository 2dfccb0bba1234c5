"""Run a .tflite file in LiteRT Micro's interpreter. Needs numpy and tflite-micro alone.

`job.json`: file, samples (as the file takes them), inputs and outputs (name -> place), arena (bytes)."""

import json
import os
import sys
from typing import Any

import numpy as np


def run(folder: str, job: Any, answer: Any) -> None:
    """Load, run every sample, and let the interpreter print what it allocated."""
    from tflite_micro.python.tflite_micro import runtime

    interpreter = runtime.Interpreter.from_file(job["file"], arena_size=job["arena"])
    answer["outputs"] = []
    for number, sample in enumerate(job["samples"]):
        for name, place in job["inputs"].items():
            e = sample[name]
            interpreter.set_input(np.fromfile(e["file"], np.dtype(e["dtype"])).reshape(e["shape"]), place)
        interpreter.invoke()
        entries = {}
        for name, place in job["outputs"].items():
            value = np.ascontiguousarray(interpreter.get_output(place))
            file = f"output{number}_{place}.bin"
            value.tofile(os.path.join(folder, file))
            entries[name] = {"file": file, "dtype": value.dtype.name, "shape": list(value.shape)}
        answer["outputs"].append(entries)
    interpreter.print_allocations()


def main(folder: str) -> None:
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as text:
        job = json.load(text)
    answer: Any = {}
    try:
        run(folder, job, answer)
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    with open(os.path.join(folder, "answer.json"), "w", encoding="utf-8") as text:
        json.dump(answer, text)


if __name__ == "__main__":
    main(sys.argv[1])
