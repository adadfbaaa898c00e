"""Orthogonal matching pursuit: a token is a sparse combination of shared tokens in the space of a model that has the
target tokenizer, and the same combination in the source's (Goddard and Fernandes Neto, 2025, "Training-Free Tokenizer
Transplantation via Orthogonal Matching Pursuit", 2506.06607)."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.transfer.initialisers.base import BLOCK, Initialiser, Task, blocks, mix_at, planes


@dataclasses.dataclass(frozen=True)
class OMP(Initialiser):
    """Needs `donor`.

    k: most shared tokens in a combination. tolerance: a row is done once what is left of it is this much shorter than
    it was. Picks after that, and beyond the rank of the shared rows, have weight 0; in mergekit they are noise.
    """

    name: ClassVar[str] = "omp"
    label: ClassVar[str] = "interpolated"
    needs: ClassVar[tuple[str, ...]] = ("donor",)
    k: int = 64
    tolerance: float = 1e-5

    def __post_init__(self):
        config.check(self, k=(1, 4096), tolerance=(0, 1))

    def rows(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """See Initialiser."""
        (donor,) = task.need(*self.needs)
        shared, n = task.need_shared(), task.table.shape[1]
        out = np.zeros((len(task.new), *task.table.shape[1:]), np.float32)
        for plane, theirs in enumerate(planes(donor, n)):
            points_ds = jnp.asarray(theirs[shared[:, 0]].T, jnp.float32)
            k, base = min(self.k, *points_ds.shape), task.table[shared[:, 1], plane]
            for part in blocks(len(task.new)):
                x_bd = np.zeros((BLOCK, theirs.shape[1]), np.float32)
                x_bd[: part.stop - part.start] = theirs[task.new[part]]
                index, weight = jax.tree.map(np.asarray, pursue(x_bd, points_ds, k=k, tolerance=self.tolerance))
                size = part.stop - part.start
                out[part, plane] = mix_at(weight[:size], index[:size], base)
        return out, np.ones(len(task.new), bool)


@functools.partial(jax.jit, static_argnames="k")
def pursue(
    x_bd: jax.Array, points_ds: jax.Array, *, k: int, tolerance: float, eps: float = 1e-8
) -> tuple[jax.Array, jax.Array]:
    """k points for each of b vectors and their weights, i32 and float [b, k]: sums of weight times point come close
    to the vectors. Of the points that are left the one with the greatest inner product with what is left of the
    vector is next (points are not normalised; of equal ones the first).

    k: at most the number of points and of dimensions.
    """
    b, d = x_bd.shape
    x_bd = jnp.asarray(x_bd, points_ds.dtype)
    enough_b = tolerance * jnp.linalg.norm(x_bd, axis=1)

    def step(m: jax.Array, state: tuple) -> tuple:
        r_bd, q_bkd, upper_bkk, index_bk, used_bs = state
        live_b = jnp.linalg.norm(r_bd, axis=1) > enough_b
        score_bs = jnp.where(used_bs, -jnp.inf, jnp.abs(r_bd @ points_ds))
        pick_b = jnp.argmax(score_bs, axis=1).astype(jnp.int32)
        point_bd = points_ds[:, pick_b].T
        # Twice, which keeps the basis orthogonal in floats of any size.
        h_bk = jnp.einsum("bkd,bd->bk", q_bkd, point_bd)
        rest_bd = point_bd - jnp.einsum("bk,bkd->bd", h_bk, q_bkd)
        again_bk = jnp.einsum("bkd,bd->bk", q_bkd, rest_bd)
        rest_bd, h_bk = rest_bd - jnp.einsum("bk,bkd->bd", again_bk, q_bkd), h_bk + again_bk
        norm_b = jnp.maximum(jnp.linalg.norm(rest_bd, axis=1), eps)
        q_bd = jnp.where(live_b[:, None], rest_bd / norm_b[:, None], 0.0)
        q_bkd = q_bkd.at[:, m].set(q_bd)
        diagonal_b = jnp.where(live_b, norm_b, 1.0)
        upper_bkk = upper_bkk.at[:, :, m].set(jnp.where(live_b[:, None], h_bk, 0.0)).at[:, m, m].set(diagonal_b)
        r_bd = x_bd - jnp.einsum("bk,bkd->bd", jnp.einsum("bkd,bd->bk", q_bkd, x_bd), q_bkd)
        used_bs = used_bs.at[jnp.arange(b), pick_b].set(True)
        return r_bd, q_bkd, upper_bkk, index_bk.at[:, m].set(pick_b), used_bs

    dtype = points_ds.dtype
    state = (
        x_bd, jnp.zeros((b, k, d), dtype), jnp.zeros((b, k, k), dtype), jnp.zeros((b, k), jnp.int32),
        jnp.zeros((b, points_ds.shape[1]), bool),
    )  # fmt: skip
    _, q_bkd, upper_bkk, index_bk, _ = jax.lax.fori_loop(0, k, step, state)
    along_bk = jnp.einsum("bkd,bd->bk", q_bkd, x_bd)
    weight_bk1 = jax.scipy.linalg.solve_triangular(upper_bkk, along_bk[:, :, None])
    return index_bk, weight_bk1[:, :, 0]
