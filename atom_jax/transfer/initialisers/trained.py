"""Which rows of a table were trained at all (Land and Bartolo, 2024, "Fishing for Magikarp"; as mergekit has it)."""

from __future__ import annotations

import numpy as np


def trained(table: np.ndarray, unused: np.ndarray, quantile: float = 0.01) -> np.ndarray:
    """bool [v]: rows of a table f32 [v, n, d] that look trained.

    Others are those `unused`, i64 [u]; where the output has a plane of its own, inputs among the shortest, a share of
    `quantile`; and rows of either plane that resemble the mean of the unused ones: with a cosine above 0.5 and among
    the greatest.
    """
    good = np.ones(len(table), bool)
    good[unused] = False
    if table.shape[1] > 1:
        lengths = np.linalg.norm(table[:, 0], axis=1)
        good &= lengths >= np.quantile(lengths, quantile)
    for plane in range(table.shape[1] if len(unused) else 0):
        mean = table[unused, plane].mean(0)
        lengths = np.linalg.norm(table[:, plane], axis=1) * np.linalg.norm(mean)
        cosine = table[:, plane] @ mean / np.maximum(lengths, 1e-8)
        good &= cosine <= max(np.quantile(cosine, 1 - quantile), 0.5)
    return good
