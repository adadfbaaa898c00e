"""What a model has to beat: bits per byte of a compressor and of counting, given the training text."""

from __future__ import annotations

import lzma

import numpy as np


def xz_bits_per_byte(train: bytes, text: bytes) -> float:
    """Returns the bits per byte that `text` adds to an xz archive (preset 9 extreme) when it follows `train`.

    The dictionary holds both, so that the whole of `train` can be referred to. `text` must not be empty.
    """
    return 8 * (_xz_size(train + text) - _xz_size(train)) / len(text)


def _xz_size(data: bytes) -> int:
    dictionary = max(1 << 16, len(data))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters))


def ngram_bits_per_byte(train: bytes, text: bytes, order: int = 5) -> float:
    """Returns the bits per byte of `text` under counts of the `order` bytes before each byte of `train`.

    Interpolated modified Kneser-Ney (Chen and Goodman 1999): a count is lowered by a discount, and what that
    frees goes to the context without its first byte, down to the uniform 1/256; below the full order, counts
    are of the different bytes in front. Nothing is learned from `text`, whose first bytes have shorter
    contexts. order is 0 to 6. Neither text may be empty.
    """
    return float(-np.log2(ngram_probabilities(train, text, order)).mean())


def ngram_probabilities(train: bytes, text: bytes, order: int) -> np.ndarray:
    """Returns f64 [len(text)], the probability that `ngram_bits_per_byte` gives every byte of `text`."""
    probability = np.full(len(text), 1 / 256)
    for k in range(min(order + 1, len(train), len(text))):
        if k == order or len(train) == k + 1:
            grams, counts = np.unique(_grams(train, k), return_counts=True)
        else:
            longer = np.unique(_grams(train, k + 1))
            grams, counts = np.unique(longer & np.uint64((1 << 8 * (k + 1)) - 1), return_counts=True)
        discount = _discounts(counts)[np.minimum(counts, 3)]
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        total = np.add.reduceat(counts, first)
        freed = np.add.reduceat(discount, first)

        asked = _grams(text, k)
        own = _look_up(grams, counts - discount, asked)
        context = asked >> np.uint64(8)
        n, rest = _look_up(contexts, total, context), _look_up(contexts, freed, context)
        lower = probability[k:]
        # A context that never occurred leaves the shorter one's answer.
        probability[k:] = np.where(n > 0, (own + rest * lower) / np.maximum(n, 1), lower)
    return probability


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns f64 [4], what to take off a count of 0, 1, 2, and 3 or more, from how often each occurs."""
    n = np.bincount(np.minimum(counts, 5), minlength=5).astype(np.float64)
    y = n[1] / max(n[1] + 2 * n[2], 1)
    raw = [i - (i + 1) * y * n[i + 1] / max(n[i], 1) for i in (1, 2, 3)]
    return np.array([0.0, *np.clip(raw, 0.1, (1, 2, 3))])  # the estimate is unreliable when little was counted


def _grams(data: bytes, k: int) -> np.ndarray:
    """Returns u64 [len(data) - k], every k + 1 consecutive bytes as one number, the earliest byte highest."""
    x = np.frombuffer(data, np.uint8).astype(np.uint64)
    n = len(x) - k
    out = np.zeros(max(n, 0), np.uint64)
    for i in range(k + 1):
        out = out << np.uint64(8) | x[i : i + n]
    return out


def _look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Returns values[keys == asked], 0 where a key is missing; keys are sorted."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
