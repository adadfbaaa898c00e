"""Later turns of models with units of their own: as if all had been read at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.inference import score
from atom_jax.inference.generate import generate
from atom_jax.models import bolmo, hnet
from atom_jax.models.bolmo.config import FUSED
from atom_jax.models.hnet import forward
from atom_jax.session.session import Session
from atom_jax.typing import LM, Batch
from tests.models import tiny_bolmo
from tests.models.tiny_units import MODELS, capacity, stream, weights

FIRST = [stream(n, start).tolist() for n, start in ((9, 0), (1, 30), (14, 11))]
SECOND = [stream(n, start).tolist() for n, start in ((1, 3), (12, 40), (5, 20))]
NEW, LONGEST = 8, 64


def lm_of(name, room=1.0):
    return LM(capacity(MODELS[name], room), weights(MODELS[name]), None)


def likely(lm, rows, new):
    """Whether the last `new` ids of every row are the likeliest after those before, but for near ties."""
    ids, mask = padded(rows)
    logits = np.asarray(atom_jax.apply(lm, ids, mask).logits)
    for row, found in zip(rows, logits):
        at = found[len(row) - new - 1 : len(row) - 1]
        assert (at.max(axis=1) - at[np.arange(new), row[-new:]] < 1e-3).all()


def padded(rows):
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, out in zip(rows, ids):
        out[: len(row)] = row
    return ids, np.arange(ids.shape[1])[None] < np.array([[len(row)] for row in rows])


def two_turns(lm, first, second, **how):
    one = generate(lm, first, NEW, keep_memory=True, **how)
    two = generate(lm, second, NEW, keep_memory=True, after=one, **how)
    return [a + b for a, b in zip(first, one.ids)], two


def test_units_of_a_turn_find_room_whatever_was_expected():
    lm = lm_of("hnet-2", 0.2)
    turn = [stream(40, 7).tolist() for _ in FIRST]
    before, two = two_turns(lm, FIRST, turn)
    likely(lm_of("hnet-2"), [a + b + c for a, b, c in zip(before, turn, two.ids)], NEW)


@pytest.mark.parametrize("name", ["hnet-2", "megabyte"])
def test_rows_that_wait_are_read_to_the_end_first(monkeypatch, name):
    monkeypatch.setattr(forward, "enough", lambda p, cfg, cache: len(cache.length))
    lm = dataclasses.replace(lm_of(name), config=dataclasses.replace(MODELS[name], max_length=333))
    ids, mask = padded(FIRST)
    batch = Batch(ids, np.cumsum(mask, axis=1, dtype=np.int32) - 1, mask.astype(np.int32))
    read, step = (jax.jit(functools.partial(f, cfg=lm.config)) for f in (hnet.hidden, hnet.step))
    _, cache, _ = read(lm.params, batch, cache=hnet.init_cache(lm.config, 3, 64))
    rows, read = [list(row) for row in FIRST], np.zeros(3, bool)
    for token in jnp.stack([stream(20, start) for start in (17, 4, 50)], axis=1):
        # A byte more in every row, until some wait for the others.
        one = Batch(token[:, None], cache.length[:, None], jnp.ones((3, 1), jnp.int32))
        _, cache, ready = step(lm.params, one, cache=cache)
        rows = [[*row, int(byte)] for row, byte in zip(rows, token)]
        if not ready.all():
            break
    assert 0 < int(cache.parts.latest.on.sum()) < 3
    read = np.asarray(ready)
    # Those that do not wait have chosen a further one.
    token = jnp.where(read, 65, token)
    rows = [row + [65] * int(r) for row, r in zip(rows, read)]
    session = Session(lm, lm.params, cache, token, None).extend(SECOND)
    np.testing.assert_array_equal(session.length, [len(a) + len(b) for a, b in zip(rows, SECOND)])
    token = session.logits.argmax(-1)
    likely(lm, [a + b + [int(t)] for a, b, t in zip(rows, SECOND, token)], 1)


@functools.partial(jax.jit, static_argnames="cfg")
def run(p, batch, cache=None, ends=None, *, cfg):
    x, cache, aux = bolmo.hidden(p, batch, cfg=cfg, cache=cache, ends=ends)
    return bolmo.logits(p, x, cfg=cfg), cache, aux["boundaries"][0]


def test_a_text_read_by_a_bolmo_in_pieces_equals_the_whole():
    """Ragged rows, in pieces of different lengths, some of which are empty or end in the text's first byte."""
    lm = tiny_bolmo.model()
    cfg = dataclasses.replace(lm.config, capacity=1.0)
    rows = [tiny_bolmo.ids_of(name)[:40] for name in ("compound", "mixed", "short", "code")]
    whole, _, _ = run(lm.params, tiny_bolmo.batch(rows), cfg=cfg)
    p = lm.params | jax.tree.map(jnp.asarray, {"suffix": lm.tokenizer.tables})
    taken, found = np.zeros(4, int), [[] for _ in rows]
    cache = bolmo.init_cache(cfg, 4, 128)
    for t, wanted in ((16, (16, 9, 1, 5)), (8, (1, 8, 0, 8)), (1, (1, 1, 1, 1)), (32, (32, 32, 32, 32))):
        real = np.minimum(wanted, [len(row) - n for row, n in zip(rows, taken)])
        batch = tiny_bolmo.batch([row[n : n + k] for row, n, k in zip(rows, taken, real)])
        places = taken[:, None] + np.arange(t, dtype=np.int32)[None]
        logits, cache, _ = run(p, Batch(batch.ids[:, :t], places, batch.segments[:, :t]), cache, cfg=cfg)
        for i, k in enumerate(real):
            found[i].extend(np.asarray(logits[i, :k]))
        taken += real
        np.testing.assert_array_equal(cache.length, taken)
        assert bool(cache.parts.latest.undecided.all())
    for row, mine, full in zip(rows, found, whole):
        assert len(mine) == len(row)
        # Those from before each byte.
        np.testing.assert_allclose(np.array(mine[1:]), full[: len(row) - 1], atol=2e-4)


