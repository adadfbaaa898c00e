"""Reads the GGUF container: metadata, and tensors dequantized one at a time.

The header is parsed here, with every length checked against the file, because `gguf.GGUFReader` trusts the
counts that it finds (a lying array length makes it loop and allocate without end); block formats and their
dequantization come from the `gguf` package.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from atom_jax.files import open_regular
from atom_jax.typing import AtomError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


class _Stored(NamedTuple):
    """Where a tensor is: shape with the slowest dimension first, ggml's type, and the bytes of a file."""

    shape: tuple[int, ...]
    kind: Any
    file: Path
    offset: int
    n_bytes: int


class GGUFFile:
    """One opened GGUF file (little-endian, version 2 or 3), or all parts of one that was split, by the first.

    metadata: str -> int, float, bool, str or list of those.
    shapes:   tensor name -> shape, slowest dimension first (as numpy and PyTorch write it).
    Raises AtomError for anything that is not whole and well-formed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._gguf = _gguf_package()
        self._infos: dict[str, _Stored] = {}
        self.metadata = self._add(self.path)
        for number, part in enumerate(self._other_parts(), 1):
            if self._add(part).get("split.no") != number:
                raise AtomError(f"{part}: its split.no does not say that it is part {number + 1}, as its name does")
        whole = self.metadata.get("split.tensors.count", len(self._infos))
        if whole != len(self._infos):
            raise AtomError(f"{self.path}: split.tensors.count is {whole!r}, and {len(self._infos)} were found")
        self.shapes = {name: info.shape for name, info in self._infos.items()}

    def _other_parts(self) -> Iterator[Path]:
        """The files after the first one, where the file says that there are more."""
        number, count = self.metadata.get("split.no", 0), self.metadata.get("split.count", 0)
        if type(number) is not int or type(count) is not int or not 0 <= number < max(count, 1):
            raise AtomError(f"{self.path}: split.no is {number!r} and split.count {count!r}")
        if count < 2:
            return
        name = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", self.path.name)
        if name is None or int(name[2]) != number + 1 or int(name[3]) != count:
            raise AtomError(f"{self.path}: is part {number + 1} of {count}, which must be named NAME-00001-of-N.gguf")
        if number:
            raise AtomError(
                f"{self.path}: is part {number + 1} of {count}; name the first, the others are found by it"
            )
        for other in range(1, count):
            part = self.path.with_name(f"{name[1]}-{other + 1:05d}-of-{count:05d}.gguf")
            if not part.exists():
                raise AtomError(f"{self.path}: is part 1 of {count}, and {part.name} is not beside it")
            yield part

    def _add(self, path: Path) -> dict[str, Any]:
        """Adds the tensors of one file and returns its metadata."""
        try:
            with open_regular(path) as f:
                cursor = _Cursor(f, path)
                metadata, n_tensors = _read_metadata(cursor)
                self._read_infos(cursor, metadata, n_tensors)
        except OSError as e:
            raise AtomError(f"{path}: cannot be read ({e.strerror})") from None
        return metadata

    def _read_infos(self, cursor: _Cursor, metadata: dict[str, Any], n_tensors: int) -> None:
        raw, path = [], cursor.path
        for _ in range(n_tensors):
            name = cursor.string()
            n_dims = cursor.scalar("I")
            shape = tuple(cursor.scalar("Q") for _ in range(min(n_dims, _MAX_DIMS)))[::-1]
            if not 1 <= n_dims <= _MAX_DIMS or 0 in shape:
                raise AtomError(f"{path}: tensor '{name}' claims {n_dims} dimensions of sizes {shape}")
            raw.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise AtomError(f"{path}: general.alignment {alignment!r} is not a power of two")
        start = -(-cursor.offset // alignment) * alignment
        for name, shape, type_id, offset in raw:
            kind, n_bytes = self._storage(path, name, shape, type_id)
            if start + offset + n_bytes > cursor.size:
                raise AtomError(f"{path}: tensor '{name}' lies beyond the end of the file (truncated file?)")
            if name in self._infos:
                raise AtomError(f"{path}: tensor '{name}' appears twice")
            self._infos[name] = _Stored(shape, kind, path, start + offset, n_bytes)

    def _storage(self, path: Path, name: str, shape: tuple[int, ...], type_id: int) -> tuple[Any, int]:
        try:
            kind = self._gguf.GGMLQuantizationType(type_id)
        except ValueError:
            raise AtomError(f"{path}: tensor '{name}' has unknown type number {type_id}") from None
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise AtomError(f"{path}: tensor '{name}' {shape} does not fill {kind.name} blocks of {block}")
        return kind, math.prod(shape) // block * block_bytes

    def stored(self) -> list[tuple[str, tuple[int, ...], str, int]]:
        """(name, shape, storage type such as "Q4_1", bytes) of every tensor."""
        return [(name, info.shape, info.kind.name, info.n_bytes) for name, info in self._infos.items()]

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, dequantized, shape `shapes[name]`."""
        shape, kind, path, offset, n_bytes = self._infos[name]
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
        raw = np.fromfile(path, np.uint8, n_bytes, offset=offset)
        if raw.size != n_bytes:
            raise AtomError(f"{path}: ends inside tensor '{name}'; it has changed since it was opened")
        raw = raw.reshape(-1, shape[-1] // block * block_bytes)
        types = self._gguf.GGMLQuantizationType
        if kind in (types.F32, types.F16):
            raw = raw.view(np.float32 if kind == types.F32 else np.float16)
        try:
            out = self._gguf.quants.dequantize(raw, kind)
        except NotImplementedError:
            raise AtomError(f"{path}: tensor '{name}' is {kind.name}, which gguf cannot dequantize") from None
        return np.asarray(out, np.float32).reshape(shape)


def _read_metadata(cursor: _Cursor) -> tuple[dict[str, Any], int]:
    """The metadata of a file, and how many tensors it says to hold."""
    path, metadata = cursor.path, {}
    if cursor.take(4) != b"GGUF":
        raise AtomError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise AtomError(f"{path}: GGUF version {version} is not supported (2 and 3 are, little-endian)")
    n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise AtomError(f"{path}: {key} appears twice in the GGUF header")
        metadata[key] = cursor.value(cursor.scalar("I"))
    return metadata, n_tensors


class _Cursor:
    """Reads little-endian values in order and refuses to read past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self.path, self.offset = file, path, 0
        self.size = os.fstat(file.fileno()).st_size

    def take(self, n: int) -> bytes:
        self.offset += n
        data = self._file.read(n) if self.offset <= self.size else b""
        if len(data) != n:
            raise AtomError(f"{self.path}: the GGUF header runs past the end of the file (truncated or corrupt)")
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise AtomError(f"{self.path}: the GGUF header holds a string that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise AtomError(f"{self.path}: the GGUF header holds a value of unknown type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[item])
            return np.frombuffer(self.take(size * count), "<" + _SCALARS[item]).tolist()
        if item != _STRING:
            raise AtomError(f"{self.path}: the GGUF header holds an array of type {item}, which is not supported")
        return [self.string() for _ in range(count)]


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError:
        raise AtomError("reading .gguf files needs the gguf package: pip install 'atom-jax[gguf]'") from None
    return gguf
