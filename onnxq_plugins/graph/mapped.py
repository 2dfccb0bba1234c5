"""Large weights that stay in the files of external data, so that a model may be larger than memory.

External data of 1 MB and more are mapped: a constant is an array on the file, and its memory is given back after each
layer. Everything else is the code path of small models, since arrays are arrays. The audit of weight-only layers is not
bounded this way: onnxruntime lays out the weights of MatMulNBits anew."""

from __future__ import annotations

import math
import mmap
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import onnx

from onnxq_plugins.files import mapped
from onnxq_plugins.spec import Array


class MappedWeights:
    """Large float32 weights of external data, by name: arrays on memory-mapped files, read when they are used. Pages that
    are used within `reading` leave memory at its end."""

    least = 2**20  # bytes of the smallest weight that is mapped

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}
        self._files: dict[Path, mmap.mmap] = {}
        self._scratch: IO[bytes] | None = None

    def take(self, tensor: onnx.TensorProto, folder: Path) -> bool:
        """Map a tensor's data; False if it is small, not float32, or its entries do not fit. The file must exist."""
        entries = {e.key: e.value for e in tensor.external_data}
        count = math.prod(tensor.dims)
        if (
            tensor.data_location != onnx.TensorProto.EXTERNAL
            or tensor.data_type != onnx.TensorProto.FLOAT
            or 4 * count < self.least
            or sys.byteorder != "little"
            or min(tensor.dims, default=0) < 1
        ):
            return False
        file, first = (folder / entries["location"]).resolve(), int(entries.get("offset") or 0)
        if (
            first < 0
            or first % 4
            or int(entries.get("length") or 4 * count) != 4 * count
            or (first + 4 * count > file.stat().st_size)
        ):
            return False
        if file not in self._files:
            self._files[file] = mapped(file)
        self.arrays[tensor.name] = np.frombuffer(self._files[file], np.float32, count, first).reshape(tensor.dims)
        return True

    @property
    def size(self) -> int:
        """Bytes of all weights."""
        return sum(array.nbytes for array in self.arrays.values())

    def keep(self, array: Array) -> Array:
        """The same values, read-only, in a temporary file: results as large as all weights need not fit memory."""
        self._scratch = self._scratch or tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the graph exists
        page = mmap.ALLOCATIONGRANULARITY
        first = -(-self._scratch.seek(0, 2) // page) * page
        self._scratch.seek(first)
        self._scratch.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._scratch.flush()
        copy = mmap.mmap(self._scratch.fileno(), array.nbytes, access=mmap.ACCESS_READ, offset=first)
        self._files[Path(f"{first}")] = copy
        return np.frombuffer(copy, array.dtype).reshape(array.shape)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Release the memory of all weights when the block ends."""
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Release the memory of all weights; they are read from their files again when used."""
        for file in self._files.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)
