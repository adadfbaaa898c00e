"""What must hold for every way to find, pool, mix and spread units."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from atom_jax.chunking import rules
from atom_jax.chunking.config import slots_for
from atom_jax.chunking.types import END
from atom_jax.models import hnet
from atom_jax.units import stage
from tests.models.tiny_units import MODELS, rows, stream, weights

T = 24
LENGTHS = (24, 17, 9)
DOCUMENTS = [stream(n, start) for n, start in zip(LENGTHS, (0, 30, 11))]


@pytest.fixture(scope="module", params=MODELS)
def cfg(request):
    return MODELS[request.param]


@functools.partial(jax.jit, static_argnames="cfg")
def run(p, batch, cache=None, *, cfg):
    return hnet.apply(p, batch, cfg=cfg, cache=cache)


def whole(cfg, documents):
    """Logits of every document, one list per row, and what was learned."""
    batch = rows(documents, T)
    out, _ = run(weights(cfg), batch, cfg=cfg)
    logits, segments = np.asarray(out.logits), batch.segments
    return [[logits[r][segments[r] == i + 1] for i in range(len(d))] for r, d in enumerate(documents)], out.aux


@functools.cache
def alone(cfg):
    """Logits of DOCUMENTS, each in a row of its own."""
    found, aux = whole(cfg, [[d] for d in DOCUMENTS])
    assert aux["lost"] == 0
    return [f[0] for f in found], aux


def close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-4)


def test_decisions_differ_and_are_clear(cfg):
    """Or nothing else here would mean much: rounding must not decide."""
    logits, aux = alone(cfg)
    assert max(np.abs(x).max() for x in logits) < 50 and min(x.std() for x in logits) > 0.05
    real = rows([[d] for d in DOCUMENTS], T).segments > 0
    for mark, p in zip(aux["boundaries"], aux["boundary_probs"]):
        assert 2 < mark.sum() < real.sum()
        assert np.abs(np.asarray(p)[real] - 0.5).min() > 2e-4
        real = np.asarray(mark)


def test_looks_back_only(cfg):
    logits, aux = alone(cfg)
    for cut in (1, 7, 14):
        changed = [np.concatenate([d[:cut], stream(max(len(d) - cut, 0), 5)]) for d in DOCUMENTS]
        found, new = whole(cfg, [[d] for d in changed])
        for a, (b,) in zip(logits, found):
            close(a[:cut], b[:cut])
        for a, b in zip(aux["boundaries"], new["boundaries"]):
            np.testing.assert_array_equal(a[:, :cut], b[:, :cut])
    assert np.abs(logits[0][-1] - found[0][0][-1]).max() > 1e-2


def test_packed_documents_do_not_see_each_other(cfg):
    a, b, c = DOCUMENTS
    separate, _ = whole(cfg, [[b[:15]], [c[:4]], [a[:6]]])
    packed, aux = whole(cfg, [[c, b[:15]], [c[:4], a[:6], c], [b]])
    assert aux["lost"] == 0
    logits, _ = alone(cfg)
    for x, y in (
        (packed[0][0], logits[2]), (packed[0][1], separate[0][0]), (packed[1][0], separate[1][0]),
        (packed[1][1], separate[2][0]), (packed[1][2], logits[2]), (packed[2][0], logits[1]),
    ):  # fmt: skip
        close(x, y)


def test_left_padding_changes_nothing(cfg):
    batch = rows([[d[:14]] for d in DOCUMENTS], T, left=5)
    out, _ = run(weights(cfg), batch, cfg=cfg)
    for got, full in zip(out.logits, alone(cfg)[0]):
        close(got[5 : 5 + min(len(full), 14)], full[:14])


def read(cfg, pieces):
    """Logits of DOCUMENTS read in calls; each of `pieces` is (positions computed, bytes read per row)."""
    cache, found = hnet.init_cache(cfg, 3, 32), [[] for _ in DOCUMENTS]
    taken = np.zeros(3, np.int32)
    for t, real in pieces:
        real = np.minimum(real, np.array(LENGTHS) - taken)
        batch = rows([[d[i : i + n]] for d, i, n in zip(DOCUMENTS, taken, real)], t)
        batch = batch.replace(positions=taken[:, None] + np.arange(t, dtype=np.int32)[None])
        out, cache = run(weights(cfg), batch, cache, cfg=cfg)
        assert out.aux["lost"] == 0
        for logits, n, mine in zip(np.asarray(out.logits), real, found):
            mine.extend(logits[:n])
        taken = taken + real
        np.testing.assert_array_equal(cache.length, taken)
    return [np.array(x) for x in found]


@pytest.mark.parametrize("first", ["prompt", "byte"])
def test_bytes_one_after_another_equal_the_whole(cfg, first):
    """Ragged rows, which end at different steps, after prompts of different lengths or from the first byte on."""
    pieces = [(16, (16, 9, 1))] + 8 * [(1, 1)] if first == "prompt" else 24 * [(1, 1)]
    for mine, full in zip(read(cfg, pieces), alone(cfg)[0], strict=True):
        close(mine, full)


def test_a_prompt_in_pieces_equals_the_whole(cfg):
    for mine, full in zip(read(cfg, [(16, (16, 9, 1)), (8, (8, 8, 0)), (8, 8)]), alone(cfg)[0], strict=True):
        close(mine, full)


def test_units_beyond_the_capacity_are_counted(cfg, monkeypatch):
    """And nothing before the first of them changes."""
    monkeypatch.setattr(stage, "slots_for", lambda t, share, multiple=1: slots_for(t, share, 1))
    first, *inside = cfg.chunking
    tight = dataclasses.replace(cfg, chunking=(dataclasses.replace(first, capacity=0.04), *inside))
    out, _ = run(weights(cfg), rows([[d] for d in DOCUMENTS], T), cfg=tight)
    logits, aux = alone(cfg)
    # Where the rule's marks come last, a chunk that holds nothing begins every row, and has room of its own.
    null = rules.of(first.rule).KIND == END
    here = 1 if first.pack else 3
    marks = np.asarray(aux["boundaries"][0]).astype(int)
    marks[:, 0] += null
    count = np.cumsum(marks.reshape(here, -1), axis=1)
    slots = slots_for(count.shape[1], 0.04, 1) + null * 3 // here
    beyond = (count > slots).reshape(3, T)
    lost = np.maximum(count[:, -1] - slots, 0).sum()
    assert out.aux["metrics"]["lost_0"][0] == lost > 0 and out.aux["lost"] >= lost
    for got, row, full in zip(out.logits, beyond, logits):
        n = int(np.argmax(row)) if row.any() else T
        close(got[: min(n, len(full))], full[:n])
    assert beyond.any(axis=1).sum() >= 1 and not beyond[0, 0]
