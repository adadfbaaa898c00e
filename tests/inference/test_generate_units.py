"""Generation with learned units: caches grow, and nothing is ever lost."""

import dataclasses
import importlib

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.inference.generate import generate
from atom_jax.inference.score import logprobs
from atom_jax.kvcache import memory
from atom_jax.models import hnet
from atom_jax.models.hnet.examples import small
from atom_jax.session import session
from atom_jax.typing import LM
from tests.models.tiny_units import MODELS, capacity, stream, weights

module = importlib.import_module("atom_jax.inference.generate")
PROMPTS = [stream(n, start).tolist() for n, start in ((14, 3), (5, 20), (1, 8))]


def lm_of(cfg):
    return LM(cfg, weights(cfg), None)


@pytest.mark.parametrize("name", ["hnet-2", "gumbel"])
def test_caches_grow_where_units_are_shorter_than_expected(monkeypatch, name):
    """Inner caches begin with room for an eighth of the bytes, outer ones with room for the prompt."""
    cfg = capacity(MODELS[name], 0.125)
    expected = generate(lm_of(MODELS[name]), PROMPTS, 60, 1.0).ids
    monkeypatch.setattr(session, "LEAST", 16)
    monkeypatch.setattr(module, "ROOM", 1)
    grown = generate(LM(cfg, weights(MODELS[name]), None), PROMPTS, 60, 1.0)
    assert grown.ids == expected


def test_a_unit_per_byte_fits_too(monkeypatch):
    """The fullest case: every position of every row ends a unit, and each row begins with an empty one."""
    chunking = {"rule": Fixed(1), "pool": "mean", "pack": True}
    cfg = small(chunking, layout=("t1", "t1", "t1"))
    tight, p = capacity(cfg, 0.5), weights(cfg)
    ids = np.stack([stream(30), stream(30, 9)])
    full = atom_jax.apply(LM(cfg, p, None), ids)
    found = atom_jax.apply(LM(tight, p, None), ids)
    assert full.aux["lost"] == found.aux["lost"] == 0
    np.testing.assert_allclose(found.logits, full.logits, atol=1e-5)
    np.testing.assert_allclose(logprobs(LM(tight, p, None), ids), logprobs(LM(cfg, p, None), ids), atol=1e-5)
    monkeypatch.setattr(session, "LEAST", 16)
    monkeypatch.setattr(module, "ROOM", 1)
    made = generate(LM(tight, p, None), PROMPTS, 40).ids
    assert made == generate(LM(cfg, p, None), PROMPTS, 40).ids


@pytest.mark.parametrize(("window", "slots"), [(-1, 1024), (5, 6), (2000, 1024)])
def test_inner_caches_are_sized_by_chunks_and_sliding_ones_by_their_window(window, slots):
    cfg = dataclasses.replace(small({"rule": Fixed(8), "pool": "mean", "capacity": 0.125}), layout=("t1", "t1", "t1"))
    assert isinstance(cfg.chunking[0], Chunking)
    cache = hnet.init_cache(dataclasses.replace(cfg, window=(window, -1)), 1, 1024)
    is_stack = lambda x: isinstance(x, memory.Stack)  # noqa: E731
    outer, inner = (jax.tree.leaves(node.layers, is_leaf=is_stack) for node in memory.nodes(cache))
    assert [x.states.k.shape[-2] for x in (*outer, *inner)] == [slots, slots, 192]


@pytest.mark.parametrize("name", ["hnet-2", "words-hnet"])
def test_scoring_finds_room_for_every_unit(name):
    cfg, ids = MODELS[name], np.stack([stream(24), stream(24, 30)])
    full = atom_jax.apply(lm_of(cfg), ids)
    found = atom_jax.apply(LM(capacity(cfg, 0.3), weights(cfg), None), ids)
    assert found.aux["lost"] == 0
    np.testing.assert_allclose(found.logits, full.logits, atol=1e-4)
