"""Rows that lean on entries which stay on disk: their pages, chosen by mean keys, are those of the reference."""

import dataclasses

import numpy as np
import pytest

import atom_jax
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.kvcache.lasting.paged import FETCHES, FetchedLayer
from atom_jax.kvcache.memory import layers
from atom_jax.lasting import codec
from atom_jax.session.session import Session
from atom_jax.typing import AtomError
from tests.lasting.naive import Naive
from tests.lasting.test_lasting_reading import PROMPT, TEXTS, lm_of, opened

PAGE = 3
CHOICE = Choice(whole=20, pages=3, page=PAGE, stride=2, resident=0)


class ByMeans(Naive):
    """Pages of three, which end with their blocks, and are chosen by their mean keys."""

    def cuts(self):
        ends = np.cumsum([*(len(block[0][0]) for _, block in self.blocks), len(self.waiting)])
        return [range(a, min(a + PAGE, b)) for start, b in zip([0, *ends], ends) for a in range(start, b, PAGE)]

    def demand(self, q_tgk, entries, choice):
        cuts = self.cuts()
        means = np.array([np.mean([entries[i][2] for i in cut], axis=0) for cut in cuts]).astype(np.float16)
        scores = np.einsum("tgk,pk->tgp", q_tgk, means.astype(np.float64)) * self.cfg.head_dim**-0.5
        w = np.exp(scores) * np.array([len(cut) for cut in cuts])
        return (w / w.sum(-1, keepdims=True)).max((0, 1))

    def pages(self, demand, entries, choice):
        demand = np.maximum(demand, np.append(0, demand[:-1]))
        best = sorted(np.argsort(-demand, kind="stable")[: choice.pages])
        return [entries[i] for p in best for i in self.cuts()[p]]


def test_pages_on_disk_are_chosen_as_in_the_reference(tmp_path, scanned, monkeypatch):
    monkeypatch.setattr(codec, "PAGE", PAGE)
    lm = lm_of("olmo3")
    memory = opened(tmp_path / "m", "olmo3", choice=CHOICE)
    naive = ByMeans(lm, memory.settings)
    for text in TEXTS[:3]:
        memory.read(text)
        naive.read(text)
    wanted = naive.answer(PROMPT[0], 5, CHOICE)
    session = Session.prefill(lm, [PROMPT[0].tolist()], memory=memory.front())
    found = [session.logits[0]]
    for logits in wanted[:-1]:
        session = session.step([int(logits.argmax())])
        found.append(session.logits[0])
    np.testing.assert_allclose(found, wanted, atol=5e-4, rtol=5e-4)
    held, seen = session.use()
    # What is near, the pages, the tokens since; mean keys, half of an entry each, once in two tokens. Half of the
    # layers have their window of 11.
    (layer,) = (x for x in layers(session.memory) if isinstance(x, FetchedLayer))
    near = (layer.near_pos[0] >= 0).sum() + session.length[0] - layer.start[0, 0]
    read = near + (layer.page_pos >= 0).sum(-1).mean() + len(memory._pages.sizes) / 4
    assert memory.paged and abs(seen[0] - (read + 11) / 2) < 1e-4 and seen[0] < held[0]
    # What was said of a page while rows were read is said to whoever looks.
    memory._pages.failed = AtomError("seg: page 1 differs")
    for look in (lambda: session.logits, lambda: atom_jax.generate(lm, [PROMPT[0].tolist()], 1, memory=memory)):
        with pytest.raises(AtomError, match="page 1 differs"):
            look()
    memory.choice = Choice(whole=20, page=4, resident=0)
    memory.close()
    with pytest.raises(AtomError, match="are in pages of 3, not of 4"):
        memory.front()


def test_rows_keep_open_what_they_lean_on(tmp_path, scanned, monkeypatch):
    monkeypatch.setattr(codec, "PAGE", PAGE)
    lm, prompt = lm_of("olmo3"), [PROMPT[0].tolist()]
    memory = opened(tmp_path / "m", "olmo3", choice=dataclasses.replace(CHOICE, whole=0))
    memory.read(TEXTS[4][:12])
    # All of it is in the window.
    assert memory.chooses and not memory.paged and memory.front()
    memory.read(TEXTS[0])
    first = atom_jax.generate(lm, prompt, 2, stop_ids=[], memory=memory, keep_memory=True)
    late, number = memory.front(), memory._pages.number
    stays = first.memory.fork()
    memory.read(TEXTS[3])
    memory.front()
    assert number in FETCHES and number != memory._pages.number
    memory.close()
    # The same rows go on as if nothing had happened.
    later = atom_jax.generate(lm, [[3]], 4, stop_ids=[], after=first).ids
    assert np.isfinite(stays.extend([[3]]).logits).all() and len(later[0]) == 4
    del first, stays
    assert number not in FETCHES
    with pytest.raises(AtomError, match="that was closed, or has changed since"):
        Session.prefill(lm, prompt, memory=late)
