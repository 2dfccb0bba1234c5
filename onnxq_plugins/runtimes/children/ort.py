"""Run a model in onnxruntime, with or without the QNN provider. Needs numpy and onnxruntime (1.17 or newer) alone.

`job.json`: file, samples, times (seconds to time runs for), dims (sizes of open axes by name), and qnn: options of the
provider, or null."""

import glob
import json
import os
import sys
import time
from typing import Any

import numpy as np


def load(folder: str, job: Any) -> Any:
    """The session."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3 if job["qnn"] is None else 2  # its reasons are warnings
    options.enable_profiling = True
    options.profile_file_prefix = os.path.join(folder, "profile")
    for name, size in job["dims"].items():
        options.add_free_dimension_override_by_name(name, size)
    if job["qnn"] is None:
        return ort.InferenceSession(job["file"], options, providers=["CPUExecutionProvider"])
    import onnxruntime_qnn

    ort.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == "QNNExecutionProvider"]
    told = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "dump_json_qnn_graph": "1",
        "json_qnn_graph_dir": folder,
        **job["qnn"],
    }
    options.add_provider_for_devices(devices[:1], told)
    return ort.InferenceSession(job["file"], options)


def run(folder: str, job: Any, answer: Any) -> None:
    """Load, run every sample, and time the first."""
    import onnxruntime as ort

    answer["version"] = ort.__version__
    session = load(folder, job)
    names = [output.name for output in session.get_outputs()]
    feeds = [
        {name: np.fromfile(e["file"], np.dtype(e["dtype"])).reshape(e["shape"]) for name, e in sample.items()}
        for sample in job["samples"]
    ]
    answer["outputs"] = []
    for number, feed in enumerate(feeds):
        entries = {}
        for place, (name, value) in enumerate(zip(names, session.run(None, feed))):  # noqa: B905  Python 3.9
            file = f"output{number}_{place}.bin"
            np.ascontiguousarray(value).tofile(os.path.join(folder, file))
            entries[name] = {"file": file, "dtype": value.dtype.name, "shape": list(value.shape)}
        answer["outputs"].append(entries)
    with open(session.end_profiling(), encoding="utf-8") as text:
        answer["events"] = [event for event in json.load(text) if event.get("cat") == "Node"]
    taken: Any = []
    while feeds and job["times"] and (len(taken) < 3 or sum(taken) < job["times"]):
        start = time.perf_counter()
        session.run(None, feeds[0])
        taken.append(time.perf_counter() - start)
    answer["milliseconds"] = float(np.quantile(taken, 0.1)) * 1e3 if taken else None


def graphs(folder: str) -> Any:
    """The nodes of QNN's own graphs: name, type, and types of what they read and write."""
    found = []
    for file in sorted(glob.glob(os.path.join(folder, "*.json"))):
        with open(file, encoding="utf-8") as text:
            graph = json.load(text).get("graph") if "tensor_log" not in file and "profile" not in file else None
        if isinstance(graph, dict) and "nodes" in graph:
            types = {name: tensor["data_type"] for name, tensor in graph["tensors"].items()}
            found.append(
                [
                    [name, n["type"], [types.get(i) for i in n["input_names"]], [types.get(o) for o in n["output_names"]]]
                    for name, n in graph["nodes"].items()
                ]
            )
    return found


def main(folder: str) -> None:
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as text:
        job = json.load(text)
    answer: Any = {}
    try:
        run(folder, job, answer)
    except Exception as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    if job["qnn"] is not None:
        answer["graphs"] = graphs(folder)
    with open(os.path.join(folder, "answer.json"), "w", encoding="utf-8") as text:
        json.dump(answer, text)


if __name__ == "__main__":
    main(sys.argv[1])
