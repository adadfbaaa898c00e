"""Rows of a batch may wait for each other, so that the network inside runs for all at once: which must not show."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.inference import generate as module
from atom_jax.inference.generate import generate
from atom_jax.inference.sampling import row_keys
from atom_jax.models import hnet
from atom_jax.models.hnet import waiting
from atom_jax.typing import LM
from tests.models.tiny_units import MODELS, capacity, stream, weights

PROMPTS = [stream(n, start).tolist() for n, start in ((9, 0), (1, 30), (14, 11), (6, 3))]
NEW = 30
# Of models whose rows wait here; others have more.
LENGTH = 400


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    monkeypatch.setattr(waiting, "pays", lambda p, cfg, rows: cfg.max_length <= LENGTH)


@functools.cache
def lm(name, length=LENGTH):
    return LM(dataclasses.replace(MODELS[name], max_length=length), weights(MODELS[name]), None)


def keys(rows=slice(None)):
    return row_keys(jax.random.key(4), len(PROMPTS))[rows]


@functools.cache
def found(name, temperature, row=None, length=LENGTH):
    """What is made of all prompts, or of one alone."""
    rows = slice(None) if row is None else slice(row, row + 1)
    return generate(lm(name, length), PROMPTS[rows], NEW, temperature, keys(rows))


# Marks that come first (in two stages) and last, of a router, of white space, of places and of a predictor.
@pytest.mark.parametrize("name", ["hnet-2", "words", "megabyte", "gumbel"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_is_the_same_alone_and_in_a_batch(name, temperature):
    together = found(name, temperature)
    rows = range(len(PROMPTS)) if name in ("gumbel", "hnet-2") else (1, 2)
    alone = [found(name, temperature, r) for r in rows]
    assert [together.ids[r] for r in rows] == [one.ids[0] for one in alone]
    assert all(len(row) == NEW for row in together.ids)
    if len(alone) == len(PROMPTS):
        assert together.stats["kv_reads"] == pytest.approx(sum(one.stats["kv_reads"] for one in alone))
        assert together.stats["kv_entries_peak"] <= sum(one.stats["kv_entries_peak"] for one in alone)


@pytest.mark.parametrize("name", ["hnet-2", "words", "megabyte"])
def test_rows_that_do_not_wait_make_the_same(name):
    waited, eager = found(name, 0.8), found(name, 0.8, length=LENGTH + 1)
    assert waited.ids == eager.ids
    assert waited.stats["kv_reads"] == pytest.approx(eager.stats["kv_reads"])


@pytest.mark.parametrize(
    ("inner", "rows", "expected"),
    [("T2", 8, False), ("T16", 8, True), ("T16", 1, False), ("T16", 2, True), ("T16", 100, False)],
)
def test_waiting_pays_where_most_weights_are_inside(monkeypatch, inner, rows, expected):
    """Stages as wide as each other, units of 4: the byte level has 4 layers and is read 2.7 times as often where 8
    rows wait, the units' 90% of the time where they don't."""
    monkeypatch.undo()
    cfg = dataclasses.replace(
        MODELS["spikes"], layout=("T2", inner, "T2"), d_model=(64, 64), d_intermediate=(128, 128)
    )
    cfg = capacity(cfg, 0.25)
    shapes = jax.eval_shape(lambda key: params.init(key, hnet.spec(cfg)), jax.random.key(0))
    assert waiting.pays(shapes, cfg, rows) == expected


@pytest.mark.parametrize("name", ["hnet-2", "words"])
def test_greedy_tokens_are_those_of_the_whole_forward_pass(name):
    rows = [prompt + new for prompt, new in zip(PROMPTS, found(name, 0.0).ids)]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, out in zip(rows, ids):
        out[: len(row)] = row
    mask = np.arange(ids.shape[1])[None] < np.array([[len(row)] for row in rows])
    best = np.asarray(atom_jax.apply(lm(name), ids, mask).logits).argmax(-1)
    for prompt, row, likely in zip(PROMPTS, rows, best):
        np.testing.assert_array_equal(row[len(prompt) :], likely[len(prompt) - 1 : len(row) - 1])


def test_the_network_inside_runs_once_per_unit(monkeypatch):
    """And not whenever a unit of any row begins or ends."""
    runs, inside = [], waiting.inside

    def counted(*args):
        jax.debug.callback(lambda: runs.append(1))
        return inside(*args)

    monkeypatch.setattr(waiting, "inside", counted)
    # A configuration that nothing has compiled for.
    model = lm("megabyte", LENGTH - 1)
    for rows in (slice(None), slice(0, 1)):
        runs.clear()
        gen = generate(model, PROMPTS[rows], NEW, 0.8, keys(rows))
        jax.effects_barrier()
        assert gen.ids == found("megabyte", 0.8).ids[rows]
        # Every row ends 9 or 10 units of 3 in the 29 tokens that it reads.
        assert len(runs) in (9, 10)


def test_caches_may_grow_while_rows_wait(monkeypatch):
    expected = found("words", 0.8)
    monkeypatch.setattr(module, "LEAST", 16)
    monkeypatch.setattr(module, "ROOM", 17)
    monkeypatch.setattr(module, "CHUNK", 11)
    waited, grow = [], hnet.grow
    monkeypatch.setattr(hnet, "grow", lambda cache: waited.append(cache.layers[0].waiting.on.any()) or grow(cache))
    # Fewer units than come are expected, so that their cache grows too.
    model = dataclasses.replace(lm("words"), config=capacity(lm("words").config, 0.25))
    grown = generate(model, PROMPTS, NEW, 0.8, keys())
    assert grown.ids == expected.ids
    assert grown.stats["kv_reads"] == pytest.approx(expected.stats["kv_reads"])
    assert grown.stats["kv_bytes"] < expected.stats["kv_bytes"]
    assert any(waited)


def test_stop_ids_end_their_row_only():
    free = found("gumbel", 0.8).ids
    stop = [free[1][5], free[2][12]]
    gen = generate(lm("gumbel"), PROMPTS, NEW, 0.8, keys(), stop_ids=stop)
    for row, whole in zip(gen.ids, free):
        ends = [i for i, token in enumerate(whole) if token in stop]
        assert row == whole[: ends[0] if ends else None]
