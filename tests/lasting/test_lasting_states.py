"""A memory of states (kNN-LM): what it holds is what the model had, and what it says is what the written-out mixture
has, in scoring and in generation."""

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.inference import score
from atom_jax.kvcache import policies
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.lasting import memory as memory_module
from atom_jax.lasting.memory import Memory
from atom_jax.models import registry, transformer
from atom_jax.nn.neighbours import Neighbours
from atom_jax.typing import AtomError, Batch
from tests.lasting.test_lasting_reading import PROMPT, TEXTS, interrupt, lm_of, opened

# Texts no longer than two parts, which their tokens see whole.
SHORT = TEXTS[1], TEXTS[2], TEXTS[4], TEXTS[2][:1]
HOW = Neighbours(nearest=6, temperature=8.0, weight=0.6)
PROMPTS = [PROMPT[0].tolist(), [7], TEXTS[1][3:14].tolist()]
HIDDEN = jax.jit(transformer.hidden, static_argnames="cfg")


def states(path, *parts, **more):
    return opened(path, "llama", parts=parts or ("knn",), neighbours=HOW, **more)


def hidden(ids):
    """Final states [t, d] of a row, by the model alone."""
    t, lm = len(ids), lm_of("llama")
    padded = np.zeros((1, 32), np.int32)
    padded[0, :t] = ids
    at = np.arange(32, dtype=np.int32)[None]
    return np.asarray(HIDDEN(lm.params, Batch(padded, at, (at < t).astype(np.int32)), cfg=lm.config)[0][0, :t])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The short texts in a memory of states, and in one of entries and states."""
    path = tmp_path_factory.mktemp("states")
    for name, parts in (("knn", ("knn",)), ("both", ("levels", "knn"))):
        with states(path / name, *parts) as memory:
            for i, text in enumerate(SHORT):
                memory.read(text, f"t{i}")
    return path


def test_it_holds_what_the_model_had_and_mixes_it_in(home):
    lm, memory = lm_of("llama"), states(home / "knn")
    held, ends = memory._states(), [len(text) - 1 for text in SHORT]
    x = np.concatenate([hidden(text)[:-1] for text in SHORT])
    assert held.x.dtype == np.float16 and memory.states == sum(ends) == len(x) and memory.length == 0
    np.testing.assert_allclose(held.x, x, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(held.following, np.concatenate([text[1:] for text in SHORT]))
    np.testing.assert_array_equal(held.source, np.repeat(range(4), ends))
    np.testing.assert_array_equal(held.place, np.concatenate([np.arange(n) for n in ends]))

    q, own = hidden(PROMPT[0]), np.asarray(atom_jax.apply(lm, PROMPT).logits[0])
    own = np.exp(own - own.max(-1, keepdims=True))
    d = np.square(q[:, None].astype(np.float64) - held.x[None]).sum(-1)
    d = np.where(d <= np.sort(d, axis=1)[:, [HOW.nearest - 1]], d, np.inf)
    w = np.exp(-(d - d.min(1, keepdims=True)) / HOW.temperature)
    said = np.stack([np.bincount(held.following, row, lm.config.vocab_size) for row in w / w.sum(1, keepdims=True)])
    wanted = (1 - HOW.weight) * own / own.sum(-1, keepdims=True) + HOW.weight * said
    found = np.asarray(atom_jax.apply(lm, PROMPT, memory=memory).logits[0])
    np.testing.assert_allclose(np.exp(found), wanted, atol=2e-4)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-5)
    each = np.asarray(score.logprobs(lm, PROMPT, memory=memory))[0]
    np.testing.assert_allclose(each, found[np.arange(8), PROMPT[0, 1:]], atol=1e-5)


def test_rows_are_continued_by_the_mixture_each_by_itself(home, scanned):
    lm, memory = lm_of("llama"), states(home / "knn")
    made = atom_jax.generate(lm, PROMPTS, 5, stop_ids=[], memory=memory)
    for prompt, ids in zip(PROMPTS, made.ids):
        both = np.zeros((1, 24), int)
        both[0, : len(prompt) + 5] = prompt + ids
        taught = np.asarray(atom_jax.apply(lm, both, memory=memory).logits[0]).argmax(-1)
        assert taught[len(prompt) - 1 :][:5].tolist() == ids
    plain = atom_jax.generate(lm, PROMPTS, 5, stop_ids=[])
    assert made.ids != plain.ids and made.stats["kv_reads"] == plain.stats["kv_reads"]
    first = atom_jax.generate(lm, PROMPTS[2:], 5, stop_ids=[], memory=memory, keep_memory=True)
    assert first.ids == made.ids[2:]
    later = atom_jax.generate(lm, [[3]], 3, stop_ids=[], after=first).ids
    assert atom_jax.generate(lm, [PROMPTS[2] + first.ids[0] + [3]], 3, stop_ids=[], memory=memory).ids == later
    drafts = {"draft": "ngram", "draft_tokens": 3}
    assert atom_jax.generate(lm, PROMPTS[2:], 5, stop_ids=[], memory=memory, **drafts).ids == first.ids
    # No weight: the model as it is, to the bit.
    memory = opened(home / "knn", "llama", neighbours=Neighbours(weight=0))
    assert atom_jax.generate(lm, PROMPTS, 5, stop_ids=[], memory=memory).ids == plain.ids
    alone = atom_jax.apply(lm, PROMPT).logits
    np.testing.assert_array_equal(atom_jax.apply(lm, PROMPT, memory=memory).logits, alone)


def test_beside_entries_and_beside_a_cache_policy(home, scanned):
    lm, both = lm_of("llama"), states(home / "both", "levels", "knn")
    levels = opened(home / "both", "llama", neighbours=Neighbours(weight=0))
    assert both.length == levels.length > 0 and both.states == states(home / "knn").states
    mixture, plain = (np.asarray(atom_jax.apply(lm, PROMPT, memory=m).logits[0]) for m in (both, levels))
    plain = np.exp(plain - plain.max(-1, keepdims=True))
    plain /= plain.sum(-1, keepdims=True)
    # What is mixed in is a distribution, with the weight that it is to have.
    said = np.exp(mixture) - (1 - HOW.weight) * plain
    assert said.min() > -1e-6 and np.abs(said.sum(-1) - HOW.weight).max() < 1e-5 and (said > 1e-4).sum(-1).max() <= 6
    both.choice = Choice(gated=False)
    assert atom_jax.generate(lm, PROMPTS[:1], 2, memory=both, stop_ids=[]).ids[0][0] == mixture[-1].argmax()
    small = registry.with_memory(lm, policies.parse("streaming_llm:budget=8"))
    made = atom_jax.generate(small, PROMPTS[:1], 2, stop_ids=[], memory=states(home / "knn"))
    assert len(made.ids[0]) == 2 and made.stats["kv_reads"] < 18
    with pytest.raises(AtomError, match="this model's cache policy would not do"):
        atom_jax.generate(small, PROMPTS[:1], 2, memory=both)


def test_recall_names_where_the_nearest_states_are(home):
    memory = states(home / "knn")
    (found,) = memory.recall([TEXTS[1][:10].tolist()], k=9)
    assert (found[0].source, found[0].first, found[0].last) == ("t0", 0, 19) and found[0].weight > 0.5
    assert abs(sum(page.weight for page in found) - 1) < 1e-5
    assert {page.source for page in found} <= {"t0", "t1", "t2"}


def test_sessions_do_not_matter_and_what_is_held_grows_with_what_was_read(tmp_path, monkeypatch):
    whole = states(tmp_path / "one")
    sizes = []
    for text in TEXTS[:3]:
        whole.read(text)
        sizes.append(whole.stats()["state_bytes"])
    assert whole.states == 74 + 19 + 2 and whole.held == 0
    # 16 numbers of half precision and a token for each; the rest are headers.
    assert sizes[2] == sum((tmp_path / "one" / s.state[0]).stat().st_size for s in whole.sources)
    assert abs(sizes[1] - sizes[0] - (sizes[2] - sizes[1]) - 17 * 36) < 32
    monkeypatch.setattr(memory_module, "COMMIT", 32)
    for text in TEXTS[:3]:
        for calls in (2, 1, 9):
            try:
                states(tmp_path / "cut").read(text, say=interrupt(calls))
            except KeyboardInterrupt:
                continue
    cut = states(tmp_path / "cut")
    assert len(cut.sources[0].state) > 1
    for a, b in zip(cut._states(), whole._states()):
        np.testing.assert_array_equal(a, b)

    # What is forgotten is nowhere, and damage is named.
    needle = whole._states().x[:74].tobytes()[:64]
    in_it = lambda: [p.name for p in (tmp_path / "one").iterdir() if needle in p.read_bytes()]  # noqa: E731
    (file,) = in_it()
    assert file == whole.sources[0].state[0] and whole.verify() > 0
    whole.forget(whole.sources[0].name)
    assert not in_it() and whole.states == 21 and len(whole._states().x) == 21
    other = tmp_path / "one" / whole.sources[0].state[0]
    data = bytearray(other.read_bytes())
    data[-3] ^= 4
    other.write_bytes(data)
    for look in (whole.verify, lambda: atom_jax.apply(lm_of("llama"), PROMPT, memory=states(tmp_path / "one"))):
        with pytest.raises(AtomError, match=rf"{other}: tensor '\w+' is not what was written"):
            look()


def test_what_is_asked_wrongly(home, tmp_path):
    for parts in (("levels", "cards"), (), "knn", ("knn", "levels")):
        with pytest.raises(AtomError, match="parts: expected levels or knn, or both in this order"):
            opened(tmp_path / "m", "llama", parts=parts)
    with pytest.raises(AtomError, match="its parts is knn, and was asked to be levels,knn"):
        states(home / "knn", "levels", "knn")
    for look in (states(home / "knn").ids, states(home / "knn").ends):
        with pytest.raises(AtomError, match="has no source 'nowhere'; it has read t0, t1, t2, t3"):
            look("nowhere")
    with pytest.raises(AtomError, match="was opened without a model, which answering needs"):
        Memory.open(home / "knn").mixing({})
    path = home / "knn"
    text = (path / "MEMORY.json").read_text()
    (path / "MEMORY.json").write_text(text.replace('"tokens": 20', '"tokens": 21'))
    with pytest.raises(AtomError, match="holds 19 states of t0, and not 20"):
        Memory.open(path).verify()
    with pytest.raises(AtomError, match="holds 20 ids and 0 units of t0, and not 21 and 0"):
        Memory.open(path).ids("t0")
    (path / "MEMORY.json").write_text(text)
