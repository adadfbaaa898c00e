"""Losses between models with different tokenizers against tokenkit's numbers, or ours where it counts twice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.nn import scoring
from atom_jax.transfer import alm
from atom_jax.transfer.alm import ALM, Chunked
from atom_jax.typing import AtomError
from tests.transfer.numbers import array, numbers

NAMES = {
    "binary_ce": "binary", "abs": "absolute", "reverse_binary_kl": "reverse", "binary_kl_temp_limit": "limit",
    "abs_exp": "absolute_exp", "joschu_k2": "k2", "joschu_k3": "k3",
}  # fmt: skip
SIZE = 6


@functools.cache
def ids():
    fixture = numbers("alm_loss")
    out = []
    for side, first in (("teacher", 0), ("student", 2)):
        mask = array(fixture[f"{side}_mask"], bool)
        chunks = np.full(mask.shape, -1, np.int32)
        for row, cells in zip(chunks, fixture["alignments"]):
            for number, cell in enumerate(cells):
                row[cell[first] : cell[first + 1]] = number
        boundary = array(fixture[f"space_mask_{side}"], bool)
        out.append((array(fixture[f"{side}_ids"], int), chunks, mask, boundary))
    return out


def chunked(logits, side):
    tokens, chunks, mask, boundary = ids()[side]
    law = jax.nn.log_softmax(logits, axis=-1)
    logp = jnp.take_along_axis(jnp.roll(law, 1, axis=1), tokens[..., None], axis=2)[..., 0]
    return Chunked(logp, jnp.asarray(chunks), jnp.asarray(mask), jax.nn.logsumexp(law[..., boundary], axis=-1))


@functools.cache
def graded(how):
    teacher = chunked(array(numbers("alm_loss")["teacher_logits"], np.float32), 0)

    def mean(logits):
        total, number = alm.loss(teacher, chunked(logits, 1), how, SIZE)
        return total / number

    value, gradient = jax.value_and_grad(mean)(array(numbers("alm_loss")["student_logits"], np.float32))
    return float(value), np.asarray(gradient)


ROWS = [row for row in numbers("alm_loss")["alm"] if "merge" not in row["mode"] or "ours" in row]


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_losses(row):
    row = ROWS[row]
    merge = row["threshold"] if "merge" in row["mode"] else None
    how = ALM(NAMES[row["diff_fn"]], row["temp"], debias="append_space" in row["mode"], merge=merge)
    value, gradient = graded(how)
    assert value == pytest.approx(row.get("ours", row["loss"]), rel=2e-4)
    if merge is None or row["threshold"] == 0.1:
        assert np.linalg.norm(gradient) == pytest.approx(row["grad_norm"], rel=2e-3)


def test_the_next_token():
    fixture = numbers("alm_loss")
    tokens, _, mask, _ = ids()[1]
    logits, targets = jnp.asarray(array(fixture["student_logits"], np.float32)), np.roll(tokens, -1, axis=1)
    nats = scoring.score(lambda x_btv: x_btv, logits, jnp.asarray(targets))["nats"]
    assert float(np.mean(np.asarray(nats)[:, :-1], where=mask[:, 1:])) == pytest.approx(fixture["sft"], rel=1e-6)


@pytest.mark.parametrize("row", range(4))
def test_states_where_chunks_end(row):
    fixture = numbers("alm_loss")
    row = fixture["latents"][row]
    states = [jnp.asarray(array(fixture[f"{side}_hidden"], np.float32)) for side in ("teacher", "student")]
    chunks = tuple(jnp.asarray(side[1]) for side in ids())
    total, number = alm.latent(*states, chunks, SIZE, int(row["norm"][1]), "channelwise" in row["norm"])
    assert number == sum(map(len, fixture["alignments"]))
    assert float(total / number) == pytest.approx(row["loss"], rel=1e-5)


def test_gradients_that_are_balanced():
    fixture = numbers("gradmag")
    gradients = [{k: array(v[i]) for k, v in fixture["grads"].items()} for i in range(3)]
    norms = [np.sqrt(sum(np.square(x).sum() for x in g.values())) for g in gradients]
    np.testing.assert_allclose(norms, fixture["norms"], rtol=1e-7)
    factors = np.asarray(alm.factors(jnp.asarray(norms, jnp.float32)))
    np.testing.assert_allclose(factors, np.array(fixture["inv"]) / sum(fixture["inv"]), rtol=1e-6)
    for name, expected in fixture["gradmag"].items():
        found = sum(factor * gradient[name] for factor, gradient in zip(factors, gradients))
        np.testing.assert_allclose(found, array(expected).sum(0) / sum(fixture["inv"]), rtol=1e-5)
    assert alm.factors(jnp.array([0.0, 3.0])).tolist() == [0, 1] and alm.factors(jnp.zeros(2)).tolist() == [0, 0]


def test_what_is_left_out_has_no_gradient():
    tokens, chunks, mask, _ = ids()[1]
    teacher = chunked(array(numbers("alm_loss")["teacher_logits"], np.float32), 0)
    teacher = teacher.replace(counts=teacher.counts.at[1].set(False))

    def total(logp):
        student = Chunked(logp, jnp.asarray(chunks), jnp.asarray(mask), jnp.full(logp.shape, -jnp.inf))
        return alm.loss(teacher, student, ALM(), SIZE)[0]

    gradient = np.asarray(jax.grad(total)(jnp.full(tokens.shape, -2.0)))
    assert np.isfinite(gradient).all() and not gradient[1].any() and not gradient[0, 0].any()
    with pytest.raises(AtomError, match="need the log-probabilities of boundaries"):
        alm.loss(teacher.replace(ends=None), teacher, ALM(), SIZE)
    with pytest.raises(AtomError, match="divergence: expected one of binary"):
        ALM("best")
