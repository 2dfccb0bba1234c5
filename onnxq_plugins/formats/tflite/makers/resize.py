"""Resize: with LiteRT's rule for positions where one is the model's, else row by row."""

from __future__ import annotations

import numpy as np

from onnxq_plugins.formats.tflite.builder import Builder, Refused, Value
from onnxq_plugins.formats.tflite.layouts import channels_last, stored
from onnxq_plugins.formats.tflite.reading import Node
from onnxq_plugins.spec import Array

NHWC = channels_last(4)
_RULES = ((False, False), (False, True), (True, False))  # LiteRT's alignCorners, halfPixelCenters


def resize(b: Builder, n: Node) -> None:
    """Resize and Upsample [N, C, H, W] or [N, C, L], nearest or linear, on codes where there are some."""
    x, shape = b.value(n.inputs[0]), b.source.shapes[n.outputs[0]]
    if x.rank not in (3, 4) or shape[:2] != x.shape[:2]:
        raise Refused("it resizes more than height and width")
    if n.attr("coordinate_transformation_mode", "") == "tf_crop_and_resize" or n.attr("antialias", 0):
        raise Refused("LiteRT has no Resize that crops or smooths")
    if x.rank == 3:
        x = b.reshaped(x, (*x.shape[:2], 1, x.shape[2]))
    wanted = (*x.shape[:2], *((1,) if len(shape) == 3 else ()), *shape[2:])
    factors = _factors(b, n, x, wanted)
    mode, rule = n.attr("mode", "nearest"), n.attr("coordinate_transformation_mode", _default(b, n))
    at = [_places(rule, x.shape[2 + a], wanted[2 + a], factors[a]) for a in (0, 1)]
    if mode == "nearest":
        rows = [
            _nearest(n.attr("nearest_mode", _rounding(b)), places, size)
            for places, size in zip(at, x.shape[2:], strict=True)
        ]
        made = _by_rule(b, x, wanted, rows) or _by_rows(b, x, rows)
    elif mode == "linear":
        made = _linear(b, x, wanted, at)
    else:
        raise Refused(f"LiteRT has no mode '{mode}'")
    b.values[n.outputs[0]] = b.reshaped(made, shape)


def _default(b: Builder, n: Node) -> str:
    return "asymmetric" if n.op == "Upsample" or b.source.opset < 11 else "half_pixel"


def _rounding(b: Builder) -> str:
    return "floor" if b.source.opset < 11 else "round_prefer_floor"


def _factors(b: Builder, n: Node, x: Value, wanted: tuple[int, ...]) -> list[float]:
    """Output size by input size, as the model gives it."""
    place = 1 if n.op == "Upsample" or b.source.opset < 11 else 2
    given = b.constant(n, place, "scales") if "scales" not in n.attrs else np.asarray(n.attrs["scales"])
    if given is not None and given.size >= 2:
        return (
            [1.0] * (4 - given.size) + [float(f) for f in given.reshape(-1)[-2:]]
            if given.size != 3
            else [1.0, float(given[-1])]
        )
    return [o / i for o, i in zip(wanted[2:], x.shape[2:], strict=True)]


def _places(rule: str, size: int, wanted: int, factor: float) -> Array:
    """Where the elements of the output lie in the input, as ONNX defines it."""
    at = np.arange(wanted, dtype=np.float64)
    if rule == "align_corners":
        return at * (size - 1) / (wanted - 1) if wanted > 1 else at * 0
    if rule == "asymmetric":
        return at / factor
    if rule == "pytorch_half_pixel" and wanted == 1:
        return at * 0
    if rule == "half_pixel_symmetric":
        exact = size * factor
        return size / 2 * (1 - wanted / exact) + (at + 0.5) / factor - 0.5
    return (at + 0.5) / factor - 0.5


def _nearest(mode: str, places: Array, size: int) -> Array:
    rounded = {
        "floor": np.floor(places),
        "ceil": np.ceil(places),
        "round_prefer_ceil": np.floor(places + 0.5),
        "round_prefer_floor": np.ceil(places - 0.5),
    }[mode]
    return np.clip(rounded, 0, size - 1).astype(np.int64)


def _lite_nearest(align: bool, half: bool, size: int, wanted: int) -> Array:
    """The rows that RESIZE_NEAREST_NEIGHBOR takes."""
    scale = np.float32(size - 1) / np.float32(wanted - 1) if align and wanted > 1 else np.float32(size) / np.float32(wanted)
    at = (np.arange(wanted, dtype=np.float32) + np.float32(0.5 if half else 0)) * scale
    rows: Array = np.clip(np.floor(at + np.float32(0.5)) if align else np.floor(at), 0, size - 1).astype(np.int64)
    return rows


def _by_rule(b: Builder, x: Value, wanted: tuple[int, ...], rows: list[Array]) -> Value | None:
    for align, half in _RULES:
        found = [_lite_nearest(align, half, x.shape[2 + a], wanted[2 + a]) for a in (0, 1)]
        if all(np.array_equal(one, other) for one, other in zip(found, rows, strict=True)):
            return _emitted(b, "RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighbor", x, wanted, align, half)
    return None


def _by_rows(b: Builder, x: Value, rows: list[Array]) -> Value:
    """Rows and columns are gathered one after the other."""
    index, shape = b.tensor(x, NHWC, x.grid), list(stored(x.shape, NHWC))
    kind = "float32" if x.grid is None else x.grid.type
    for axis, places in zip((1, 2), rows, strict=True):
        if not np.array_equal(places, np.arange(shape[axis])):
            shape[axis] = len(places)
            index = b.emit("GATHER", [index, b.ints(places)], shape, kind, x.grid, kind="Gather", axis=axis)
    return b.computed(index, (shape[0], shape[3], shape[1], shape[2]), NHWC, x.grid)


def _linear(b: Builder, x: Value, wanted: tuple[int, ...], at: list[Array]) -> Value:
    for align, half in _RULES:
        rule = "align_corners" if align else "half_pixel" if half else "asymmetric"
        sizes = list(zip(x.shape[2:], wanted[2:], strict=True))
        own = [_places(rule, size, out, out / size) for size, out in sizes]
        pairs = zip(own, at, sizes, strict=True)
        if all(np.allclose(np.clip(o, 0, s - 1), np.clip(a, 0, s - 1), atol=1e-4) for o, a, (s, _) in pairs):
            return _emitted(b, "RESIZE_BILINEAR", "ResizeBilinear", x, wanted, align, half)
    raise Refused("LiteRT's bilinear Resize has no such positions")


def _emitted(b: Builder, op: str, kind: str, x: Value, wanted: tuple[int, ...], align: bool, half: bool) -> Value:
    shape = stored(wanted, NHWC)
    sizes = b.ints(shape[1:3])
    dtype = "float32" if x.grid is None else x.grid.type
    options = {"alignCorners": align, "halfPixelCenters": half}
    made = b.emit(op, [b.tensor(x, NHWC, x.grid), sizes], shape, dtype, x.grid, kind=kind, **options)
    return b.computed(made, wanted, NHWC, x.grid)
