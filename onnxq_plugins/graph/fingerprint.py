"""Fingerprints of graphs. They are asked for before every use of what is known of a graph, often of the same one: so the
contents of large constants are hashed once, and recognized by their checksums, which take a fifth of the time."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import Any
from weakref import ref

import numpy as np
import onnx_graphsurgeon as gs

from onnxq_plugins.spec import Array

_SMALL = 1024  # bytes that are hashed each time
_PLAIN = (int, float, str, bool, bytes, type(None))


def is_large(values: Array) -> bool:
    """True for a constant that models may have a placeholder for (`Graph.model`)."""
    return bool(values.nbytes > _SMALL and values.dtype == np.float32)


class Contents:
    """Hashes of arrays. One that was hashed before is recognized by its identity and a checksum, as it may have been
    written to since."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int, bytes]] = {}

    def of(self, values: Array, fixed: bool = False) -> bytes:
        """The hash of type, shape and values.

        fixed   nobody can write to the array: its identity is enough
        """
        if values.nbytes <= _SMALL or values.dtype == object:
            return _hash(values)
        own, checksum, known = self._known.get(id(values), (None, 0, b""))
        same = own is not None and own() is values
        now = 0 if fixed else zlib.crc32(_bytes(values))
        if not same or now != checksum:
            known = _hash(values)
            self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
            self._known[id(values)] = ref(values), now, known
        return known


class Fingerprint:
    """Of a graph as it is now.

    structure   of all but the values of large constants, in hexadecimal: equal for graphs that are written as the same model
                with placeholders
    """

    def __init__(self, graph: gs.Graph, beside: Iterable[bytes], contents: Contents, fixed: Collection[int] = ()) -> None:
        """
        beside   of what graphsurgeon does not hold
        fixed    identities of arrays that cannot change
        """
        self._contents, self._fixed = contents, fixed
        self._seen: dict[int, str] = {}  # tensors, of which each is written once
        self._large: list[Array] = []
        text = "".join(self._texts(graph))
        self.structure = _hexadecimal(text.encode(), *beside)

    @property
    def whole(self) -> str:
        """Of all, in hexadecimal."""
        return _hexadecimal(self.structure.encode(), *map(self._content, self._large))

    def _content(self, values: Array) -> bytes:
        return self._contents.of(values, id(values) in self._fixed)

    def _texts(self, graph: gs.Graph) -> Iterable[str]:
        yield f"{graph.opset}|"
        for tensors in (graph.inputs, graph.outputs):
            yield from map(self._tensor, tensors)
            yield "|"
        for node in graph.nodes:
            yield f"{node.op}|{node.name}|{node.domain}|"
            for name in sorted(node.attrs):
                yield f"{name}={self._plain(node.attrs[name])}|"
            yield from map(self._tensor, node.inputs)
            yield ">"
            yield from map(self._tensor, node.outputs)

    def _tensor(self, tensor: gs.Tensor) -> str:
        """A tensor's number, and what it is where it is met first."""
        known = self._seen.get(id(tensor))
        if known is not None:
            return known
        self._seen[id(tensor)] = f"{len(self._seen)},"
        return f"{tensor.name!r}{self._described(tensor)};"

    def _described(self, tensor: gs.Tensor) -> str:
        if not isinstance(tensor, gs.Constant):
            return f"{_name(tensor.dtype)}{tensor.shape}{tensor.type}"
        values = np.asarray(tensor.values)
        if is_large(values):
            self._large.append(values)
            return f"{_name(tensor.dtype)}{values.shape}large"
        return f"{_name(tensor.dtype)}{self._content(values).hex()}"

    def _plain(self, value: Any) -> str:
        """An attribute as text."""
        if isinstance(value, (list, tuple)):
            plain = all(isinstance(item, _PLAIN) for item in value)
            return repr(value) if plain else f"[{','.join(map(self._plain, value))}]"
        if isinstance(value, gs.Graph):
            return "".join(self._texts(value))
        if isinstance(value, gs.Constant):
            return f"{value.name!r}{_name(value.dtype)}{self._content(np.asarray(value.values)).hex()}"
        if isinstance(value, gs.Tensor):
            return self._tensor(value)
        return self._content(value).hex() if isinstance(value, np.ndarray) else repr(value)


@lru_cache(maxsize=256, typed=True)
def _name(dtype: Any) -> str:
    return str(dtype)


def _bytes(values: Array) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _hash(values: Array) -> bytes:
    digest = hashlib.blake2b(f"{_name(values.dtype)}{values.shape}".encode(), digest_size=16)
    digest.update(_bytes(values) if values.size and values.dtype != object else repr(values.tolist()).encode())
    return digest.digest()


def _hexadecimal(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
        digest.update(b"|")
    return digest.hexdigest()
