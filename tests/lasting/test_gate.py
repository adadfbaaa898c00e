"""What makes a prompt likeliest stands in front of it: nothing, a memory, or that and passages."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.inference import score
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.lasting import gate, pages
from atom_jax.lasting.gate import Side
from atom_jax.lasting.memory import Memory
from atom_jax.session.prompts import padded
from atom_jax.session.session import Session
from tests.contract import cells
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
    fronts = memory.fronts()
    nats = memory.weigh(prompts, prompts, [NOTHING] * len(prompts))
    for prompt, mine in zip(prompts, nats.T):
        wanted = [read(lm, one, prompt).sum() for one in (fronts.memory, fronts.near)]
        alone = -np.asarray(score.logprobs(lm, prompt[None]))[0].sum()
        np.testing.assert_allclose(mine, [np.inf, wanted[0], np.inf, wanted[1], alone], atol=1e-4)
    side = nats.argmin(0).astype(np.int32)
    assert set(side) == {Side.MEMORY, Side.NEAR, Side.NOTHING} and side[6] == Side.MEMORY
    more = [DRAW.integers(0, 256, (len(prompts), n)).astype(np.int32) for n in (1, 1, 1, 1, 3)]
    found = logits(lm, prompts, more, gate.front(fronts, side))
    every = logits(lm, prompts, more, memory.front(len(prompts)))
    for i, prompt in enumerate(prompts):
        own = {Side.MEMORY: fronts.memory, Side.NEAR: fronts.near, Side.NOTHING: None}[side[i]]
        own = None if own is None else memory_lib.rows(own, np.zeros(1, np.int32))
        wanted = logits(lm, [prompt], [m[i : i + 1] for m in more], own)[:, 0]
        np.testing.assert_allclose(found[:, i], wanted, atol=2e-4, rtol=2e-4)
        assert (np.abs(found[:, i] - every[:, i]).max() > 1e-3) == (side[i] != Side.MEMORY)
    text = atom_jax.generate(lm, prompts, 3, stop_ids=[], memory=memory)
    assert [row[0] for row in text.ids] == found[0].argmax(-1).tolist()
    assert text.stats["leaning"] == (side == Side.MEMORY).mean()
    memory.choice = dataclasses.replace(memory.choice, gated=False)
    text = atom_jax.generate(lm, prompts, 3, stop_ids=[], memory=memory)
    assert [row[0] for row in text.ids] == every[0].argmax(-1).tolist() and text.stats["leaning"] == 1


@pytest.mark.parametrize("name", ["qwen3", "olmo3", "hnet-hnet-2", "hnet-words", "bolmo-olmo3-sliding"])
def test_nothing_in_front_is_a_model_that_read_nothing(tmp_path, scanned, name):
    lm = cells.example(name) if name in cells.EXAMPLES else lm_of.__wrapped__(name)
    long, *prompts = cells.texts(lm, 150, 25, 12)
    with Memory.open(tmp_path / "m", lm, part=16, sinks=2, law="sqrt:entries=4,block=8") as memory:
        memory.read(np.array(long))
        for choice in (Choice(), Choice(whole=0, pages=2, page=4, stride=3)):
            memory.choice = choice
            memory.close()
            side = np.array([Side.NOTHING, Side.MEMORY, Side.NEAR, Side.NOTHING], np.int32)
            rows = [prompts[0], *prompts, prompts[1]]
            session = Session.prefill(lm, rows, memory=gate.front(memory.fronts(), side))
            for row, text in ((0, prompts[0]), (3, prompts[1])):
                wanted = Session.prefill(lm, [text]).logits[0]
                np.testing.assert_allclose(session.logits[row], wanted, atol=2e-4, rtol=2e-4)
            alone = Session.prefill(lm, rows[1:2], memory=memory.front())
            np.testing.assert_allclose(session.logits[1], alone.logits[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("twice", [False, True])
def test_passages_are_read_where_they_gain(home, lm, twice):
    memory = opened(home, lm)
    prompts = [TEXTS[i][a:b] for i, a, b in ((0, 3, 8), (0, 40, 52), (1, 2, 9), (1, 5, 20), (0, 20, 29), (0, 60, 63))]
    passages = [memory.passages(prompt, 1) for prompt in prompts]
    nats = memory.weigh(prompts, prompts, passages)
    for side, front in (Side.PASSAGES, memory.front), (Side.AGAIN, lambda: memory.fronts().near):
        for prompt, passage, found in zip(prompts, passages, nats[side]):
            both = read(lm, front(), np.concatenate([passage, prompt]))
            assert len(passage) and abs(found - both[len(passage) :].sum()) < 1e-4
    side = nats.argmin(0)
    assert len(set(side)) > 1 and set(side) & set(gate.REREAD)
    made = atom_jax.generate(lm, [p.tolist() for p in prompts], 4, stop_ids=[], memory=memory, reread=1, twice=twice)
    wanted = [len(p) + len(x) * (s in gate.REREAD) for p, x, s in zip(prompts, passages, side)]
    assert made.stats["prompt_tokens"] == sum(wanted) * (1 + twice)
    assert made.stats["leaning"] == (side <= Side.MEMORY).mean()
    memory.choice = dataclasses.replace(memory.choice, gated=False)
    made = atom_jax.generate(lm, prompts, 4, stop_ids=[], memory=memory, reread=1, twice=twice)
    assert made.stats["prompt_tokens"] == sum(len(p) + len(x) for p, x in zip(prompts, passages)) * (1 + twice)


def test_leaning_is_drawn_by_what_a_prompt_says(home, lm):
    memory = opened(home, lm)
    prompt = DRAW.integers(0, 256, 5).astype(np.int32)
    like = np.exp(-memory.weigh([prompt], [prompt], [NOTHING])[:, 0])
    wanted = like[Side.MEMORY] / like.sum()
    run = lambda **more: atom_jax.generate(  # noqa: E731
        lm, [prompt] * 200, 1, key=jax.random.key(3), stop_ids=[], memory=memory, **{"temperature": 1.0, **more}
    )
    share = run().stats["leaning"]
    # A draw of texts, which no option about tokens changes.
    assert run(temperature=0.5, top_p=0.3, top_k=2).stats["leaning"] == share
    assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / 200) ** 0.5 and 0 < share < 1
    assert run().ids == run().ids


def test_rows_that_lean_on_nothing_choose_nothing(home, lm, monkeypatch):
    memory = opened(home, lm, choice=Choice(whole=0, pages=2, page=32, stride=3, resident=0))
    assert memory.paged
    prompts, more = [TEXTS[0][3:30], TEXTS[3], TEXTS[1][:9]], [DRAW.integers(0, 256, (3, 1)) for _ in range(8)]
    side = np.array([Side.NOTHING, Side.MEMORY, Side.NEAR], np.int32)
    found = logits(lm, prompts, more, gate.front(memory.fronts(), side))
    for i, prompt in enumerate(prompts):
        front = gate.front(memory.fronts(), side[i : i + 1])
        wanted = logits(lm, [prompt], [m[i : i + 1] for m in more], front)[:, 0]
        np.testing.assert_allclose(found[:, i], wanted, atol=2e-4, rtol=2e-4)
    calls, fetch = [], pages.Pages.__call__
    monkeypatch.setattr(pages.Pages, "__call__", lambda self, *which: calls.append(1) or fetch(self, *which))
    counts = []
    for one in ([Side.MEMORY], [Side.NEAR], [Side.NOTHING]):
        session = Session.prefill(lm, prompts[:1], memory=gate.front(memory.fronts(), np.array(one, np.int32)))
        calls.clear()
        for token in range(8):
            session = session.step([token])
        session.logits.block_until_ready()
        counts.append(len(calls))
    assert counts[0] > 0 == counts[1] == counts[2]
    session = Session.prefill(lm, prompts, memory=gate.front(memory.fronts(), side))
    near = memory.length - memory.held
    assert session.use()[0].tolist() == [len(p) + n for p, n in zip(prompts, (0, memory.length, near))]
    assert session.use()[1][0] == len(prompts[0])


def test_what_is_said_is_remembered_the_same_whatever_stood_in_front(home, lm, tmp_path):
    shutil.copytree(home, tmp_path / "m")
    (first,) = lm.tokenizer.front
    with opened(tmp_path / "m", lm) as memory:
        prompts = ["abcdefgh", "zyxwvuts"]
        sides = iter(([Side.NOTHING, Side.NEAR], [Side.MEMORY, Side.NOTHING]))
        memory.weigh = lambda *_: -np.eye(len(Side))[next(sides)].T
        for _ in range(2):
            atom_jax.generate(lm, prompts, 1, memory=memory, remember=True, stop_ids=[])
            latest = [memory.ids(source.name)[:9].tolist() for source in memory.sources[-2:]]
            assert latest == [[first, *prompt.encode()] for prompt in prompts]
            for source in [source.name for source in memory.sources[3:]]:
                memory.forget(source)


def test_the_mixture_is_one_of_whole_texts():
    nats, weight = DRAW.exponential(2, (3, 4, 7)), DRAW.normal(0, 5, (3, 4))
    weight[2, 1] = -np.inf
    found = gate.mixed(weight, nats)
    share = np.exp(weight - np.logaddexp.reduce(weight, axis=0))
    wanted = -np.log((share[..., None] * np.exp(-nats.cumsum(2))).sum(0))
    np.testing.assert_allclose(found.cumsum(1), wanted, rtol=1e-9)


def logits(lm, prompts, more, memory):
    """After the prompts, and after all further tokens, [1 + len(more), b, v]."""
    session = Session.prefill(lm, prompts, memory=memory)
    out = [np.asarray(session.logits)]
    for ids in more:
        session = session.extend(list(ids))
        out.append(np.asarray(session.logits))
    return np.stack(out)


def test_near_is_sinks_and_window(home, lm):
    memory = opened(home, lm)
    near = memory.length - memory.held
    lengths = lambda *side: gate.front(memory.fronts(), np.array(side, np.int32)).length.tolist()  # noqa: E731
    assert memory_lib.nodes(memory.fronts().near)[-1].length.tolist() == [near]
    assert lengths(Side.NEAR, Side.NEAR) == [near] * 2 and lengths(Side.NOTHING) == [0]
    assert lengths(Side.PASSAGES, Side.AGAIN, Side.NOTHING) == [memory.length, near, 0]
    assert memory.front().length.tolist() == lengths(Side.MEMORY) == [memory.length]
