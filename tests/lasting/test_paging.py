"""Rows that lean on entries which stay on disk: their pages, chosen by mean keys, are those of the reference."""

import types

import numpy as np
import pytest

import atom_jax
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.lasting import codec
from atom_jax.session.session import Session
from atom_jax.typing import AtomError
from tests.lasting.naive import Naive
from tests.lasting.test_lasting_reading import PROMPT, TEXTS, lm_of, opened

PAGE = 3
CHOICE = Choice(whole=20, pages=3, page=PAGE, stride=2, resident=0)


class ByMeans(Naive):
    """Pages of three, which end with their blocks, and are chosen by their mean keys."""

    def pages(self, q_tgk, entries, choice):
        ends = np.cumsum([*(len(block[0][0]) for _, block in self.blocks), len(self.waiting)])
        cuts = [range(a, min(a + PAGE, b)) for start, b in zip([0, *ends], ends) for a in range(start, b, PAGE)]
        means = np.array([np.mean([entries[i][2] for i in cut], axis=0) for cut in cuts]).astype(np.float16)
        scores = np.einsum("tgk,pk->tgp", q_tgk, means.astype(np.float64)) * self.cfg.head_dim**-0.5
        w = np.exp(scores) * np.array([len(cut) for cut in cuts])
        demand = (w / w.sum(-1, keepdims=True)).max((0, 1))
        demand = np.maximum(demand, np.append(0, demand[:-1]))
        best = sorted(np.argsort(-demand, kind="stable")[: choice.pages])
        return [entries[i] for p in best for i in cuts[p]]


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
    assert memory.paged and seen[0] < held[0]
    memory.check()
    # What was said of a page while rows were read is said by whoever asked.
    memory._pages.append(types.SimpleNamespace(failed=AtomError("seg: page 1 differs"), files={}))
    with pytest.raises(AtomError, match="page 1 differs"):
        atom_jax.generate(lm, [PROMPT[0].tolist()], 1, memory=memory)
    memory.choice = Choice(whole=20, page=4, resident=0)
    memory.close()
    with pytest.raises(AtomError, match="are in pages of 3, not of 4"):
        memory.front()
