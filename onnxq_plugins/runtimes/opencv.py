"""OpenCV's dnn module on the CPU. The types of the layers that it made tell what runs: ``ConvolutionInt8`` and its like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.graph.reading import read
from onnxq_plugins.runtimes.kernels import MOVES, coded, computed, moved
from onnxq_plugins.runtimes.runtime import Executed, Inspection, Runtime
from onnxq_plugins.runtimes.timing import milliseconds as timed
from onnxq_plugins.spec import Array

_INSTALL = "pip install 'onnxq-plugins[opencv]'"
_MOVES = MOVES | {
    "Const",
    "Crop",
    "Dequantize",
    "Padding",
    "Permute",
    "Quantize",
    "Requantize",
    "ReshapeInt8",
    "ShuffleChannel",
    "TransformLayout",
}


def _inspect(file: Path, samples: Sequence[Mapping[str, Array]], settings: Mapping[str, Any]) -> Inspection:
    try:
        import cv2
    except ImportError as error:
        raise OnnxqError(f"OpenCV is not installed; {_INSTALL}.") from error
    graph = read(file).graph
    names = [value.name for value in graph.output]
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        net = _read(cv2, file, str(settings["engine"]))

        def run(sample: Mapping[str, Array]) -> dict[str, Array]:
            for name, value in sample.items():
                net.setInput(value, name)
            return {name: np.array(value) for name, value in zip(names, net.forward(names), strict=True)}

        outputs = tuple(map(run, samples))
        milliseconds = timed(lambda: run(samples[0])) if samples else None
        layers = [(str(name), str(net.getLayer(net.getLayerId(name)).type)) for name in net.getLayerNames()]
    except (cv2.error, SystemError) as error:
        text = " ".join(str(error).partition("error: ")[2].split()) or " ".join(str(error).split())
        raise OnnxqError(f"OpenCV {cv2.__version__} cannot run '{file.name}': {text[:300].rstrip('.')}.") from error
    finally:
        cv2.setNumThreads(threads)
    codes = coded(graph)
    operators = tuple(_layer(name.rpartition("!")[2], kind, codes) for name, kind in layers)
    return Inspection(outputs, operators, milliseconds, {"version": cv2.__version__})


def _read(cv2: Any, file: Path, engine: str) -> Any:
    """The network. Version 5 has two engines: the new one, which it prefers, and the one of version 4."""
    engines = {
        name.removeprefix("ENGINE_").lower(): getattr(cv2.dnn, name) for name in dir(cv2.dnn) if name.startswith("ENGINE_")
    }
    if not engines:
        return cv2.dnn.readNetFromONNX(str(file))
    if engine not in engines:
        raise OnnxqError(f"engine = '{engine}' is none of OpenCV {cv2.__version__}; known: {', '.join(sorted(engines))}.")
    return cv2.dnn.readNetFromONNX(str(file), engine=engines[engine])


def _layer(name: str, kind: str, codes: set[str]) -> Executed:
    if kind in _MOVES:
        return moved(name, kind)
    return computed(name, kind, kind.endswith("Int8"), codes)


OPENCV = Runtime("opencv", "OpenCV's dnn module", _INSTALL, _inspect, settings={"engine": "classic"})
