"""Files written whole or not at all, and arrays kept in a folder between runs, which count as missing when damaged."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array

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


def clear_leftovers(folder: Path, seconds: float = 86400.0) -> None:
    """Remove what writers that were killed left in a cache so long ago: nobody writes it any more."""
    for part in folder.glob(f".*{_PART}"):
        with contextlib.suppress(OSError):  # another process may be as tidy
            if time.time() - part.stat().st_mtime > seconds:
                part.unlink()


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
