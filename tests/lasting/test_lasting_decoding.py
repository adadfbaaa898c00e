"""Rows that lean on a memory: they look back only, mind no other row, and cost no more programs and copies than they
have to."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.inference import score
from atom_jax.kvcache.dense import bucket
from atom_jax.kvcache.lasting.chosen import Choice, of
from atom_jax.lasting import pages, reader
from atom_jax.lasting.front import LEAST, ROOM
from atom_jax.lasting.memory import Memory
from atom_jax.nn.neighbours import Neighbours
from atom_jax.session import decode as decoding
from atom_jax.session import reading, sampling
from atom_jax.session.session import Session
from atom_jax.session.slots import Slots
from tests.lasting.test_lasting_reading import PROMPT, TEXTS, lm_of, opened

pytestmark = pytest.mark.usefixtures("scanned")
NAME = "llama"
WHOLE = Choice(gated=False)
PAGES = Choice(whole=20, pages=2, page=4, stride=2, queries=2, gated=False)
PROMPTS = [PROMPT[0].tolist(), TEXTS[3][:16].tolist(), [7], TEXTS[1][:5].tolist(), TEXTS[0][20:32].tolist()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoding") / "m"
    with opened(path, NAME) as memory:
        for text in TEXTS[:3]:
            memory.read(text)
    return path


def chosen(session):
    """What every row has chosen, [b, ...]: keys of pages in all layers."""
    return np.concatenate([np.asarray(x.page_k).reshape(-1, *x.page_k.shape[-4:]) for x in of(session.memory)])


def test_what_comes_later_changes_no_logit_before(home):
    lm, memory, t = lm_of(NAME), opened(home, NAME, choice=WHOLE), 5
    other = PROMPT.copy()
    other[0, t] = (other[0, t] + 1) % 256
    one, two = (np.asarray(atom_jax.apply(lm, ids, memory=memory).logits[0]) for ids in (PROMPT, other))
    np.testing.assert_array_equal(one[:t], two[:t])
    assert np.abs(one[t:] - two[t:]).max(-1).min() > 1e-3


def test_a_choice_is_by_queries_that_have_come(home):
    memory = opened(home, NAME, choice=PAGES)
    session, same, t = Session.prefill(lm_of(NAME), PROMPTS[:1] * 2, memory=memory.front(2)), [], 5
    for token in range(9):
        session = session.step([token, token + 100 * (token >= t)])
        first, second = chosen(session).swapaxes(0, 1)
        same.append(((first == second).all(), (session.logits[0] == session.logits[1]).all()))
    # The choice of step 6 is the first one by the queries of step 5, in which the rows differ.
    assert same[: t + 1] == [(True, True)] * t + [(True, False)] and not any(pages for pages, _ in same[t + 1 :])


def test_what_comes_later_changes_nothing_that_was_read(tmp_path):
    text, t, held = TEXTS[0], 37, []
    for name in ("one", "two"):
        memory, ids = opened(tmp_path / name, NAME, law="all:block=8"), text.copy()
        ids[t] = (ids[t] + (name == "two")) % 256
        memory.read(ids)
        found = memory.entries()
        held.append({int(p): e.k[:, :, i] for e in found for i, p in enumerate(e.place)})
    before = [p for p in held[0] if p < t]
    assert len(before) == t - 2 and all((held[0][p] == held[1][p]).all() for p in before)
    assert all((held[0][p] != held[1][p]).any() for p in held[0] if p >= t and p < t + 16)


def test_a_part_never_finds_itself(tmp_path):
    """What is looked up is what was committed before: reading is by the model alone, also of a text that is held."""
    lm, how = lm_of(NAME), Neighbours(nearest=1, temperature=1e-3, weight=0.9)
    memory, text = opened(tmp_path / "m", NAME, parts=("knn",), neighbours=how), TEXTS[1][:16]
    first, again = memory.read(text, "a").nll, memory.read(text, "b").nll
    alone = -float(score.logprobs(lm, text[None]).sum()) / len(text)
    assert first == again and abs(first - alone) < 1e-5
    # A prompt of the same tokens finds what was read, and nothing of itself.
    held = memory._states().x.copy()
    found = -float(score.logprobs(lm, text[None], memory=memory).sum()) / len(text)
    assert found < 0.2 < alone - 1 and (memory._states().x == held).all()
    new = TEXTS[3][:16][None]
    own, mixed = (np.asarray(atom_jax.apply(lm, new, **more).logits[0]) for more in ({}, {"memory": memory}))
    said = np.exp(mixed) - 0.1 * np.exp(own - np.logaddexp.reduce(own, axis=-1, keepdims=True))
    # All weight that is mixed in is on tokens that followed in what was read.
    np.testing.assert_allclose(said[:, np.unique(text[1:])].sum(-1), 0.9, atol=1e-5)


@pytest.mark.parametrize("choice", [WHOLE, PAGES], ids=["whole", "pages"])
def test_a_row_alone_says_what_it_says_among_five_lengths(home, choice):
    lm, memory = lm_of(NAME), opened(home, NAME, choice=choice)
    together, more = Session.prefill(lm, PROMPTS, memory=memory.front(5)), [[3] * 5, [200] * 5, [9] * 5]
    if choice is PAGES:
        # They share entries, of which they want different ones.
        assert len({row.tobytes() for row in chosen(together).swapaxes(0, 1)}) > 2
    said = [together.logits]
    for tokens in more:
        together = together.step(tokens)
        said.append(together.logits)
    longest = max(map(len, PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        alone = Session.prefill(lm, [prompt], memory=memory.front(), longest=longest)
        np.testing.assert_allclose(said[0][row], alone.logits[0], atol=2e-4, rtol=2e-4)
        for tokens, wanted in zip(more, said[1:]):
            alone = alone.step(tokens[:1])
            np.testing.assert_allclose(wanted[row], alone.logits[0], atol=2e-4, rtol=2e-4)


def test_greedy_text_is_what_is_likeliest_where_pages_are_chosen_as_often(home):
    lm, memory = lm_of(NAME), opened(home, NAME, choice=PAGES)
    made = atom_jax.generate(lm, PROMPTS[:2], 9, stop_ids=[], memory=memory).ids
    session, seen = Session.prefill(lm, PROMPTS[:2], memory=memory.front(2)), []
    for tokens in zip(*made):
        assert session.logits.argmax(-1).tolist() == list(tokens)
        seen.append(chosen(session))
        session = session.step(list(tokens))
    # Chosen anew before every other token, once two have been read.
    changed = [bool((a != b).any()) for a, b in itertools.pairwise(seen)]
    assert not any(changed[:2]) and not any(changed[3::2]) and any(changed[2::2])


def slots_of(home, choice):
    """Rows that go on, with room for what follows, and their program there."""
    lm, memory = lm_of(NAME), opened(home, NAME, choice=choice)
    session = Session.prefill(lm, PROMPTS[:2], memory=memory.front(2))
    how = decoding.Choice(jax.random.split(jax.random.key(0), 2), sampling.sampler(0.0, 0, 1.0, 0.0), np.array([-1]))
    slots = Slots(session, how)
    slots.prepare([1, 1])
    return slots, memory


def calls_of_the_host(slots):
    run = decoding.decode.lower(
        slots._params, slots._state, slots.choice, np.array([9, 9], np.int32), cfg=slots._lm.config
    )
    return run.as_text().count("callback")


def test_decoding_with_entries_on_the_device_copies_nothing(home):
    slots, _ = slots_of(home, PAGES)
    until, few = jax.device_put(np.array([9, 9], np.int32)), np.array([2, 2], np.int32)
    assert calls_of_the_host(slots) == 0
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            decoding.decode(slots._params, slots._state, slots.choice, few, cfg=slots._lm.config)
        state, _ = decoding.decode(slots._params, slots._state, slots.choice, until, cfg=slots._lm.config)
        jax.block_until_ready(state)
    assert state.made.tolist() == [9, 9]


def test_entries_on_disk_are_asked_for_once_a_stride_in_every_layer(home, monkeypatch):
    choice = dataclasses.replace(PAGES, page=32, resident=0, stride=4)
    calls, fetch = [], pages.Pages.__call__
    monkeypatch.setattr(
        pages.Pages, "__call__", lambda self, layer, which: calls.append(layer) or fetch(self, layer, which)
    )
    slots, memory = slots_of(home, choice)
    assert memory.paged and calls_of_the_host(slots) > 0
    calls.clear()
    state, _ = decoding.decode(
        slots._params, slots._state, slots.choice, np.array([18, 18], np.int32), cfg=slots._lm.config
    )
    jax.block_until_ready(state)
    # 17 tokens are read; before the fifth, ninth, thirteenth and last of them four have come since.
    assert calls == [0, 1, 2] * 4


def test_sessions_make_no_programs_of_their_own(tmp_path):
    lm = lm_of.__wrapped__(NAME)
    programs = reader._read, reading._part, reading.part_in_place, decoding.decode
    count = lambda: [program._cache_size() for program in programs]  # noqa: E731
    jax.clear_caches()
    before, buckets = count(), set()
    for n in (20, 75, 33):
        memory = Memory.open(tmp_path / "m", lm, law="all:block=8", part=16, sinks=2, choice=WHOLE)
        memory.read(np.random.default_rng(n).integers(0, 256, n))
        buckets.add(bucket(memory.length + ROOM, LEAST))
        for prompt in ([5, 6, 7], [8] * n):
            atom_jax.generate(lm, [prompt[:16]], 3, stop_ids=[], memory=memory)
    assert len(buckets) == 1 < memory.length / 64
    read, waits, prompts, made = (b - a for a, b in zip(before, count()))
    assert read == 1 and waits == 0 and 1 <= prompts <= 2 * len(buckets) and 1 <= made <= len(buckets)
