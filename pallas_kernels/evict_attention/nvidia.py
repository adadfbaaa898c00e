"""What an NVIDIA GPU runs, and cuDNN's fused attention.

cuDNN, through `jax.nn.dot_product_attention`, knows causal and sliding attention of whole sequences. It takes no
segments: the offsets by which it tells documents apart are not to be reached from there (and need the largest number
of documents per row), and a mask is as large as the scores. Its log-sum-exp is rounded to the dtype of the queries.
What it does not take is for jnp, until the Triton kernel has run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Wanted(NamedTuple):
    """What decides: t queries of `size` channels and of a dtype, s keys, and whether keys are evicted, rows hold
    segments, the first query stands elsewhere than the first key, and the log-sum-exp is asked for."""

    t: int
    s: int
    size: int
    dtype: jnp.dtype
    keep: bool
    segments: bool
    offset: bool
    with_lse: bool


def choose(wanted: Wanted) -> str:
    """ "cudnn" where it takes that, else "reference"."""
    return "cudnn" if cudnn_takes(wanted) else "reference"


def cudnn_takes(wanted: Wanted) -> bool:
    """Whether cuDNN computes it; of the lengths and heads that some versions and chips take, those that all do."""
    plain = not (wanted.keep or wanted.segments or wanted.offset or wanted.with_lse)
    fits = wanted.t == wanted.s and wanted.t % 2 == 0 and wanted.size % 8 == 0 and wanted.size <= 128
    return plain and fits and wanted.dtype == jnp.bfloat16


def fused(
    q_bhgtk: jax.Array, k_bhsk: jax.Array, v_bhsk: jax.Array, window: int | None, implementation: str = "cudnn"
) -> jax.Array:
    """Causal attention of a sequence to itself, fewer than `window` places back, [b, h, g, t, k]; `implementation` as
    in `jax.nn.dot_product_attention`."""
    b, h, g, t, k = q_bhgtk.shape
    out = jax.nn.dot_product_attention(
        q_bhgtk.transpose(0, 3, 1, 2, 4).reshape(b, t, h * g, k), k_bhsk.swapaxes(1, 2), v_bhsk.swapaxes(1, 2),
        is_causal=True, local_window_size=None if window is None else (window - 1, 0), implementation=implementation,
    )  # fmt: skip
    return out.reshape(b, t, h, g, k).transpose(0, 2, 3, 1, 4)
