"""Files written whole or not at all, models of any size, and arrays kept in a folder between runs, which count as missing
when damaged.

Caches are named after what they depend on (codes after graph, data, request and method; scores after the bytes of the
network and the samples), so that nothing has to be invalidated. Files are replaced, never rewritten: each writer has a name
of its own, so that processes may share a cache. A data file has its fingerprint in its name and moves into place before its
model, so that a killed run never leaves a model beside the data of another. onnxruntime copies arrays that it is handed but
maps files, so sessions name the file of weights that are in one (`origin`)."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import secrets
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

LARGE = 2**30  # bytes of weights from which a second copy of them is too much
LARGEST_MESSAGE = 2**31 - 2**20  # protobuf's limit is 2 GiB
_PART = ".part"  # ends the names of files that are being written


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream to a new file beside `path` that takes its place when the block ends, and is gone when it fails. Any number
    of processes and threads may do so at once: readers meet one whole file or another. Raises OSError."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
    try:
        with open(part, "xb") as stream:
            yield stream
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it an OSError means that the output cannot be written: OnnxqError."""
    try:
        yield
    except OSError as error:
        raise OnnxqError(f"output '{path}' cannot be written: {error.strerror or error}.") from error


_files: weakref.WeakKeyDictionary[mmap.mmap, Path] = weakref.WeakKeyDictionary()


def mapped(file: Path) -> mmap.mmap:
    """A file, for reading only, where it lies; `origin` finds it again."""
    with open(file, "rb") as stream:
        view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    _files[view] = file
    return view


def origin(array: Array) -> tuple[Path, int] | None:
    """The file of a `mapped` array and where it begins there, in bytes; None for an array that is in memory or has gaps."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    file = _files.get(base) if isinstance(base, mmap.mmap) else None
    if file is None or not array.flags.c_contiguous:
        return None
    return file, array.ctypes.data - np.frombuffer(base, np.uint8, 1).ctypes.data


class DataFile:
    """The large constants of a model that is being written to `path`, in a file beside it ("external data"). It bears a part
    of their fingerprint in its name, so that a model never meets the data of another, whenever a run is killed.

    Used in a with statement: without `finish` nothing is left. Raises OnnxqError if the files cannot be written.
    """

    least = 2**16  # bytes of a constant that is worth it

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PART}")
        self._seen = hashlib.blake2b(digest_size=4)

    def __enter__(self) -> DataFile:
        with writing(self.path):
            self._stream = open(self.part, "xb")
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self.part.unlink(missing_ok=True)

    def take(self, tensor: onnx.TensorProto) -> None:
        """Move the data of a tensor, if it is large, to the file: the tensor then refers to it."""
        raw = tensor.raw_data
        if len(raw) < self.least:
            return
        pad = bytes(-self.size % 4096)  # whole pages: runtimes map the file
        with writing(self.path):
            self._stream.write(pad)
            self._stream.write(raw)
        self._seen.update(pad + raw if pad else raw)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.part.name), ("offset", self.size + len(pad)), ("length", len(raw))):
            tensor.external_data.add(key=key, value=str(value))
        self.size += len(pad) + len(raw)

    def flush(self) -> None:
        """From now on the file can be read, under its temporary name."""
        with writing(self.path):
            self._stream.flush()

    def finish(self, model: onnx.ModelProto) -> Path:
        """Write the model whose tensors were taken, first the data, then what refers to them. The data of an earlier model
        under this path give way."""
        name = f"{self.path.name}.{self._seen.hexdigest()}.data"
        with writing(self.path):
            self._stream.close()
            os.replace(self.part, self.path.with_name(name))
        for entry in (e for tensor in model.graph.initializer for e in tensor.external_data):
            if entry.key == "location" and entry.value == self.part.name:
                entry.value = name
        with writing(self.path), replacing(self.path) as stream:
            stream.write(model.SerializeToString())
        for file in self.path.parent.iterdir():
            if file.name != name and re.fullmatch(re.escape(self.path.name) + r"\.[0-9a-f]{8}\.data", file.name):
                file.unlink(missing_ok=True)
        return self.path


def size_of(model: onnx.ModelProto) -> int:
    """Bytes of a model in a file, external data left out; of any size, which `ByteSize` is not."""
    if sum(int(tensor.ByteSize()) for tensor in model.graph.initializer) < LARGE:
        return int(model.ByteSize())
    rest = onnx.ModelProto(graph=onnx.GraphProto(node=model.graph.node), metadata_props=model.metadata_props)
    return int(rest.ByteSize()) + sum(int(tensor.ByteSize()) for tensor in model.graph.initializer)


def skeleton(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model without its initializers."""
    shell = onnx.ModelProto()
    for part, whole, heavy in ((shell, proto, "graph"), (shell.graph, proto.graph, "initializer")):
        for field, value in whole.ListFields():
            if field.name == heavy:
                continue
            if hasattr(value, "extend"):
                getattr(part, field.name).extend(value)
            elif field.message_type is not None:
                getattr(part, field.name).CopyFrom(value)
            else:
                setattr(part, field.name, value)
    return shell


