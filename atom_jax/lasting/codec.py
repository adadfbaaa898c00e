"""How keys and values of a lasting memory are stored: half precision, bytes or signs with their scales, or codes that
the first entries are found to have.

k, v: [l, h, n, k], keys before RoPE and values of n entries. A codec makes named arrays of them and reads these back.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from atom_jax.lasting import vq
from atom_jax.typing import AtomError

# Entries of a page, which share the scales of their keys' channels.
PAGE = 32
_EXPONENT = np.uint16(0x7C00)
Arrays = dict[str, np.ndarray]
# Arrays that say of pages what they are: `index`.
INDEX = frozenset({"mark", "page_crc"})


# All layers, and all heads.
_ALL = (slice(None), slice(None))


class Codec(NamedTuple):
    """encode(k, v) -> arrays, "k" and "v" among them; decode(arrays, (layers, heads)) -> (k, v) float16, of entries
    of these layers and heads (slices; by default all); dtypes: of these arrays, by name; by_page: those whose third
    axis is pages, and not entries; widths: what "k" and "v" have of an entry, by its channels."""

    encode: Callable[[np.ndarray, np.ndarray], Arrays]
    decode: Callable[..., tuple[np.ndarray, np.ndarray]]
    dtypes: dict[str, type]
    by_page: tuple[str, ...] = ()
    widths: Callable[[int], tuple[int, int]] = lambda size: (size, size)

    @property
    def small(self) -> frozenset[str]:
        """Names of arrays beside "k" and "v"."""
        return frozenset(self.dtypes) - {"k", "v"}

    def misfit(self, lhnk: tuple[int, ...], there: Mapping[str, tuple[tuple[int, ...], Any]]) -> str | None:
        """The first of the arrays that `there`, shapes and dtypes by name, lacks or has otherwise than `encode` makes
        them of keys of this shape; None where all are right."""
        *each, size = lhnk
        shapes = {name: (*each, w) for name, w in zip("kv", self.widths(size))}
        paged = (*each[:2], len(page_sizes(each[2])), size)
        shapes |= {name: paged if name in self.by_page else tuple(each) for name in self.small}
        return next((x for x, dtype in self.dtypes.items() if there.get(x) != (shapes[x], np.dtype(dtype))), None)


class Learned(NamedTuple):
    """A codec that is learned once, from entries, and then stays. least: so many are held in blocks by then; until
    then they are float16. fit(k, v) -> what is learned, arrays of one form; codec(what is learned, channels)."""

    least: int
    fit: Callable[[np.ndarray, np.ndarray], Arrays]
    codec: Callable[[Arrays, int], Codec]


def of(name: str, learned: Arrays | None, lhk: tuple[int, int, int], where: str) -> Codec:
    """The codec of this name, with what it has learned, for these layers, heads and channels. AtomError, which begins
    with `where`, for what it can't have learned."""
    found = CODECS[name]
    if isinstance(found, Codec):
        return found
    if learned is None:
        return _FLOAT16
    layers, heads, size = lhk
    like = found.fit(*[np.zeros((layers, heads, 0, size), np.float16)] * 2)
    if {n: (x.shape, x.dtype) for n, x in learned.items()} != {n: (x.shape, x.dtype) for n, x in like.items()}:
        raise AtomError(f"{where}: holds no codes for {layers} layers, {heads} heads and {size} channels")
    return found.codec(learned, size)


def half(x: np.ndarray, what: str = "key or value") -> np.ndarray:
    """The array as float16. AtomError where a number, of a `what`, is too large for that."""
    with np.errstate(over="ignore"):
        small = x.astype(np.float16)
    # Infinity and NaN have all bits of the exponent. NumPy says what is finite ten times more slowly.
    if small.size and (small.view(np.uint16) & _EXPONENT).max() == _EXPONENT:
        raise AtomError(f"a {what} of this model is beyond float16, in which a memory keeps it")
    return small


