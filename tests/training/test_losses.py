import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from atom_jax import params as params_lib
from atom_jax.models import transformer
from atom_jax.nn import scoring
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.training import losses, program
from atom_jax.training.objectives import NextToken
from atom_jax.typing import AtomError, Batch
from tests.training.tiny import batches, make


@pytest.fixture(scope="module")
def setting():
    exp = make()
    params = params_lib.init(jax.random.key(0), transformer.spec(exp.model))
    batch = Batch(**jax.tree.map(jnp.asarray, batches(exp, 1)[0]))
    loss = functools.partial(
        losses.next_token, cfg=exp.model, lengths=losses.byte_lengths(ByteTokenizer(), exp.model.vocab_size)
    )
    return exp.model, params, batch, loss


def test_sums_equal_optax(setting):
    cfg, params, batch, loss = setting
    logits = transformer.apply(params, batch, cfg=cfg)[0].logits
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    mask = batch.loss_mask
    sums = loss(params, batch, z_loss=0.01)
    np.testing.assert_allclose(sums.nats, jnp.sum(each * mask), rtol=1e-5)
    np.testing.assert_allclose(sums.objective, jnp.sum((each + 0.01 * log_z**2) * mask), rtol=1e-5)
    assert sums.tokens == mask.sum() == sums.bytes


def test_focus_weighs_targets_by_what_is_not_known(setting):
    cfg, params, batch, loss = setting

    def weighed(p):
        logits = transformer.apply(p, batch, cfg=cfg)[0].logits
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        hard = (1 - jax.lax.stop_gradient(jnp.exp(-each))) ** 1.5
        return jnp.sum(hard * each * batch.loss_mask)

    mine = jax.value_and_grad(lambda p: loss(p, batch, focus=1.5).objective)(params)
    chex.assert_trees_all_close(mine, jax.value_and_grad(weighed)(params), rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(loss(params, batch, focus=1.5).nats, loss(params, batch).nats)


def test_weights_of_targets(setting):
    cfg, params, batch, loss = setting
    weights = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.2, batch.ids.shape), 20.0, 1.0)
    weighted, alike = batch.replace(loss_weights=weights), batch.replace(loss_weights=jnp.full_like(weights, 3.0))
    logits = transformer.apply(params, batch, cfg=cfg)[0].logits
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    mean = jnp.average(each, weights=weights * batch.loss_mask)
    sums, plain = loss(params, weighted), loss(params, batch)
    np.testing.assert_allclose(sums.objective / sums.tokens, mean, rtol=1e-5)
    assert sums.nats == plain.nats and sums.tokens == plain.tokens and sums.bytes == plain.bytes
    np.testing.assert_allclose(loss(params, alike).objective, plain.objective, rtol=1e-6)
    # Parts of a batch add up, whatever the weights in them.
    parts = [jax.tree.map(lambda x, i=i: x[i::2], weighted) for i in range(2)]
    per_target = losses.weight_per_target(weighted)
    total = sum(loss(params, part, per_target=per_target).objective for part in parts)
    np.testing.assert_allclose(total, sums.objective, rtol=1e-5)


def test_objectives_that_know_no_weights_are_refused(monkeypatch):
    exp = make("data.sources=facts:austen:size=1000:facts=1:gap=0")
    program.check(exp)
    monkeypatch.setattr(NextToken, "weighs", False)
    with pytest.raises(AtomError, match="facts: weighs targets, which next_token does not know"):
        program.check(exp)


def test_blocks_change_nothing(setting):
    _, params, batch, loss = setting
    run = lambda block: jax.value_and_grad(lambda p: loss(p, batch, z_loss=0.01, block=block).objective)(params)  # noqa: E731
    whole, cut = run(None), run(5)
    chex.assert_trees_all_close(whole, cut, rtol=2e-4, atol=2e-5)


def test_blocks_never_hold_all_logits(setting):
    cfg, params, batch, loss = setting
    b, t = batch.ids.shape
    text = str(jax.make_jaxpr(jax.grad(lambda p: loss(p, batch, block=8).objective))(params))
    assert f"f32[{b},8,{cfg.vocab_size}]" in text
    assert f"[{b},{t},{cfg.vocab_size}]" not in text
    # Stacked residuals of the scan would be all logits again.
    assert f"[{t // 8},{b},8,{cfg.vocab_size}]" not in text


def test_large_vocabularies_are_cut_into_blocks():
    assert scoring.positions_per_block(16, 256, 264) == 256
    block = scoring.positions_per_block(8, 4096, 151936)
    assert 8 * block * 151936 <= scoring.LIMIT < 8 * (block + 1) * 151936


def test_special_tokens_have_no_bytes():
    lengths = losses.byte_lengths(ByteTokenizer(), 270)
    assert lengths.dtype == np.int32 and lengths.shape == (270,)
    assert (lengths[:256] == 1).all() and (lengths[256:] == 0).all()


def test_masked_targets_do_not_count(setting):
    _, params, batch, loss = setting
    changed = batch.replace(targets=jnp.where(batch.loss_mask, batch.targets, 3))
    chex.assert_trees_all_equal(loss(params, batch), loss(params, changed))