def ends_of(lm, parts):
    """Where patches end in texts that were given and made by turns, the given ones first: what the predictor says of
    given bytes, what the ids say of others, and of the last given ones what the decoder finds likelier."""
    ids = np.concatenate(parts)
    plain = np.concatenate([np.asarray(part) % FUSED for part in parts])
    ends = np.asarray(atom_jax.apply(lm, *longer(plain)).aux["boundaries"][0][0, : len(plain)]).copy()
    at = 0
    for i, part in enumerate(parts):
        here = slice(at, at + len(part))
        if i % 2:
            ends[here] = ids[here] >= FUSED
        at += len(part)
        if i % 2 == 0:
            logits = logits_of(lm, plain, ends)[at - 2]
            ends[at - 1] = at == 1 or logits[plain[at - 1] + FUSED] > logits[plain[at - 1]]
    return plain, ends


def logits_of(lm, ids, ends):
    cfg = dataclasses.replace(lm.config, capacity=1.0)
    return np.asarray(run(lm.params, score.to_batch(lm, *longer(ids)), ends=longer(ends)[0], cfg=cfg)[0][0])


def longer(row):
    """A row as a batch of a length that all have, and where it is real."""
    return np.pad(row, (0, LONGEST - len(row)))[None], np.arange(LONGEST)[None] < len(row)


@pytest.mark.parametrize("second", [" and so on", "s"])
def test_a_bolmo_goes_on_from_what_it_made(second):
    lm = tiny_bolmo.model()
    names = ("compound", "short", "cyr_arab")
    first = [tiny_bolmo.ids_of(name)[:30].tolist() for name in names]
    turn = [lm.tokenizer.encode(second + "!" * i).tolist() for i in range(3)]
    before, two = two_turns(lm, first, turn, stop_ids=())
    for i, (a, b, c) in enumerate(zip(before, turn, two.ids)):
        plain, ends = ends_of(lm, [first[i], a[len(first[i]) :], b, c])
        logits = logits_of(lm, plain, ends)
        at = len(a) + len(b)
        for n, token in enumerate(c):
            assert logits[at + n - 1].max() - logits[at + n - 1, token] < 2e-3
    alone = generate(lm, [first[1]], NEW, keep_memory=True, stop_ids=())
    assert generate(lm, [turn[1]], NEW, after=alone, stop_ids=()).ids == [two.ids[1]]
