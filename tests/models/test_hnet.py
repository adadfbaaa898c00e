"""The three tiny H-Nets against the official code's numbers."""

import functools

import jax
import numpy as np
import pytest

from atom_jax.checkpoint import families
from atom_jax.kvcache import memory
from atom_jax.models import hnet
from atom_jax.training import losses
from atom_jax.typing import Batch
from tests.models.tiny_hnets import NAMES, Case


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return Case(request.param)


@functools.partial(jax.jit, static_argnames="cfg")
def run(p, batch, cache=None, *, cfg):
    return hnet.apply(p, batch, cfg=cfg, cache=cache)


def in_bytes(case, s, name):
    """What the official code says of the positions of stage s, at the bytes that these positions stand for."""
    values = case.numbers[f"stage{s}.{name}"]
    values = values[..., 1] if values.ndim == 3 else values
    for outer in reversed(range(s)):
        marks = case.numbers[f"stage{outer}.boundary_mask"]
        spread = np.zeros(marks.shape, values.dtype)
        for row, mark, value in zip(spread, marks, values):
            row[mark] = value[: mark.sum()]
        values = spread
    return values


def test_logits_and_boundaries_equal_the_official_ones(case):
    out, _ = run(case.params, case.batch, cfg=case.cfg)
    np.testing.assert_allclose(np.asarray(out.logits)[case.mask], case.numbers["logits"][case.mask], atol=1e-5)
    assert len(out.aux["boundaries"]) == case.cfg.stages - 1 and out.aux["lost"] == 0
    units = case.mask
    for s, (mark, p) in enumerate(zip(out.aux["boundaries"], out.aux["boundary_probs"])):
        marks = in_bytes(case, s, "boundary_mask") & case.mask
        np.testing.assert_array_equal(mark, marks)
        np.testing.assert_allclose(np.asarray(p)[units], in_bytes(case, s, "boundary_prob")[units], atol=1e-5)
        sums = out.aux["metrics"][f"bytes_per_unit_{s}"]
        np.testing.assert_allclose(sums, [case.mask.sum(), marks.sum()])
        units = marks


def test_loss_and_gradients_equal_the_official_ones(case):
    cfg, ids = case.official(), case.ids
    batch = case.batch.replace(targets=np.roll(ids, -1, axis=1), loss_mask=np.roll(case.mask, -1, axis=1))
    batch.loss_mask[:, -1] = False
    lengths = np.ones(256, np.int32)

    def loss(p):
        sums = losses.next_token(p, batch, cfg=cfg, lengths=lengths)
        return sums.objective / sums.tokens, sums.nats / sums.tokens

    (value, ce), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    np.testing.assert_allclose(ce, case.numbers["ce"], rtol=1e-6)
    np.testing.assert_allclose(value, case.numbers["loss"], rtol=1e-6)
    # Gradients have the shapes of parameters, so they have published names too.
    found = families.ExportSource(cfg, grads)
    names = [k.removeprefix("g.") for k in case.numbers if k.startswith("g.")]
    assert sorted(names) == sorted(found.infos)
    for name in names:
        official = case.numbers[f"g.{name}"]
        np.testing.assert_allclose(found.read(name), official, atol=2e-4 * np.abs(official).max(), err_msg=name)


def test_documents_packed_in_one_row_equal_the_official_packed_mode(case):
    row = case.ids[case.mask][None]
    positions = np.concatenate([np.arange(n) for n in case.lengths])[None].astype(np.int32)
    segments = np.repeat(np.arange(1, 4), case.lengths)[None].astype(np.int32)
    out, _ = run(case.params, Batch(row, positions, segments), cfg=case.cfg)
    np.testing.assert_allclose(out.logits[0], case.numbers["packed_logits"], atol=1e-5)


@pytest.mark.parametrize("unroll", [False, True])
def test_prompts_and_steps_equal_the_official_ones(case, unroll):
    """A ragged batch: three prompts of different lengths, and rows that end at different steps."""
    read = np.array([case.numbers["step_prefill_len"].item(), 12, 5])
    found = np.zeros_like(case.numbers["logits"])
    places = np.broadcast_to(np.arange(16, dtype=np.int32), (3, 16))
    prompts = Batch(case.ids[:, :16], places, (places < read[:, None]).astype(np.int32))
    out, cache = run(case.params, prompts, hnet.init_cache(case.cfg, 3, 48), cfg=case.cfg)
    for row, n in enumerate(read):
        found[row, :n] = out.logits[row, :n]
    p = hnet.decode_params(case.params, case.cfg, unroll)
    cache = memory.unstack(cache) if unroll else cache
    fired = []
    while (live := read < case.lengths).any():
        ids = np.take_along_axis(case.ids, np.minimum(read, 44)[:, None], axis=1)
        batch = Batch(np.where(live[:, None], ids, 7), read[:, None].astype(np.int32), live[:, None].astype(np.int32))
        out, cache = run(p, batch, cache, cfg=case.cfg)
        found[live, read[live]] = np.asarray(out.logits)[live, 0]
        fired.append([bool(mark[0, 0]) for mark in out.aux["boundaries"]])
        read = read + live
    np.testing.assert_array_equal(cache.length, case.lengths)
    np.testing.assert_allclose(found[case.mask], case.numbers["logits"][case.mask], atol=1e-5)
    np.testing.assert_allclose(found[0], case.numbers["step_logits"], atol=1e-5)
    np.testing.assert_array_equal(fired[: len(case.numbers["step_fired"])], case.numbers["step_fired"] == 1)
