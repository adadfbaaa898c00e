"""Multi-token heads that a few steps have taught a small model's next words."""

import dataclasses
import types

import jax
import optax

from atom_jax import params
from atom_jax.models import mtp
from atom_jax.training.objectives import MultiToken
from atom_jax.training.objectives.base import Setting
from atom_jax.typing import Batch

HEADS = 3


def taught(lm, steps, rate=1e-2):
    """Heads of a model after so many steps of training on random tokens, as its objective has it. Meanwhile
    everything is kept: to train through every cache policy would take far longer to compile."""
    objective = MultiToken(HEADS)
    cfg = dataclasses.replace(lm.config, memory=None)
    setting = Setting(types.SimpleNamespace(model=cfg), None, None)
    begun = params.init(jax.random.key(5), mtp.spec(lm.config.d_model, HEADS, 0))
    optimizer = optax.adam(rate)

    def loss(heads, key):
        ids = jax.random.randint(key, (8, 33), 0, lm.config.vocab_size)
        place = jax.numpy.broadcast_to(jax.numpy.arange(32), (8, 32))
        batch = Batch(ids[:, :-1], place, place * 0 + 1, ids[:, 1:], place >= 0)
        found = objective.loss(lm.params | {mtp.NAME: heads}, batch, None, None, setting=setting)
        return found.objective / found.tokens

    def step(carry, key):
        heads, state = carry
        grads = jax.grad(loss)(heads, key)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(heads, updates), state), None

    if not steps:
        return begun
    keys = jax.random.split(jax.random.key(6), steps)
    return jax.jit(lambda heads: jax.lax.scan(step, (heads, optimizer.init(heads)), keys)[0][0])(begun)
