"""Reads and writes safetensors files: one file, or shards with a model.safetensors.index.json.

The safetensors package reads and writes the data. Headers are first checked here, because its messages do not
name the tensor at fault and it accepts a header that lists one name twice. Files written here hold the CRC-32 of
every tensor in their metadata, "crc32": {name: number} as JSON, which is compared when the tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from atom_jax.checkpoint.checksums import Damaged
from atom_jax.checkpoint.tensors import TensorInfo, TensorSource, check_finite
from atom_jax.fields import read_json
from atom_jax.files import open_regular
from atom_jax.typing import AtomError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_MAX_HEADER = 100_000_000  # the safetensors package's own limit
_MAX_DIMS = 8
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class SafetensorsSource:
    """Tensors of a directory (or of one .safetensors file), read lazily.

    label: the path. infos: name -> TensorInfo. crcs: name -> CRC-32, of files that say so. Raises AtomError for files
    that are missing, truncated or inconsistent, for a tensor found twice, and for pickled weights, which are never
    loaded.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        refuse_pickle(path)
        self.label = str(path)
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self.crcs: dict[str, int] = {}
        self._beside = ThreadPoolExecutor(1)
        for file in _weight_files(path):
            tensors, crcs = _read_header(file)
            self.crcs |= crcs
            for name, (info, offset) in tensors.items():
                if name in self.infos:
                    raise AtomError(f"{file}: tensor '{name}' is also in {self._places[name][0].name}")
                self.infos[name], self._places[name] = info, (file, offset)

    def offset(self, name: str) -> int:
        """Where the tensor begins in its file, in bytes."""
        return self._places[name][1]

    def read(self, name: str) -> np.ndarray:
        """The tensor as numpy (bfloat16 through ml_dtypes). Damaged where it is not what was written, AtomError where
        it holds NaN or infinity."""
        info, (file, offset) = self.infos[name], self._places[name]
        count = math.prod(info.shape)
        try:
            # Read, not mapped: mapped pages count as this process's memory, and a file that shrinks kills it.
            x = np.fromfile(file, info.dtype, count, offset=offset)
        except OSError as e:
            raise AtomError(f"{file}: tensor '{name}' cannot be read ({e})") from None
        if x.size != count:
            raise AtomError(f"{file}: ends inside tensor '{name}'; it has changed since it was opened")
        # Beside the search for NaN, on another core.
        crc = self._beside.submit(zlib.crc32, x.view(np.uint8)) if name in self.crcs else None
        try:
            return check_finite(x.reshape(info.shape), str(file), name)
        finally:
            if crc is not None and crc.result() != self.crcs[name]:
                raise Damaged(f"{file}: tensor '{name}' is not what was written: its checksum differs")


def _read_header(file: Path) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, int]]:
    """Tensors in one .safetensors file, each with its offset in bytes, and their checksums, where there are any;
    checks that the file holds exactly these tensors."""
    try:
        with open_regular(file) as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            text = f.read(length) if length <= min(size - 8, _MAX_HEADER) else None
    except OSError as e:
        raise AtomError(f"{file}: cannot be read ({e.strerror})") from None
    if text is None:
        raise AtomError(f"{file}: not a whole safetensors file (the header does not fit; truncated download?)")
    try:
        entries = json.loads(text, object_pairs_hook=_no_duplicates)
    except _Duplicate as e:
        raise AtomError(f"{file}: '{e}' is listed twice in the header") from None
    except (ValueError, RecursionError):
        raise AtomError(f"{file}: the safetensors header is not valid JSON") from None
    if not isinstance(entries, dict):
        raise AtomError(f"{file}: the safetensors header is not a table of tensors")
    crcs = _crcs(file, entries.pop("__metadata__", None))
    tensors = {name: _tensor_info(file, name, entry, 8 + length, size) for name, entry in entries.items()}
    try:
        with safe_open(file, framework="np"):  # a second opinion, also on gaps and overlaps between tensors
            return tensors, crcs
    except (SafetensorError, OSError) as e:
        raise AtomError(f"{file}: not a valid safetensors file ({e})") from None


