"""Prompts that entries don't make likelier lean on sinks and window alone."""

import dataclasses

import numpy as np
import pytest

import atom_jax
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.lasting import gate
from atom_jax.lasting.memory import Memory
from atom_jax.session.prompts import padded
from atom_jax.session.session import Session
from tests.lasting.test_lasting_reading import TEXTS, lm_of

DRAW = np.random.default_rng(1)
CHOICES = {"all entries": Choice(), "pages": Choice(whole=0, pages=2, page=4, stride=3)}


@pytest.fixture(scope="module")
def lm():
    """Its own: what is kept of a model depends on how it was run before."""
    return lm_of.__wrapped__("llama")


@pytest.fixture(scope="module")
def home(tmp_path_factory, lm):
    path = tmp_path_factory.mktemp("gate") / "m"
    with opened(path, lm) as memory:
        for text in TEXTS[:3]:
            memory.read(text)
    return path


def opened(path, lm, **more):
    return Memory.open(path, lm, part=16, sinks=2, law="sqrt:entries=4,block=8", **more)


@pytest.mark.parametrize("name", CHOICES)
def test_rows_lean_where_they_gain(home, lm, name):
    memory = opened(home, lm, choice=CHOICES[name])
    prompts = [DRAW.integers(0, 256, n).astype(np.int32) for n in (9, 5, 12, 7, 3, 8)]
    ids, lengths = padded(prompts, 0)
    gains = []
    for n, row in zip(lengths, range(len(ids))):
        nats = [
            gate.said(lm, one, ids[row : row + 1], lengths[row : row + 1])[1][0, : n - 1].sum()
            for one in (memory.front(), memory.without())
        ]
        gains.append(nats[1] - nats[0])
    best = np.sort(gains)[::-1]
    assert best[0] > best[1] > 0 > best[-1]
    gain = float(best[:2].mean())
    memory.choice = dataclasses.replace(memory.choice, gain=gain)
    more = [DRAW.integers(0, 256, (len(prompts), n)).astype(np.int32) for n in (1, 1, 1, 1, 3)]
    found = logits(lm, prompts, more, memory.front(len(prompts), prompts))
    every = logits(lm, prompts, more, memory.front(len(prompts)))
    for i, prompt in enumerate(prompts):
        own = memory.front() if gains[i] > gain else memory.without()
        wanted = logits(lm, [prompt], [m[i : i + 1] for m in more], own)[:, 0]
        np.testing.assert_allclose(found[:, i], wanted, atol=2e-4, rtol=2e-4)
        assert (np.abs(found[:, i] - every[:, i]).max() > 1e-3) == (gains[i] <= gain)
    text = atom_jax.generate(lm, prompts, 3, memory=memory)
    assert [row[0] for row in text.ids] == found[0].argmax(-1).tolist()


def logits(lm, prompts, more, memory):
    """After the prompts, and after all further tokens, [1 + len(more), b, v]."""
    session = Session.prefill(lm, prompts, memory=memory)
    out = [np.asarray(session.logits)]
    for ids in more:
        session = session.extend(list(ids))
        out.append(np.asarray(session.logits))
    return np.stack(out)


def test_without_is_sinks_and_window(home, lm):
    memory = opened(home, lm)
    near = memory.length - memory.held
    assert memory_lib.nodes(memory.without())[-1].length.tolist() == [near]
    never = gate.front(lm, memory.front(), memory.without(), [TEXTS[4]] * 2, 1e5)
    assert memory_lib.nodes(never)[-1].length.tolist() == [near] * 2
    assert gate.front(lm, memory.front(), memory.without(), [TEXTS[4]], 0.0).length.tolist() == [memory.length]
