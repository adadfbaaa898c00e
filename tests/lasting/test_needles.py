"""Models that have learned to recall answer from a memory what their window can't hold, and not without it."""

import numpy as np
import pytest

import atom_jax
from atom_jax.inference import score
from atom_jax.kvcache.lasting.chosen import Choice, of
from atom_jax.lasting.codec import CODECS
from atom_jax.lasting.memory import Memory
from atom_jax.session.session import Session
from tests.lasting import toys
from tests.lasting.test_lasting_reading import lm_of
from tests.lasting.toys import KEYS, VALUES, toy

pytestmark = pytest.mark.usefixtures("scanned")
# The last facts are three parts back when a question is asked.
NEEDLES, PART, TOKENS = 24, 16, 224
ALL = toys.facts(1, NEEDLES)
FEW, AT = ALL[::4], np.arange(6) * 34 + 4
HAY = KEYS + VALUES


def opened(path, lm, **more):
    return Memory.open(path, lm, **({"part": PART, "sinks": 2, "choice": Choice(gated=False)} | more))


def read(path, lm, facts, places, **more):
    memory = opened(path, lm, **more)
    memory.read(toys.text(facts, places, TOKENS))
    assert memory.length > 0
    return memory


def right(lm, facts, memory=None):
    """Facts that are answered after their keys."""
    made = atom_jax.generate(lm, [[HAY, int(key)] for key, _ in facts], 1, stop_ids=[], memory=memory).ids
    return sum(ids == [value] for ids, (_, value) in zip(made, facts))


@pytest.mark.parametrize("family", toys.FAMILIES)
def test_needles_are_answered_from_a_memory(tmp_path, family):
    lm, places = toy(family), np.arange(NEEDLES) * 8 + 2
    memory = read(tmp_path / "m", lm, ALL, places, law="all:block=16")
    assert right(lm, ALL, memory) >= NEEDLES - 4 and right(lm, ALL) <= NEEDLES // 4
    rows = np.array([[HAY, *fact] for fact in ALL])
    with_it, alone = (np.asarray(score.logprobs(lm, rows, **more))[:, 1] for more in ({"memory": memory}, {}))
    assert np.median(with_it) > np.log(0.5) and np.median(alone) < np.log(0.2)


@pytest.mark.parametrize("law", ["log:entries=16,block=32", "sqrt:entries=16,block=32"])
def test_few_entries_are_enough_where_the_score_finds_them(tmp_path, law):
    lm, found = toy("llama"), {}
    for name in ("surprise", "recent"):
        memory = read(tmp_path / name, lm, FEW, AT, law=law, score=name)
        assert memory.held == memory.stats()["law"] < TOKENS / 2
        found[name] = right(lm, FEW, memory)
    assert found["surprise"] == len(FEW) and found["recent"] <= len(FEW) // 2 + 1


def test_a_prompt_that_knows_a_fact_leans_on_the_others(tmp_path):
    lm = toy("llama")
    memory = read(tmp_path / "m", lm, FEW, AT, law="all:block=16", choice=Choice())
    prompts = [[*FEW[:3].ravel().tolist(), int(key)] for key, _ in FEW[3:]]
    made = atom_jax.generate(lm, prompts, 1, stop_ids=[], memory=memory)
    assert [ids[0] for ids in made.ids] == FEW[3:, 1].tolist() and made.stats["leaning"] == 1


def test_needles_are_found_in_what_is_stored_with_less(tmp_path, monkeypatch):
    monkeypatch.setitem(CODECS, "vq", CODECS["vq"]._replace(least=128))
    lm, places, found = toy("llama"), np.arange(NEEDLES) * 8 + 2, {}
    for codec in CODECS:
        memory = read(tmp_path / codec, lm, ALL, places, law="all:block=16", codec=codec)
        assert (memory._manifest.codes is not None) == (codec == "vq")
        found[codec] = right(lm, ALL, memory)
    assert abs(found["int8"] - found["float16"]) <= 1 and found["float16"] >= NEEDLES - 4
    assert found["vq"] > NEEDLES // 3


def test_what_is_forgotten_is_answered_no_more_and_the_rest_no_worse(tmp_path):
    lm, parts, memory = toy("llama"), np.split(ALL, 3), opened(tmp_path / "m", toy("llama"), law="all:block=16")
    for name, facts in zip("abc", parts):
        memory.read(toys.text(facts, np.arange(8) * 6 + 2, 72), name)
    before = [right(lm, facts, memory) for facts in parts]
    memory.forget("b")
    after = [right(lm, facts, memory) for facts in parts]
    assert min(before) >= 6 and after[0] >= before[0] and after[2] >= before[2] and after[1] <= 2


def test_answers_that_share_no_page_with_what_is_forgotten_do_not_change(tmp_path):
    lm, rng = lm_of("llama"), np.random.default_rng(5)
    choice = Choice(whole=0, pages=2, page=4, stride=64, gated=False)
    memory = Memory.open(tmp_path / "m", lm, law="all:block=8", part=8, sinks=0, choice=choice)
    for name, n in (("a", 24), ("gone", 16), ("b", 40), ("c", 16)):
        memory.read(rng.integers(0, 256, n), name)
    prompts = [rng.integers(0, 256, 3).tolist() for _ in range(24)]
    number = next(s.id for s in memory.sources if s.name == "gone")
    # Values of the first layer are those of their tokens, wherever these stand.
    gone = {e.v[i, j, n].tobytes() for e in memory.entries() for n in np.flatnonzero(e.source == number)
            for i in (1, 2) for j in range(2)}  # fmt: skip

    def asked():
        """Logits, and values of pages, [b, ...]."""
        session = Session.prefill(lm, prompts, memory=memory.front(len(prompts)))
        (layer,) = of(session.memory)
        return np.asarray(session.logits), np.asarray(layer.page_v, np.float16).swapaxes(0, 1)[:, 1:]

    before, pages = asked()
    shared = np.array([any(v.tobytes() in gone for v in row.reshape(-1, row.shape[-1])) for row in pages])
    memory.forget("gone")
    after, others = asked()
    same = (pages == others).all((1, 2, 3, 4))
    # Shares of attention are shares of all that is held, so a choice may become another one.
    assert 4 < shared.sum() < 20 and not same[shared].any() and same[~shared].mean() > 0.6
    np.testing.assert_allclose(after[same], before[same], atol=1e-5)
    assert np.abs(after[shared] - before[shared]).max(-1).min() > 1e-3
