"""H-Net's router against the official modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.chunking.rules import cosine
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.types import Seen
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError

DEFAULT = Cosine()


@pytest.fixture(scope="module")
def official(golden):
    return load_file(golden / "hnet" / "modules.safetensors")


def tokens_of(mask):
    return Tokens(np.where(mask, np.arange(mask.shape[1])[None], 0).astype(np.int32), mask.astype(np.int32))


@functools.partial(jax.jit, static_argnames="cfg")
def route(p, h, tokens, cfg=DEFAULT):
    return cosine.apply(p, Seen(h, tokens), cosine.init_state(cfg, h.shape[-1], h.shape[0]), cfg=cfg)[0]


def given(official):
    """The perturbed matrices; the official ones are [out, in]."""
    return {"q": official["q_proj"].T, "k": official["k_proj"].T}


def test_given_matrices(official):
    mask = official["mask"]
    out = route(given(official), official["hidden"], tokens_of(mask))
    np.testing.assert_allclose(out.p[mask], official["boundary_prob"][..., 1][mask], atol=1e-6)
    np.testing.assert_array_equal(out.mark, official["boundary_mask"])


def test_identity_at_the_start(official):
    mask = official["mask"]
    p = params.init(jax.random.key(0), cosine.spec(Cosine(), official["hidden"].shape[-1]))
    out = route(p, official["hidden"], tokens_of(mask))
    np.testing.assert_allclose(out.p[mask], official["identity_boundary_prob"][..., 1][mask], atol=1e-6)
    np.testing.assert_array_equal(out.mark, official["identity_boundary_mask"])


@pytest.mark.parametrize("target", [3, 6])
def test_ratio_loss_over_padding_too(official, target):
    cfg = Cosine(target=target, weight=1.0, official_padding=True)
    out = route(given(official), official["hidden"], tokens_of(official["mask"]), cfg)
    np.testing.assert_allclose(out.loss, official[f"ratio_loss_N{target}"], rtol=1e-6)
    cfg = Cosine(target=target, weight=0.5)
    masked = route(given(official), official["hidden"], tokens_of(official["mask"]), cfg)
    f = official["boundary_mask"][official["mask"]].mean()
    g = official["boundary_prob"][..., 1][official["mask"]].mean()
    expected = 0.5 * target / (target - 1) * ((target - 1) * f * g + (1 - f) * (1 - g))
    np.testing.assert_allclose(masked.loss, expected, rtol=1e-6)


def test_packed(official):
    """Three documents in one row, the first states of which have no predecessor."""
    mask, ends = official["mask"], official["packed_cu_seqlens"]
    h = official["hidden"][mask][None]
    lengths = np.diff(ends)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    segments = np.repeat(np.arange(1, 4), lengths)[None].astype(np.int32)
    out = route(given(official), h, Tokens(positions, segments))
    np.testing.assert_array_equal(out.mark[0], official["packed_boundary_mask"])
    np.testing.assert_allclose(out.p[0], official["boundary_prob"][..., 1][mask], atol=1e-6)


def test_bfloat16_states_are_routed_in_float32(official):
    h = jnp.asarray(official["hidden"], jnp.bfloat16)
    p = given(official)
    low, high = (route(p, x, tokens_of(official["mask"])) for x in (h, h.astype(jnp.float32)))
    assert low.p.dtype == jnp.float32
    np.testing.assert_array_equal(low.p, high.p)


def test_target_of_one_is_refused():
    with pytest.raises(AtomError, match="target: expected more than 1"):
        Cosine(target=1.0)
