"""A boundary rule from outside the package, registered by one call, with a state, parameters and a loss."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import config
from atom_jax.chunking import rules
from atom_jax.chunking.types import END, Boundary, last_real, previous
from atom_jax.models.hnet.examples import small
from atom_jax.params import ParamSpec, constant, normal
from atom_jax.typing import LM
from tests.training.tiny import batches, make, mesh, program

KIND = END
HAS_P = True


@config.register
@dataclasses.dataclass(frozen=True)
class Step:
    """Ends a unit where a linear map of how far the state has moved is positive. Its loss, `weight` times, is the
    squared distance of the mean probability of a mark from `rate`."""

    rate: float = 0.2
    weight: float = 5.0


def spec(cfg, d):
    return {"w": ParamSpec((d,), (None,), normal(2.0)), "b": ParamSpec((1,), (None,), constant(1.0))}


def init_state(cfg, d, b):
    return jnp.zeros((b, d))


def apply(p, seen, state, *, cfg):
    h_btd, real = seen.h.astype(jnp.float32), seen.tokens.segments > 0
    before = jnp.where((seen.tokens.positions == 0)[..., None], 0.0, previous(h_btd, state))
    logit = (h_btd - before) @ p["w"] + p["b"][0]
    prob = jax.nn.sigmoid(logit)
    mean = jnp.sum(prob * real) / jnp.maximum(real.sum(), 1)
    boundary = Boundary(real & (logit > 0), p=prob, logit=logit, loss=cfg.weight * jnp.square(mean - cfg.rate))
    return boundary, last_real(h_btd, seen.tokens, state)


@pytest.fixture(autouse=True, scope="module")
def registered():
    rules.register(Step, sys.modules[__name__])
    yield
    rules.RULES.pop(Step)


@pytest.fixture(scope="module")
def trained():
    """The metrics of some steps, and the model after them."""
    chunking = {"rule": Step(), "pool": "mean", "mix": "ema", "confidence": True}
    exp = make("train.steps=30", "optim.learning_rate=0.01", model=small(chunking))
    with jax.set_mesh(mesh(exp.mesh)):
        p, seen = program(exp), []
        state = p.initial()
        for batch in batches(exp, 30):
            state, metrics = p.step(state, p.put(batch))
            seen.append(jax.device_get(metrics))
    return exp, seen, LM(exp.model, jax.device_get(state).params, None)


def test_its_loss_is_reported_and_falls(trained):
    exp, seen, _ = trained
    told = [metrics["rule_loss_0"] for metrics in seen]
    assert told[-1] < 0.9 * told[0] and seen[-1]["loss"] < seen[0]["loss"]
    assert config.from_json(type(exp.model), config.to_json(exp.model)) == exp.model


def test_a_conversation(trained):
    lm = dataclasses.replace(trained[2], params=jax.device_put(trained[2].params))
    rng = np.random.default_rng(1)
    # All prompts and conversations are padded to the same length.
    rows = [rng.integers(97, 105, n).tolist() for n in (20, 17)]
    more = [rng.integers(97, 105, n).tolist() for n in (3, 5)]
    (mark,) = atom_jax.apply(lm, [rows[0]]).aux["boundaries"]
    assert 2 < mark.sum() < 18
    how = {"max_new_tokens": 6, "stop_ids": (), "keep_memory": True}
    one = atom_jax.generate(lm, rows, **how)
    two = atom_jax.generate(lm, more, after=one, **how)
    for row in range(2):
        assert atom_jax.generate(lm, 2 * [rows[row]], **how).ids == 2 * [one.ids[row]]
        whole = rows[row] + one.ids[row] + more[row]
        assert atom_jax.generate(lm, 2 * [whole], **how).ids == 2 * [two.ids[row]]
