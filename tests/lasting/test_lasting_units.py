"""Memories of models with units of their own: entries are units, and reading in parts is reading at once."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.chunking import bytemodel
from atom_jax.chunking.bytemodel import ByteModel
from atom_jax.inference import score
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.lasting import inside
from atom_jax.lasting import memory as memory_module
from atom_jax.lasting.memory import Memory
from atom_jax.models import attention, registry
from atom_jax.nn.attention import Tokens
from atom_jax.session.session import Session
from atom_jax.typing import AtomError
from tests.contract import cells
from tests.lasting.test_lasting_reading import files, interrupt

# Units that start (of units), units that end (and one that holds nothing), ends that are seen a byte late.
CASES = ("hnet-hnet-2", "hnet-words", "bolmo-olmo3-sliding")
LONG, PROMPT = 150, 25


@functools.cache
def text(name, n):
    """The first n bytes of one text."""
    (ids,) = cells.texts(cells.example(name), n)
    return ids


@functools.cache
def at_once(name):
    """A long text with a prompt behind it, read at once: nats f32 [t - 1] of all but the first, the bytes at which
    units begin or end, i64 [u], and logits f32 [t, v]."""
    lm, ids = cells.example(name), text(name, LONG) + text(name, PROMPT)
    out, codec = atom_jax.apply(lm, [ids]), registry.of(lm.config).codec(lm.config)
    said = jax.nn.log_softmax(codec.merge(out.logits[0]))
    nats = -np.take_along_axis(np.asarray(said[:-1]), codec.plain(np.array(ids[1:]))[:, None], axis=1)[:, 0]
    return nats, np.flatnonzero(out.aux["boundaries"][-1][0]), np.asarray(out.logits[0])


def part(name):
    """Units of a part, of which the long text has one and a half."""
    return max(2 * int((at_once(name)[1] < LONG).sum()) // 3, 8)


def opened(path, name, **more):
    return Memory.open(path, cells.example(name), **({"part": part(name), "law": "all:block=8", "sinks": 2} | more))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("units")


@pytest.fixture(scope="module")
def read(home, scanned):
    """A memory of a short text and the long one, by name."""

    @functools.cache
    def of(name):
        with opened(home / name, name) as memory:
            memory.read(text(name, 30), "short")
            memory.read(text(name, LONG), "long")
        return opened(home / name, name)

    return of


@pytest.mark.parametrize("name", CASES)
def test_reading_in_parts_is_reading_at_once(tmp_path, scanned, name):
    lm, ids = cells.example(name), text(name, LONG)
    memory, about = opened(tmp_path / "m", name), inside.of(lm.config)
    done, (nats, at, logits) = memory.read(ids, "a"), at_once(name)
    stats, (source,) = memory.stats(), memory.sources
    assert source.units > part(name) and stats["units"] == source.units == stats["entries"]
    assert abs(done.nll * LONG - nats[: LONG - 1].sum()) < 1e-2
    # Entries are of half precision. A Bolmo says of a prompt's last byte first whether it ends a patch.
    found = Session.prefill(lm, [text(name, PROMPT)], memory=memory.front()).logits[0]
    np.testing.assert_allclose(found, logits[-1 - about.late], atol=5e-3, rtol=5e-3)
    # Every unit knows its bytes, and of those at the end no more is said than was read.
    at, ends = at[at + about.late < LONG], memory.ends("a")
    wanted = np.append(at[1:], LONG) if about.starts else at + 1
    assert ends[len(ends) - len(wanted) :].tolist() == wanted.tolist() and not ends[: len(ends) - len(wanted)].any()


def test_rows_lean_on_units_each_by_itself(read):
    name = "bolmo-olmo3-sliding"
    lm, memory = cells.example(name), read(name)
    prompts = [text(name, PROMPT), text(name, 3), [105]]
    made = atom_jax.generate(lm, prompts, 6, stop_ids=[], memory=memory)
    alone = [atom_jax.generate(lm, [p], 6, stop_ids=[], memory=memory).ids[0] for p in prompts[1:]]
    assert made.ids[1:] == alone


def test_every_part_sees_the_part_before(tmp_path, monkeypatch):
    """As a text read at once sees it whose attention ends there, over so many bytes that places are given anew."""
    name, real = "hnet-words", attention.self_attend
    lm, ids = cells.example(name), text("hnet-words", 400)

    def banded(q, k, v, tokens, *, window, **others):
        if window is not None:
            return real(q, k, v, tokens, window=window, **others)
        part = tokens.positions[0] // 8
        seen = (part[:, None] - part[None] <= 1) & (tokens.positions[0][:, None] >= tokens.positions[0][None])
        seen &= (tokens.segments[0] > 0)[None]
        scores = jnp.einsum("bhgtk,bhsk->bhgts", q, k) * q.shape[-1] ** -0.5
        scores = jnp.where(jnp.broadcast_to(seen[None, None, None], scores.shape), scores, -1e30)
        return jnp.einsum("bhgts,bhsk->bhgtk", jax.nn.softmax(scores), v)

    memory = opened(tmp_path / "m", name, sinks=0, part=8)
    about, found = inside.of(lm.config), memory.read(ids).nll
    assert len(ids) > about.near + 64 > memory.taken and memory.sources[0].units > 5 * 8
    monkeypatch.setattr(attention, "self_attend", banded)
    # Traced anew.
    jax.clear_caches()
    wanted = -np.asarray(score.logprobs(lm, [ids])).sum() / len(ids)
    jax.clear_caches()
    assert abs(found - wanted) < 1e-4


def test_lower_positions_change_nothing_for_an_entropy_model():
    cfg = ByteModel(d_model=16, n_layers=1, n_heads=2, d_ff=16, window=4)
    p, run = params.init(jax.random.key(0), bytemodel.spec(cfg)), jax.jit(bytemodel.apply, static_argnames="cfg")

    def read(state, first):
        tokens = Tokens(jnp.arange(first, first + 6)[None], jnp.ones((1, 6), jnp.int32))
        return run(p, jnp.arange(40 + first % 4, 46 + first % 4)[None], tokens, state, cfg=cfg)

    _, state = read(bytemodel.init_state(cfg, 1), 0)
    wanted, _ = read(state, 6)
    found, _ = read(bytemodel.nearer(state, jnp.array([4]), cfg=cfg), 2)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", CASES[1:])
def test_sessions_do_not_matter(tmp_path, scanned, monkeypatch, name):
    ids = text(name, 400)
    law = "sqrt:entries=4,block=8"
    with opened(tmp_path / "one", name, law=law) as memory:
        memory.read(ids, "a")
        memory.read(ids[:20], "b")
        whole = files(memory)
    assert memory.stats()["held"] == memory.stats()["law"] < memory.stats()["units"]
    monkeypatch.setattr(memory_module, "COMMIT", 32)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "cut", name, law=law).read(ids, "a", say=interrupt(1))
    done = opened(tmp_path / "cut", name, law=law).read(ids, "a")
    assert 0 < done.tokens < len(ids)
    opened(tmp_path / "cut", name, law=law).read(ids[:20], "b")
    again = Memory.open(tmp_path / "cut")
    assert files(again) == whole and again.ends("a").tolist() == memory.ends("a").tolist()


def test_recall_shows_the_bytes_of_units(read):
    name = "hnet-words"
    memory, ids = read(name), text(name, LONG)
    (found,) = memory.recall([text(name, PROMPT)], k=3)
    ends = memory.ends("long")
    assert found[0].weight > 0 and sum(page.weight for page in found) <= 1 + 1e-6
    for page in found:
        assert page.of == "tokens" and page.source in ("short", "long")
        if page.source == "long":
            assert page.first in (0, *ends) and page.last + 1 in ends
            assert page.text == cells.example(name).tokenizer.decode(ids[page.first : page.last + 1])
    assert any(page.source == "long" for page in found)


def test_units_choose_pages(read, home, scanned):
    name = "hnet-words"
    lm, choice = cells.example(name), Choice(whole=8, pages=2, page=4, stride=2)
    read(name)
    memory, prompts = opened(home / name, name, choice=choice), [text(name, PROMPT), [105], text(name, 9)]
    made = atom_jax.generate(lm, prompts, 12, stop_ids=[], memory=memory).ids
    assert [atom_jax.generate(lm, [p], 12, stop_ids=[], memory=memory).ids[0] for p in prompts[:2]] == made[:2]


def test_a_prompt_behind_what_is_left_begins_a_text(read, scanned, tmp_path):
    name = "hnet-words"
    lm, prompt, memory = cells.example(name), text(name, PROMPT), opened(tmp_path / "m", name)
    memory.read(text(name, 30), "a")
    memory.read(text(name, 40), "b")
    memory.forget("b")
    assert memory.taken == memory.length == memory.stats()["held"]
    session = Session.prefill(lm, [prompt], memory=memory.front())
    # The unit that holds nothing is there again.
    first = inside.of(lm.config)
    assert session.length.tolist() == [25] and first.near == 264
    assert abs(session.logits - Session.prefill(lm, [prompt]).logits).max() > 1e-3


def test_whole_rows_of_a_bolmo_are_refused(read):
    name = "bolmo-olmo3-sliding"
    with pytest.raises(AtomError, match="sees a byte ahead where units end"):
        atom_jax.apply(cells.example(name), [[5, 6]], memory=read(name))


def test_what_is_refused(tmp_path):
    name = "bolmo-olmo3-sliding"
    for other in ("hnet-gumbel", "hnet-magnet"):
        with pytest.raises(AtomError, match="this hnet model has layers of other kinds"):
            Memory.open(tmp_path / "x", cells.example(other))
    with pytest.raises(AtomError, match="parts: knn is for transformers; this is a hnet model"):
        Memory.open(tmp_path / "x", cells.example("hnet-words"), part=8, parts=("knn",))
    with pytest.raises(AtomError, match="part: of a model with units of its own it has at least 8 of them, got 4"):
        Memory.open(tmp_path / "x", cells.example(name), part=4, sinks=2)
    with pytest.raises(AtomError, match="2 sinks and two parts of 300 units exceed the 512 positions"):
        Memory.open(tmp_path / "x", cells.example(name), part=300, sinks=2)
    assert not (tmp_path / "x").exists()


def test_whole_rows_have_room_for_more_units_than_are_expected(monkeypatch):
    lm, ids, sizes = cells.example("hnet-words"), np.zeros((1, 40), int), []
    cfg = dataclasses.replace(lm.config, chunking=(dataclasses.replace(lm.config.chunking[0], capacity=0.25),))
    lm = dataclasses.replace(lm, config=cfg)
    front = registry.of(cfg).init_cache(cfg, 1, 8)
    memory = SimpleNamespace(
        length=9, states=0, taken=9, chooses=False, belongs=lambda lm: True, mixing=lambda params: params,
        front=lambda rows: front,
    )  # fmt: skip

    def lossy(params, batch, cache, *, cfg, **options):
        (layer,) = memory_lib.layers(memory_lib.nodes(cache)[-1])
        sizes.append((layer.k.shape[-2], cfg.chunking[0].capacity))
        return None, cfg.chunking[0].capacity < 1

    monkeypatch.setattr(score, "_apply", lossy)
    monkeypatch.setattr(score, "_logprobs", lossy)
    for run in (score.apply, score.logprobs):
        run(lm, ids, memory=memory)
    assert [capacity for _, capacity in sizes] == [0.25, 0.5, 1] * 2
    assert all(room > 40 * capacity for room, capacity in sizes)
