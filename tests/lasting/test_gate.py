"""What makes a prompt likeliest stands in front of it: nothing, a memory, or that and passages."""

import dataclasses

import jax
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
NOTHING = np.zeros(0, np.int32)
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


def read(lm, memory, row):
    """Nats of all tokens but the first."""
    ids, lengths = padded([row], 0)
    return gate.said(lm, memory, ids, lengths)[1][0, : len(row) - 1]


@pytest.mark.parametrize("name", CHOICES)
def test_rows_lean_where_they_gain(home, lm, name):
    memory = opened(home, lm, choice=CHOICES[name])
    prompts = [DRAW.integers(0, 256, n).astype(np.int32) for n in (9, 5, 12, 7, 3, 8, 1, 6, 14, 11)]
    nats = memory.weigh(prompts, [NOTHING] * len(prompts))
    for prompt, mine in zip(prompts, nats.T):
        wanted = [read(lm, one, prompt).sum() for one in (memory.without(), memory.front())]
        np.testing.assert_allclose(mine, [*wanted, np.inf], atol=1e-4)
    leans = nats[1] < nats[0]
    assert 0 < leans.sum() < len(leans) - 1 and nats[:2, 6].tolist() == [0, 0]
    more = [DRAW.integers(0, 256, (len(prompts), n)).astype(np.int32) for n in (1, 1, 1, 1, 3)]
    found = logits(lm, prompts, more, memory.front(len(prompts), leans))
    every = logits(lm, prompts, more, memory.front(len(prompts)))
    for i, prompt in enumerate(prompts):
        own = memory.front() if leans[i] else memory.without()
        wanted = logits(lm, [prompt], [m[i : i + 1] for m in more], own)[:, 0]
        np.testing.assert_allclose(found[:, i], wanted, atol=2e-4, rtol=2e-4)
        assert (np.abs(found[:, i] - every[:, i]).max() > 1e-3) == (not leans[i])
    text = atom_jax.generate(lm, prompts, 3, stop_ids=[], memory=memory)
    assert [row[0] for row in text.ids] == found[0].argmax(-1).tolist()
    assert text.stats["leaning"] == leans.mean()
    memory.choice = dataclasses.replace(memory.choice, gated=False)
    text = atom_jax.generate(lm, prompts, 3, stop_ids=[], memory=memory)
    assert [row[0] for row in text.ids] == every[0].argmax(-1).tolist() and text.stats["leaning"] == 1


@pytest.mark.parametrize("twice", [False, True])
def test_passages_are_read_where_they_gain(home, lm, twice):
    memory = opened(home, lm)
    prompts = [TEXTS[i][a:b] for i, a, b in ((0, 3, 8), (0, 40, 52), (1, 2, 9), (1, 5, 20), (0, 20, 29), (0, 60, 63))]
    passages = [memory.passages(prompt, 1) for prompt in prompts]
    nats = memory.weigh(prompts, passages)
    for prompt, passage, found in zip(prompts, passages, nats[2]):
        both = read(lm, memory.front(), np.concatenate([passage, prompt]))
        assert len(passage) and abs(found - both[len(passage) :].sum()) < 1e-4
    side = nats.argmin(0)
    assert len(set(side)) > 1 and 2 in side
    made = atom_jax.generate(lm, prompts, 4, stop_ids=[], memory=memory, reread=1, twice=twice)
    wanted = [len(p) + len(x) * (s == 2) for p, x, s in zip(prompts, passages, side)]
    assert made.stats["prompt_tokens"] == sum(wanted) * (1 + twice)
    assert made.stats["leaning"] == (side > 0).mean()
    memory.choice = dataclasses.replace(memory.choice, gated=False)
    made = atom_jax.generate(lm, prompts, 4, stop_ids=[], memory=memory, reread=1, twice=twice)
    assert made.stats["prompt_tokens"] == sum(len(p) + len(x) for p, x in zip(prompts, passages)) * (1 + twice)


def test_leaning_is_drawn_as_a_token_is(home, lm):
    memory = opened(home, lm)
    prompt = DRAW.integers(0, 256, 5).astype(np.int32)
    nats = memory.weigh([prompt], [NOTHING])[:2, 0]
    wanted = 1 / (1 + np.exp(nats[1] - nats[0]))
    run = lambda: atom_jax.generate(lm, [prompt] * 200, 1, 1.0, jax.random.key(3), stop_ids=[], memory=memory)  # noqa: E731
    share = run().stats["leaning"]
    assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / 200) ** 0.5 and 0 < share < 1
    assert run().ids == run().ids


def test_the_mixture_is_one_of_whole_texts():
    nats, weight = DRAW.exponential(2, (3, 4, 7)), DRAW.normal(0, 5, (3, 4))
    weight[2, 1] = -np.inf
    found = gate.mixed(weight, nats)
    share = np.exp(weight - np.logaddexp.reduce(weight, axis=0))
    wanted = -np.log((share[..., None] * np.exp(-nats.cumsum(2))).sum(0))
    np.testing.assert_allclose(found.cumsum(1), wanted, rtol=1e-9)
    even = gate.mixed(np.zeros((3, 4)), nats).sum(1)
    assert (even <= nats.sum(2).min(0) + np.log(3)).all()


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
    lengths = lambda leans: memory.front(len(leans), np.array(leans)).length.tolist()  # noqa: E731
    assert memory_lib.nodes(memory.without())[-1].length.tolist() == [near]
    assert lengths([False, False]) == [near] * 2 and lengths([True, False]) == [memory.length, near]
    assert memory.front().length.tolist() == lengths([True]) == [memory.length]