def save_model(model: onnx.ModelProto, path: Path, beside: bool = False) -> Path:
    """Write a model, complete or not at all; one that is too large for a protobuf message with external data beside it, and
    any other `beside`. Raises OnnxqError if that is not possible."""
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        if beside and path.is_file():  # it has been
            return path
        raise OnnxqError(f"output '{path}': the model's weights lie beside the output it was made for; copy both files.")
    if size_of(model) <= LARGEST_MESSAGE and not beside:
        return write_file(model.SerializeToString(), path)
    check_writable(path)
    shell = skeleton(model)
    with DataFile(path) as data:
        data.least = 1024 if beside else data.least
        for tensor in model.graph.initializer:
            stored = shell.graph.initializer.add()
            stored.CopyFrom(tensor)
            data.take(stored)
        return data.finish(shell)


def write_file(content: bytes, path: Path) -> Path:
    """Write beside the target, then move into place. Raises OnnxqError if that is not possible."""
    check_writable(path)
    with writing(path), replacing(path) as stream:
        stream.write(content)
    return path


def check_writable(path: Path) -> None:
    """Raise OnnxqError if a file could not be made at `path`."""
    folder = path.parent
    if "\0" in str(path):
        raise OnnxqError(f"output {str(path)!r} is no path; give a file name.")
    if not folder.is_dir():
        raise OnnxqError(f"output '{path}': the folder '{folder}' does not exist; make it first.")
    if path.is_dir():
        raise OnnxqError(f"output '{path}' is a folder; give a file name.")
    if path.exists() and not path.is_file():  # moving a file into place would replace a device
        raise OnnxqError(f"output '{path}' is not an ordinary file; give a file name.")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise OnnxqError(f"output '{path}' cannot be written: permission denied; choose another place with -o.")


def clear_leftovers(folder: Path, seconds: float = 86400.0) -> None:
    """Remove what writers that were killed left in a cache so long ago: nobody writes it any more."""
    for part in folder.glob(f".*{_PART}") if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # another process may be as tidy
            if time.time() - part.stat().st_mtime > seconds:
                part.unlink()


def user_cache() -> Path:
    """Where this user keeps what can be made again: $ONNXQ_CACHE, or ``onnxq`` in the system's folder for that."""
    if folder := os.environ.get("ONNXQ_CACHE"):
        return Path(folder)
    home = Path("~").expanduser()
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData/Local") / "onnxq"
    if sys.platform == "darwin":
        return home / "Library/Caches/onnxq"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "onnxq"


def load_arrays(file: Path) -> dict[str, Array]:
    """The arrays of a file; none if it is absent or damaged."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception:  # numpy, zipfile, zlib and struct each raise their own
        return {}


def save_arrays(file: Path, arrays: Mapping[str, Array]) -> None:
    """Keep arrays in a file, whole or not at all. Raises OnnxqError if the folder cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise OnnxqError(f"cache '{file.parent}' cannot be written ({error.strerror}); choose another --cache.") from error


def digest(*parts: object) -> str:
    """A fingerprint of bytes, arrays and plain values, the same in every run."""
    seen = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            seen.update(f"{part.dtype}{part.shape}".encode())
            seen.update(np.ascontiguousarray(part).tobytes())
        else:
            seen.update(part if isinstance(part, bytes) else repr(part).encode())
        seen.update(b"|")
    return seen.hexdigest()
