"""Arrays kept in a folder between runs: written whole or not at all, and missing when damaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onnxq_plugins.errors import OnnxqError
from onnxq_plugins.spec import Array


def load_arrays(file: Path) -> dict[str, Array]:
    """The arrays of a file; none if it is absent or damaged."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception:  # numpy, zipfile, zlib and struct each raise their own
        return {}


def save_arrays(file: Path, arrays: Mapping[str, Array]) -> None:
    """Write beside the target and move into place, so that readers never meet half a file. Raises OnnxqError if the folder
    cannot be written."""
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as stream:
            np.savez(stream, **arrays)  # type: ignore[arg-type]
        os.replace(part, file)
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
