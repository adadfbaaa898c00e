"""Reads the GGUF container: metadata, and tensors dequantized one at a time.

The header is parsed here, with every length checked against the file, because `gguf.GGUFReader` trusts the
counts that it finds (a lying array length makes it loop and allocate without end); block formats and their
dequantization come from the `gguf` package.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from atom_jax.typing import AtomError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


class GGUFFile:
    """One opened GGUF file (little-endian, version 2 or 3).

    metadata: str -> int, float, bool, str or list of those.
    shapes:   tensor name -> shape, slowest dimension first (as numpy and PyTorch write it).
    Raises AtomError for anything that is not a whole, well-formed file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._gguf = _gguf_package()
        self._infos: dict[str, tuple[tuple[int, ...], Any, int, int]] = {}
        self.metadata: dict[str, Any] = {}
        try:
            with open(self.path, "rb") as f:
                self._read_header(_Cursor(f, self.path))
        except OSError as e:
            raise AtomError(f"{self.path}: cannot be read ({e.strerror})") from None
        self.shapes = {name: info[0] for name, info in self._infos.items()}

    def _read_header(self, cursor: _Cursor) -> None:
        if cursor.take(4) != b"GGUF":
            raise AtomError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF')")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise AtomError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are, little-endian)")
        n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(n_keys):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        self._read_infos(cursor, n_tensors)

    def _read_infos(self, cursor: _Cursor, n_tensors: int) -> None:
        raw = []
        for _ in range(n_tensors):
            name = cursor.string()
            n_dims = cursor.scalar("I")
            shape = tuple(cursor.scalar("Q") for _ in range(min(n_dims, _MAX_DIMS)))[::-1]
            if not 1 <= n_dims <= _MAX_DIMS or 0 in shape:
                raise AtomError(f"{self.path}: tensor '{name}' claims {n_dims} dimensions of sizes {shape}")
            raw.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise AtomError(f"{self.path}: general.alignment {alignment!r} is not a power of two")
        start = -(-cursor.offset // alignment) * alignment
        for name, shape, type_id, offset in raw:
            kind, n_bytes = self._storage(name, shape, type_id)
            if start + offset + n_bytes > cursor.size:
                raise AtomError(f"{self.path}: tensor '{name}' lies beyond the end of the file (truncated file?)")
            if name in self._infos:
                raise AtomError(f"{self.path}: tensor '{name}' appears twice")
            self._infos[name] = (shape, kind, start + offset, n_bytes)

    def _storage(self, name: str, shape: tuple[int, ...], type_id: int) -> tuple[Any, int]:
        try:
            kind = self._gguf.GGMLQuantizationType(type_id)
        except ValueError:
            raise AtomError(f"{self.path}: tensor '{name}' has unknown type number {type_id}") from None
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise AtomError(f"{self.path}: tensor '{name}' {shape} does not fill {kind.name} blocks of {block}")
        return kind, math.prod(shape) // block * block_bytes

    def stored(self) -> list[tuple[str, tuple[int, ...], str, int]]:
        """(name, shape, storage type such as "Q4_1", bytes) of every tensor."""
        return [(name, shape, kind.name, n) for name, (shape, kind, _, n) in self._infos.items()]

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, dequantized, shape `shapes[name]`."""
        shape, kind, offset, n_bytes = self._infos[name]
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        raw = np.fromfile(self.path, np.uint8, n_bytes, offset=offset)
        if raw.size != n_bytes:
            raise AtomError(f"{self.path}: ends inside tensor '{name}'; it has changed since it was opened")
        raw = raw.reshape(-1, shape[-1] // block * block_bytes)
        types = self._gguf.GGMLQuantizationType
        if kind in (types.F32, types.F16):
            raw = raw.view(np.float32 if kind == types.F32 else np.float16)
        try:
            out = self._gguf.quants.dequantize(raw, kind)
        except NotImplementedError:
            raise AtomError(f"{self.path}: tensor '{name}' is {kind.name}, which gguf cannot dequantize") from None
        return np.asarray(out, np.float32).reshape(shape)


class _Cursor:
    """Reads little-endian values in order and refuses to read past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path, self.offset = file, path, 0
        self.size = path.stat().st_size

    def take(self, n: int) -> bytes:
        if self.offset + n > self.size:
            raise AtomError(f"{self._path}: the GGUF header runs past the end of the file (truncated or corrupt)")
        self.offset += n
        return self._file.read(n)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise AtomError(f"{self._path}: the GGUF header holds a string that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise AtomError(f"{self._path}: the GGUF header holds a value of unknown type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[item])
            return np.frombuffer(self.take(size * count), "<" + _SCALARS[item]).tolist()
        if item != _STRING:
            raise AtomError(f"{self._path}: the GGUF header holds an array of type {item}, which is not supported")
        return [self.string() for _ in range(count)]


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise AtomError("reading .gguf files needs the gguf package: pip install 'atom-jax[gguf]'") from None
    return gguf
