"""Vision transformer blocks against an official model's numbers, and who sees whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.nn import vit
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError
from tests.nn import timm_vit
from tests.nn.timm_vit import EPS

block = jax.jit(vit.block, static_argnames="eps")


@pytest.fixture(scope="module")
def official(golden):
    """timm's weights and numbers."""
    return load_file(golden / "vision" / "vit.safetensors")


def test_a_vision_transformer_is_timms(official):
    embed, layers = timm_vit.parameters(official)
    x = timm_vit.embed(embed, jnp.asarray(official["image"]).transpose(0, 2, 3, 1))
    x = vit.blocks(layers, x, vit.everywhere(*x.shape[:2]), EPS)
    np.testing.assert_allclose(timm_vit.logits(official, x), official["logits"], atol=1e-5)


@pytest.fixture(scope="module")
def layer():
    p = params.init(jax.random.key(0), vit.block_spec(8, 16, 2))
    return p, jax.random.normal(jax.random.key(1), (2, 5, 8))


def test_a_token_that_stands_for_three_is_three_tokens(layer):
    p, x = layer
    thrice = jnp.concatenate([x, x[:, -1:], x[:, -1:]], axis=1)
    bias = jnp.log(jnp.array([[1.0, 1, 1, 1, 3]] * 2))
    one = block(p, x, vit.everywhere(2, 5), EPS, bias)
    np.testing.assert_allclose(one, block(p, thrice, vit.everywhere(2, 7), EPS)[:, :5], atol=1e-5)


def test_who_sees_whom_follows_positions_and_segments(layer):
    p, x = layer
    tokens = Tokens(jnp.array([[0, 0, 1, 2, 1]] * 2), jnp.array([[1, 1, 1, 1, 0]] * 2))
    before, after = (block(p, x, tokens, EPS) for x in (x, x.at[:, 3:].add(1.0)))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (before[:, 3] != after[:, 3]).any()


def test_patches_and_back():
    image = jax.random.uniform(jax.random.key(0), (2, 4, 6, 3))
    x = vit.patches(image, 2)
    np.testing.assert_array_equal(x[0, 1], image[0, :2, 2:4].reshape(-1))
    np.testing.assert_array_equal(vit.unpatched(x, 2, 4, 6), image)
    with pytest.raises(AtomError, match="patches of 4 x 4 do not fill an image of 4 x 6"):
        vit.patches(image, 4)
    with pytest.raises(AtomError, match="heads: 3 do not divide the width 8"):
        vit.block_spec(8, 16, 3)