def _encode_int8(k_lhnk: np.ndarray, v_lhnk: np.ndarray) -> Arrays:
    pages = -(-k_lhnk.shape[2] // PAGE)
    padded = np.pad(k_lhnk, [(0, 0), (0, 0), (0, pages * PAGE - k_lhnk.shape[2]), (0, 0)])
    paged = padded.reshape(*padded.shape[:2], pages, PAGE, padded.shape[3])
    k_scale, v_scale = _scale(paged, 3), _scale(v_lhnk, 3)
    k = _rounded(paged, k_scale).reshape(padded.shape)[:, :, : k_lhnk.shape[2]]
    return {
        "k": np.ascontiguousarray(k), "k_scale": k_scale[:, :, :, 0], "v": _rounded(v_lhnk, v_scale),
        "v_scale": v_scale[..., 0],
    }  # fmt: skip


def _decode_int8(arrays: Arrays, at: Any = _ALL) -> tuple[np.ndarray, np.ndarray]:
    k_scale = np.repeat(arrays["k_scale"], PAGE, axis=2)[:, :, : arrays["k"].shape[2]]
    k = arrays["k"] * k_scale.astype(np.float32)
    v = arrays["v"] * arrays["v_scale"].astype(np.float32)[..., None]
    return half(k), half(v)


def _scale(x: np.ndarray, axis: int) -> np.ndarray:
    """float16 scales with which numbers along an axis fit a byte."""
    largest = np.abs(x.astype(np.float32)).max(axis, keepdims=True)
    scale = np.maximum(largest / 127, np.finfo(np.float16).tiny).astype(np.float16)
    # Rounding down would put the largest beyond a byte.
    return np.where(scale.astype(np.float32) * 127 < largest, np.nextafter(scale, np.float16(np.inf)), scale)


def _rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.rint(x.astype(np.float32) / scale.astype(np.float32)).astype(np.int8)


def _encode_binary(k_lhnk: np.ndarray, v_lhnk: np.ndarray) -> Arrays:
    k, v_scale = half(k_lhnk).astype(np.float32), _scale(v_lhnk, 3)
    return {
        "k": np.packbits(k >= 0, axis=-1), "k_scale": np.abs(k).mean(-1).astype(np.float16),
        "v": _rounded(v_lhnk, v_scale), "v_scale": v_scale[..., 0],
    }  # fmt: skip


def _decode_binary(arrays: Arrays, at: Any = _ALL) -> tuple[np.ndarray, np.ndarray]:
    signs = np.unpackbits(arrays["k"], axis=-1, count=arrays["v"].shape[-1])
    k = np.where(signs, arrays["k_scale"][..., None], -arrays["k_scale"][..., None])
    return k, half(arrays["v"] * arrays["v_scale"].astype(np.float32)[..., None])


def _vq(learned: Arrays, size: int) -> Codec:
    def encode(k: np.ndarray, v: np.ndarray) -> Arrays:
        return {name: vq.encode(half(x), learned[name]) for name, x in zip("kv", (k, v))}

    def decode(arrays: Arrays, at: Any = _ALL) -> tuple[np.ndarray, np.ndarray]:
        k, v = (vq.decode(arrays[name], learned[name][at], size) for name in "kv")
        return k, v

    return Codec(encode, decode, dict.fromkeys("kv", np.uint8), widths=lambda size: (vq.width(size),) * 2)


_FLOAT16 = Codec(
    lambda k, v: {"k": half(k), "v": half(v)}, lambda a, at=_ALL: (a["k"], a["v"]), dict.fromkeys("kv", np.float16)
)
_BYTES = {"k": np.int8, "k_scale": np.float16, "v": np.int8, "v_scale": np.float16}
CODECS: dict[str, Codec | Learned] = {
    "float16": _FLOAT16,
    # The largest of a page's channel (keys) or of an entry (values) is 127.
    "int8": Codec(_encode_int8, _decode_int8, _BYTES, ("k_scale",)),
    # Signs of keys and the mean of what they are signs of, which is the scale that errs least; values as by int8.
    "binary": Codec(_encode_binary, _decode_binary, _BYTES | {"k": np.uint8}, (), lambda size: (-(-size // 8), size)),
    # Codes weigh as much as 256 entries of half precision.
    "vq": Learned(1024, lambda k, v: {"k": vq.fit(k), "v": vq.fit(v)}, _vq),
}


def index(k_lhnk: np.ndarray, arrays: Arrays) -> Arrays:
    """What a file holds of its pages: their mean keys, float16 [l, h, p, k], and the bits of the CRC-32 of each one's
    bytes in "k" and "v", i32 [l, h, p, 2]. k: keys, float16; arrays: as they are stored."""
    return {"mark": marks(k_lhnk), "page_crc": np.stack([_crcs(arrays[name]) for name in "kv"], axis=-1)}


def page_sizes(n: int) -> list[int]:
    """Entries of the pages of n entries; the last one may be short."""
    return [min(PAGE, n - first) for first in range(0, n, PAGE)]


def marks(k_lhnk: np.ndarray) -> np.ndarray:
    """Mean keys of pages, float16 [l, h, p, k]."""
    parts = [k_lhnk[:, :, at : at + PAGE].mean(2, dtype=np.float32) for at in range(0, k_lhnk.shape[2], PAGE)]
    return np.stack(parts, axis=2).astype(np.float16) if parts else k_lhnk.astype(np.float16)


def _crcs(x_lhnk: np.ndarray) -> np.ndarray:
    layers, heads, n, size = x_lhnk.shape
    rows = np.ascontiguousarray(x_lhnk).view(np.uint8).reshape(layers * heads, n, size * x_lhnk.itemsize)
    found = [zlib.crc32(row[at : at + PAGE]) for row in rows for at in range(0, n, PAGE)]
    return np.array(found, np.uint32).view(np.int32).reshape(layers, heads, -1)
