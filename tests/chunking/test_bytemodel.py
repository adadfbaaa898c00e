"""The entropy model: its windowed attention against the masked one, and memory that does not grow with length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params
from atom_jax.chunking import bytemodel
from atom_jax.chunking.bytemodel import ByteModel
from atom_jax.nn.attention import Tokens, attend


@pytest.mark.parametrize("t", [1, 3, 5, 12])
def test_windowed_attention_equals_a_mask(t):
    b, h, w, k = 2, 2, 4, 8
    rng = np.random.default_rng(t)
    q = rng.normal(size=(b, h, t, k)).astype(np.float32)
    key, value = rng.normal(size=(2, b, h, w + t, k)).astype(np.float32)
    positions = np.tile(np.arange(w + t, dtype=np.int32), (b, 1))
    # The second row's first two remembered keys belong to nobody, and a new document begins in the first.
    segments = np.ones_like(positions)
    segments[1, :2] = -1
    segments[0, w + t // 2 :] = 2
    where = Tokens(positions[:, w:], segments[:, w:])
    found = jax.jit(bytemodel.windowed, static_argnums=5)(q, key, value, where, Tokens(positions, segments), w)
    expected = attend(q[:, :, None], key, value, where, Tokens(positions, segments), window=w)[:, :, 0]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_array_grows_with_the_square_of_the_length():
    cfg, t = ByteModel(d_model=16, n_layers=2, n_heads=2, d_ff=16, window=8), 512
    p = jax.eval_shape(lambda: params.init(jax.random.key(0), bytemodel.spec(cfg)))
    tokens = Tokens(*(jax.ShapeDtypeStruct((1, t), jnp.int32) for _ in range(2)))
    state = jax.eval_shape(lambda: bytemodel.init_state(cfg, 1))

    def run(p, ids, tokens, state):
        return bytemodel.apply(p, ids, tokens, state, cfg=cfg)

    largest = 0
    pending = [jax.make_jaxpr(run)(p, tokens.positions, tokens, state).jaxpr]
    while pending:
        for eqn in pending.pop().eqns:
            largest = max([largest, *(v.aval.size for v in eqn.outvars)])
            inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=_has_jaxpr)
            pending += [x.jaxpr for x in inner if _has_jaxpr(x)]
    assert 0 < largest <= t * cfg.vocab_size


def _has_jaxpr(x):
    return hasattr(x, "jaxpr")
