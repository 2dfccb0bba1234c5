"""Run a model in OpenCV's dnn module. Needs numpy and OpenCV alone.

`job.json`: file, samples, names (of the outputs), engine (of version 5), times (seconds to time runs for)."""

import json
import os
import sys
import time
from typing import Any

import numpy as np


def load(cv2: Any, file: str, engine: str) -> Any:
    """The network. Version 5 has two engines: the new one, which it prefers, and the one of version 4."""
    names = [name for name in dir(cv2.dnn) if name.startswith("ENGINE_")]
    engines = {name.replace("ENGINE_", "").lower(): getattr(cv2.dnn, name) for name in names}
    if not engines:
        return cv2.dnn.readNetFromONNX(file)
    if engine not in engines:
        raise ValueError(f"engine = '{engine}' is unknown; known: {', '.join(sorted(engines))}")
    return cv2.dnn.readNetFromONNX(file, engine=engines[engine])


def run(folder: str, job: Any, answer: Any) -> None:
    """Load, run every sample, and time the first."""
    import cv2

    answer["version"] = cv2.__version__
    cv2.setNumThreads(1)
    net = load(cv2, job["file"], job["engine"])
    feeds = [
        {name: np.fromfile(e["file"], np.dtype(e["dtype"])).reshape(e["shape"]) for name, e in sample.items()}
        for sample in job["samples"]
    ]

    def forward(feed: Any) -> Any:
        for name, value in feed.items():
            net.setInput(value, name)
        return net.forward(job["names"])

    answer["outputs"] = []
    for number, feed in enumerate(feeds):
        entries = {}
        for place, (name, value) in enumerate(zip(job["names"], forward(feed))):  # noqa: B905  Python 3.9
            file = f"output{number}_{place}.bin"
            np.ascontiguousarray(value).tofile(os.path.join(folder, file))
            entries[name] = {"file": file, "dtype": value.dtype.name, "shape": list(value.shape)}
        answer["outputs"].append(entries)
    answer["layers"] = [[name, net.getLayer(net.getLayerId(name)).type] for name in net.getLayerNames()]
    taken: Any = []
    while feeds and (len(taken) < 3 or sum(taken) < job["times"]):
        start = time.perf_counter()
        forward(feeds[0])
        taken.append(time.perf_counter() - start)
    answer["milliseconds"] = float(np.quantile(taken, 0.1)) * 1e3 if taken else None


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
