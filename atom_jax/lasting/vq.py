"""Product quantisation (Jegou et al., 2011) of keys and values: every 8 channels are a byte, the number of one of 256
codes, which k-means finds among the first entries of every layer and head.

MEMORY-VQ (Zemlyanskiy et al., 2023) trains a VQ-VAE with the model that reads it; here nothing is trained, and codes
never change once they are found.
"""

from __future__ import annotations

import numpy as np

# Channels of a group, codes of a byte, and how often k-means goes over all entries.
GROUP, CODES, ROUNDS = 8, 256, 8
# Rows whose distances exist at once.
_ROWS = 4096


def width(size: int) -> int:
    """Bytes of an entry with so many channels."""
    return -(-size // GROUP)


def fit(x_lhnk: np.ndarray) -> np.ndarray:
    """Codes float16 [l, h, g, 256, 8] of entries [l, h, n, k]. Where n rows of a group are no more than 256 different
    ones, these are the codes, and encoding loses nothing."""
    x_lhgnc = _groups(x_lhnk)
    found = np.zeros((*x_lhgnc.shape[:3], CODES, GROUP), np.float16)
    for at in np.ndindex(*x_lhgnc.shape[:3]):
        codes = k_means(x_lhgnc[at])
        found[at][: len(codes)] = codes
    return found


def encode(x_lhnk: np.ndarray, codes_lhgmc: np.ndarray) -> np.ndarray:
    """The nearest code of every group, uint8 [l, h, n, g]."""
    x_lhgnc = _groups(x_lhnk)
    found = np.zeros(x_lhgnc.shape[:4], np.uint8)
    for at in np.ndindex(*x_lhgnc.shape[:3]):
        found[at] = nearest(x_lhgnc[at], codes_lhgmc[at].astype(np.float64))
    return np.ascontiguousarray(found.swapaxes(2, 3))


def decode(bytes_lhng: np.ndarray, codes_lhgmc: np.ndarray, size: int) -> np.ndarray:
    """float16 [l, h, n, size], what `encode` was given as its codes have it."""
    index = bytes_lhng.swapaxes(2, 3).astype(np.int64)[..., None]
    found_lhngc = np.take_along_axis(codes_lhgmc, index, axis=3).swapaxes(2, 3)
    channels = bytes_lhng.shape[3] * GROUP
    return np.ascontiguousarray(found_lhngc.reshape(*bytes_lhng.shape[:3], channels)[..., :size])


def k_means(rows_nc: np.ndarray) -> np.ndarray:
    """At most 256 means f64 [m, c] of rows (Lloyd, 1982), from rows drawn with a fixed seed; a mean that has lost all
    rows stays where it was."""
    distinct = np.unique(rows_nc, axis=0)
    if len(distinct) <= CODES:
        return distinct
    means = distinct[np.random.default_rng(0).choice(len(distinct), CODES, replace=False)]
    for _ in range(ROUNDS):
        mine = nearest(rows_nc, means)
        count = np.bincount(mine, minlength=CODES)
        total = np.stack([np.bincount(mine, column, CODES) for column in rows_nc.T], axis=1)
        means = np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], means)
    return means


def nearest(rows_nc: np.ndarray, codes_mc: np.ndarray) -> np.ndarray:
    """i64 [n], the number of the nearest code, of equal ones the first. Both f64, where products of float16 numbers
    are exact: a code is its own nearest."""
    norm_m = (codes_mc**2).sum(1)
    parts = [rows_nc[at : at + _ROWS] for at in range(0, len(rows_nc), _ROWS)]
    return np.concatenate([np.zeros(0, np.int64), *((norm_m - 2 * part @ codes_mc.T).argmin(1) for part in parts)])


def _groups(x_lhnk: np.ndarray) -> np.ndarray:
    """f64 [l, h, g, n, 8], the last group filled with zeros."""
    layers, heads, n, size = x_lhnk.shape
    padded = np.pad(x_lhnk, [(0, 0)] * 3 + [(0, width(size) * GROUP - size)]).astype(np.float64)
    return padded.reshape(layers, heads, n, width(size), GROUP).swapaxes(2, 3)