def _crcs(file: Path, metadata: Any) -> dict[str, int]:
    if not isinstance(metadata, dict) or "crc32" not in metadata:
        return {}
    try:
        crcs = json.loads(metadata["crc32"])
    except (ValueError, RecursionError, TypeError):
        crcs = None
    if not isinstance(crcs, dict) or not all(type(n) is int for n in crcs.values()):
        raise AtomError(f"{file}: crc32 in the header's metadata is not a table of checksums")
    return crcs


def _tensor_info(file: Path, name: str, entry: Any, start: int, size: int) -> tuple[TensorInfo, int]:
    where = f"{file}: tensor '{name}'"
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        well_formed = isinstance(dtype, str) and len(shape) <= _MAX_DIMS
        well_formed &= all(type(n) is int and 0 <= n < 2**48 for n in [*shape, begin, end])
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise AtomError(f"{where} has no proper dtype, shape and data_offsets in the header")
    if dtype not in _DTYPES:
        raise AtomError(f"{where} has dtype {dtype}, which is not supported ({', '.join(_DTYPES)} are)")
    if not begin <= end <= size - start:
        raise AtomError(f"{where} lies beyond the end of the file (truncated download?)")
    if math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise AtomError(f"{where} of shape {shape} and dtype {dtype} does not fill its {end - begin} bytes")
    return TensorInfo(tuple(shape), _DTYPES[dtype]), start + begin


class _Duplicate(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise _Duplicate(key)
        out[key] = value
    return out


def refuse_pickle(path: Path) -> None:
    """Raises AtomError, with the way out, where `path` is a pickle or a directory whose only weights are pickles."""
    found = None
    if path.suffix in _PICKLES:
        found = path
    elif path.is_dir() and not any(path.glob("*.safetensors")) and not (path / INDEX).exists():
        found = next((p for p in sorted(path.iterdir()) if p.suffix in _PICKLES and p.is_file()), None)
    if found is not None:
        raise AtomError(
            f"{found}: pickled weights are never loaded, since a pickle can run code; convert them once with "
            "torch.load(FILE, weights_only=True) and safetensors.torch.save_file(TENSORS, 'model.safetensors')"
        )


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if path.suffix == ".safetensors" and not path.exists():
        raise AtomError(f"{path}: no such file")
    if not (path / INDEX).exists():
        raise AtomError(f"{path}: neither {SINGLE} nor {INDEX} is there")
    index = path / INDEX
    try:
        shards = set(read_json(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError):
        raise AtomError(f"{index}: not a valid index (no weight_map of tensor names to file names)") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise AtomError(f"{index}: {shard!r} is not a plain file name")
    missing = sorted(shard for shard in shards if not os.path.exists(path / shard))
    if missing:
        raise AtomError(f"{path}: {len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:3])}")
    return [path / shard for shard in sorted(shards)]


def write_tensors(directory: Path, source: TensorSource, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes every tensor of `source` into `directory`: one file, or shards of up to `shard_bytes` and an index.

    Holds one shard in memory. Not atomic by itself: call it inside `atomic.staged`.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in source.infos.items():
        if shards[-1] and filled + info.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, names in zip(files, shards):
        arrays = {name: np.asarray(source.read(name), order="C") for name in names}
        write_file(arrays, directory / file)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        total = sum(info.nbytes for info in source.infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_file(arrays: dict[str, np.ndarray], file: Path) -> None:
    """Writes C-contiguous arrays to one .safetensors file. OSError where that fails; not atomic by itself."""
    if not all(x.flags.c_contiguous for x in arrays.values()):
        raise ValueError("the writer reads raw memory, so every array must be contiguous")
    crcs = {name: zlib.crc32(x.reshape(-1).view(np.uint8)) for name, x in arrays.items()}
    try:
        # transformers refuses files without the format.
        save_file(arrays, file, metadata={"format": "pt", "crc32": json.dumps(crcs)})
        _order(file)
    except SafetensorError as e:
        raise OSError(f"{file.name}: {e}") from None


def _order(file: Path) -> None:
    """Orders the metadata of a file, which the package writes in random order: equal tensors make equal files."""
    with open(file, "r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise OSError(f"{file.name}: the header does not fit its place")
        f.seek(8)
        f.write(text.ljust(length))


def is_weight_file(name: str) -> bool:
    """True for the names that `write_tensors` writes, so that a save can remove an earlier, longer set of shards."""
    return name in (SINGLE, INDEX) or (name.startswith("model-") and name.endswith(".safetensors"))
