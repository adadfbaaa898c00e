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
from atom_jax.kvcache import memory
from atom_jax.models import hnet
from atom_jax.models.hnet import forward
from atom_jax.session import queue, session
from atom_jax.session.sampling import row_keys
from atom_jax.typing import LM
from atom_jax.units import quorum, waiting
from tests.models.tiny_units import MODELS, capacity, stream, weights

PROMPTS = [stream(n, start).tolist() for n, start in ((9, 0), (1, 30), (14, 11), (6, 3))]
NEW = 30
# Of models whose rows wait for all others here; how many rows wait in those with more.
LENGTH = 400
ROWS = {LENGTH + 1: 1, LENGTH + 2: 2, LENGTH + 3: 3}


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    monkeypatch.setattr(forward, "enough", lambda p, cfg, cache: ROWS.get(cfg.max_length, len(cache.length)))


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


@pytest.mark.parametrize(
    ("name", "length"),
    [("hnet-2", LENGTH + 1), ("hnet-2", LENGTH + 3), ("words", LENGTH + 2), ("megabyte", LENGTH + 1)],
)
def test_rows_make_the_same_whoever_waits(name, length):
    waited, eager = found(name, 0.8), found(name, 0.8, length=length)
    assert waited.ids == eager.ids
    assert waited.stats["kv_reads"] == pytest.approx(eager.stats["kv_reads"])


@pytest.mark.parametrize(("inner", "rows", "least", "most"), [("T2", 8, 2, 4), ("T64", 8, 7, 8), ("T16", 1, 1, 1)])
def test_more_rows_wait_where_more_weights_are_inside(monkeypatch, inner, rows, least, most):
    monkeypatch.undo()
    cfg = dataclasses.replace(
        MODELS["spikes"], layout=("T2", inner, "T2"), d_model=(64, 64), d_intermediate=(128, 128)
    )
    cfg = capacity(cfg, 0.25)
    shapes = jax.eval_shape(lambda key: params.init(key, hnet.spec(cfg)), jax.random.key(0))
    cache = jax.eval_shape(lambda: hnet.init_cache(cfg, rows, 64))
    assert least <= forward.enough(shapes, cfg, cache) <= most


@pytest.mark.parametrize("weights", [(1.0, 8.0), (1.0, 0.5), (1.0, 100.0)])
def test_bytes_cost_least_with_the_quorum(weights):
    """Against batches that are played through."""
    outer, inner = weights
    rate, rows, played = 0.2, 6, []
    for least in range(1, rows + 1):
        random, waits, cost, read = np.random.default_rng(0), 0, 0.0, 0
        for _ in range(20_000):
            read += rows - waits
            waits += random.binomial(rows - waits, rate)
            run = waits >= least
            cost, waits = cost + outer + run * inner, 0 if run else waits
        played.append(cost / read)
    assert played[quorum.size(rows, rate, outer, inner) - 1] <= 1.01 * min(played)
    assert quorum.size(2048, 1.0, outer, inner) <= 2048


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
    expected = found("megabyte", 0.8).ids
    monkeypatch.setattr(queue, "SHARED", 0)
    runs, only_if = [], waiting.only_if

    def counted(needed, run, memory):
        def inside(memory):
            jax.debug.callback(lambda: runs.append(1))
            return run(memory)

        return only_if(needed, inside, memory)

    monkeypatch.setattr(waiting, "only_if", counted)
    # A configuration that nothing has compiled for.
    model = lm("megabyte", LENGTH - 1)
    for rows in (slice(None), slice(0, 1)):
        runs.clear()
        gen = generate(model, PROMPTS[rows], NEW, 0.8, keys(rows))
        jax.effects_barrier()
        assert gen.ids == expected[rows]
        # Every row ends 9 or 10 units of 3 in the 29 tokens that it reads.
        assert len(runs) in (9, 10)


def test_caches_may_grow_while_rows_wait(monkeypatch):
    monkeypatch.setattr(queue, "SHARED", 0)
    # Fewer units than come are expected, and bytes see all before them, so that both caches grow.
    model = lm("words")
    model = dataclasses.replace(model, config=dataclasses.replace(capacity(model.config, 0.25), window=(-1, -1)))
    expected = generate(model, PROMPTS, NEW, 0.8, keys())
    monkeypatch.setattr(session, "LEAST", 16)
    monkeypatch.setattr(module, "ROOM", 17)
    monkeypatch.setattr(module, "CHUNK", 11)
    waited, grow = [], memory.grow
    monkeypatch.setattr(
        memory,
        "grow",
        lambda cache, *more, **how: waited.append(cache.parts.latest.on.any()) or grow(cache, *more, **how),
    )
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
