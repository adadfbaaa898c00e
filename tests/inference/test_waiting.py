"""Rows of a batch wait for each other, so that the network inside runs for all at once: which must not show."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.inference import generate as module
from atom_jax.inference.generate import generate
from atom_jax.inference.sampling import row_keys
from atom_jax.models.hnet import waiting
from atom_jax.typing import LM
from tests.models.tiny_units import MODELS, stream, weights

PROMPTS = [stream(n, start).tolist() for n, start in ((9, 0), (1, 30), (14, 11), (6, 3))]
NEW = 30
KEYS = row_keys(jax.random.key(4), len(PROMPTS))


@functools.cache
def lm(name):
    return LM(MODELS[name], weights(MODELS[name]), None)


@functools.cache
def found(name, temperature, row=None):
    """What is made of all prompts, or of one alone."""
    rows = slice(None) if row is None else slice(row, row + 1)
    return generate(lm(name), PROMPTS[rows], NEW, temperature, KEYS[rows])


# Marks first and last, by content, place and a learned network; one stage inside and two.
@pytest.mark.parametrize("name", ["hnet", "words", "megabyte", "gumbel", "blt-both", "hnet-2", "fixed-gumbel"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_is_the_same_alone_and_in_a_batch(name, temperature):
    together = found(name, temperature)
    rows = range(len(PROMPTS)) if name in ("hnet", "fixed-gumbel") else (1, 2)
    alone = [found(name, temperature, r) for r in rows]
    assert [together.ids[r] for r in rows] == [one.ids[0] for one in alone]
    assert all(len(row) == NEW for row in together.ids)
    if len(alone) == len(PROMPTS):
        assert together.stats["kv_reads"] == pytest.approx(sum(one.stats["kv_reads"] for one in alone))
        assert together.stats["kv_entries_peak"] <= sum(one.stats["kv_entries_peak"] for one in alone)


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


@pytest.mark.parametrize("name", ["megabyte", "gumbel"])
def test_the_network_inside_runs_once_per_unit(name, monkeypatch):
    """And not whenever a unit of any row begins or ends."""
    runs, inside = [], waiting.inside

    def counted(*args):
        jax.debug.callback(lambda: runs.append(1))
        return inside(*args)

    monkeypatch.setattr(waiting, "inside", counted)
    # A configuration that nothing has compiled for.
    model = dataclasses.replace(lm(name), config=dataclasses.replace(MODELS[name], max_length=400))

    def count(rows):
        runs.clear()
        gen = generate(model, PROMPTS[rows], NEW, 0.8, KEYS[rows])
        jax.effects_barrier()
        return len(runs), gen.ids

    alone = [count(slice(r, r + 1))[0] for r in range(len(PROMPTS))]
    together, ids = count(slice(None))
    assert ids == found(name, 0.8).ids
    # All rows that are not yet finished are served by every run.
    assert 0 < together <= max(alone)
    if name == "megabyte":
        assert set(alone) <= {9, 10}


def test_caches_may_grow_while_rows_wait(monkeypatch):
    expected = found("hnet-2", 0.8)
    monkeypatch.setattr(module, "LEAST", 16)
    monkeypatch.setattr(module, "ROOM", 1)
    monkeypatch.setattr(module, "CHUNK", 11)
    grown = generate(lm("hnet-2"), PROMPTS, NEW, 0.8, KEYS)
    assert grown.ids == expected.ids
    assert grown.stats["kv_reads"] == pytest.approx(expected.stats["kv_reads"])
    assert grown.stats["kv_bytes"] < expected.stats["kv_bytes"]


def test_stop_ids_end_their_row_only():
    free = found("fixed-gumbel", 0.8).ids
    stop = [free[1][5], free[2][12]]
    gen = generate(lm("fixed-gumbel"), PROMPTS, NEW, 0.8, KEYS, stop_ids=stop)
    for row, whole in zip(gen.ids, free):
        ends = [i for i, token in enumerate(whole) if token in stop]
        assert row == whole[: ends[0] if ends else None]
