"""A linear recurrence as products with triangular matrices.

Within a block of chunks y = L x, with L_ij = a_{j+1} ... a_i for j <= i, after a_0 times the last y of the block
before has been added to x_0. L is the scan of the identity matrix in log2(BLOCK) steps of products, so that zeros
(where y starts anew) and tiny factors are exact; L x runs on the matrix unit. Factors lie along lanes, because a
column of them would take 128 times its size in memory: what is built is the transpose of L.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 128
# Features per block: a step keeps 2 * BLOCK * WIDTH * (4 + 4) bytes of inputs and outputs in VMEM.
WIDTH = 1024


def _triangle(a_1i: jax.Array, reverse: bool) -> jax.Array:
    """[j, i]: the transpose of L, or of the same for a recurrence that runs backwards."""
    n = a_1i.shape[1]
    row = jax.lax.broadcasted_iota(jnp.int32, (n, n), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (n, n), 1)
    product = jnp.broadcast_to(a_1i, (n, n))
    total = jnp.where(row == column, 1.0, 0.0)
    step = 1
    while step < n:
        shift, enters = (n - step, column < n - step) if reverse else (step, column >= step)
        total = total + jnp.where(enters, product * pltpu.roll(total, shift, 1), 0.0)
        product = product * jnp.where(enters, pltpu.roll(product, shift, 1), 1.0)
        step *= 2
    return total


def _block(a_ref, x_ref, y_ref, carry_ref, *, reverse):
    @pl.when(pl.program_id(2) == 0)
    def _():
        carry_ref[...] = jnp.zeros_like(carry_ref)

    a_1i, x = a_ref[...], x_ref[...]
    first = BLOCK - 1 if reverse else 0
    enters = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) == first
    x = jnp.where(enters, x + a_1i[:, first : first + 1] * carry_ref[...], x)
    y = jax.lax.dot_general(
        _triangle(a_1i, reverse), x, (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
    )  # fmt: skip
    y_ref[...] = y
    carry_ref[...] = y[:1] if reverse else y[-1:]


def linear_scan(a_b1m: jax.Array, x_bmd: jax.Array, reverse: bool, interpret: Any = False) -> jax.Array:
    """`ref.linear_scan` for factors [b, 1, m]; m is a multiple of BLOCK, d of 128."""
    b, m, d = x_bmd.shape
    blocks = m // BLOCK
    width = next(w for w in range(min(d, WIDTH), 0, -128) if d % w == 0)

    def at(k: jax.Array) -> jax.Array:
        return blocks - 1 - k if reverse else k

    tile = pl.BlockSpec((None, BLOCK, width), lambda i, j, k: (i, at(k), j))
    return pl.pallas_call(
        functools.partial(_block, reverse=reverse),
        grid=(b, d // width, blocks),
        in_specs=[pl.BlockSpec((None, 1, BLOCK), lambda i, j, k: (i, 0, at(k))), tile],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(x_bmd.shape, jnp.float32),
        scratch_shapes=[pltpu.VMEM((1, width), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * b * m * d * BLOCK, bytes_accessed=8 * b * m * d + 4 * b * m, transcendentals=0
        ),
        interpret=interpret,
        name="chunk_smooth",
    )(a_b1m, x_bmd)
