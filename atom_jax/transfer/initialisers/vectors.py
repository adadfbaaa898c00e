"""Auxiliary vectors of tokens, made of text: what occurs near what, weighed and reduced to few dimensions (Levy and
Goldberg, 2014, "Neural Word Embedding as Implicit Matrix Factorization")."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import sparse

# Between tokens that occur near each other.
WINDOW = 5
# Pairs that are counted before they are added up.
_PAIRS = 1 << 23


def from_text(tokenizer: Any, texts: Iterable[bytes], *, width: int = 100, least: int = 10) -> np.ndarray:
    """f32 [ids, width]: rows for tokens that occur `least` times, zeros for others.

    Positive pointwise mutual information of tokens at most WINDOW apart, with counts of contexts to the power of
    0.75, and its singular vectors times the roots of the singular values.
    """
    v = tokenizer.vocab_size
    counts, pairs, waiting = np.zeros(v, np.int64), sparse.csr_matrix((v, v), dtype=np.float32), []
    for text in texts:
        ids = np.asarray(tokenizer.encode(text), np.int64)
        counts += np.bincount(ids, minlength=v)
        waiting += [ids[:-gap] * v + ids[gap:] for gap in range(1, WINDOW + 1)]
        if sum(map(len, waiting)) > _PAIRS:
            pairs, waiting = pairs + _counted(waiting, v), []
    if waiting:
        pairs = pairs + _counted(waiting, v)
    known = np.flatnonzero(counts >= least)
    out = np.zeros((v, width), np.float32)
    near = (pairs + pairs.T).tocsr()[known][:, known].tocoo()
    if not near.nnz:
        return out
    rows, columns = np.asarray(near.sum(1)).ravel(), np.asarray(near.sum(0)).ravel() ** 0.75
    pmi = np.log(near.data / (rows[near.row] * columns[near.col]) * columns.sum())
    positive = sparse.csr_matrix((np.maximum(pmi, 0.0), (near.row, near.col)), near.shape, dtype=np.float32)
    positive.eliminate_zeros()
    found = _singular(positive, min(width, len(known)))
    out[known, : found.shape[1]] = found
    return out


def _counted(keys: list[np.ndarray], v: int) -> sparse.csr_matrix:
    """How often each of the pairs first * v + second occurs."""
    pairs, number = np.unique(np.concatenate(keys), return_counts=True)
    return sparse.csr_matrix((number.astype(np.float32), (pairs // v, pairs % v)), (v, v))


def _singular(matrix: sparse.csr_matrix, width: int) -> np.ndarray:
    """Left singular vectors times the roots of singular values [n, width], by a randomised method with four
    iterations (Halko et al., 2011)."""
    n = matrix.shape[0]
    guess = np.random.default_rng(0).standard_normal((n, min(width + 10, n))).astype(np.float32)
    basis = np.linalg.qr(matrix @ guess)[0]
    for _ in range(4):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, _ = np.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    return ((basis @ u) * np.sqrt(s))[:, :width]
