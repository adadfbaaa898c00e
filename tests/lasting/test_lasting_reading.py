"""A memory of a model: what it keeps and says is what the written-out reference has, however reading was cut."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.inference import score
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.kvcache.lasting.score import Linear, Moments, features, fit
from atom_jax.lasting import learned
from atom_jax.lasting import memory as memory_module
from atom_jax.lasting import reader as reader_module
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.reader import Reader
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.rope import RopeScaling
from atom_jax.session.session import Session
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError
from tests.lasting.naive import Naive

SIZES = {
    "vocab_size": 264, "d_model": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 24,
    "max_length": 512,
}  # fmt: skip
YARN = RopeScaling("yarn", factor=4.0, original_max_length=64)
CASES = {
    "llama": ({"rope_scaling": YARN}, {"law": "sqrt:entries=4,block=8"}),
    "qwen3": ({"family": "qwen3"}, {"law": "all:block=8", "sinks": 0}),
    "olmo2": ({"family": "olmo2"}, {"law": "log:entries=3,block=8", "score": "observed_head"}),
    "olmo3": (
        {
            "family": "olmo3",
            "n_layers": 4,
            "layer_types": ("sliding", "full") * 2,
            "sliding_window": 11,
            "rope_scaling": YARN,
        },
        {"law": "sqrt:entries=4,block=8"},
    ),
}
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 256, n).astype(np.int32) for n in (75, 20, 3, 33, 16)]
PROMPT = RNG.integers(0, 256, (1, 9))


@functools.cache
def lm_of(name):
    cfg = TransformerConfig(**SIZES | CASES[name][0])
    tree = params.init(jax.random.key(1), transformer.spec(cfg))
    tree["embed"] = tree["embed"] * 20
    return LM(cfg, tree, ByteTokenizer())


def opened(path, name, **more):
    return Memory.open(path, lm_of(name), part=16, **({"sinks": 2} | CASES[name][1] | more))


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """The first three texts in the memory of every case."""
    home = tmp_path_factory.mktemp("memories")
    for name in CASES:
        with opened(home / name, name) as memory:
            for text in TEXTS[:3]:
                memory.read(text)
    return home


@pytest.mark.parametrize("name", CASES)
def test_choices_and_logits_are_those_of_the_reference(read, name):
    memory = opened(read / name, name)
    naive = Naive(lm_of(name), memory.settings)
    for text in TEXTS[:3]:
        naive.read(text)
    held = memory.entries()
    for what, at in (("source", 0), ("place", 1)):
        found = np.concatenate([np.broadcast_to(getattr(e, what), e.k.shape[:3]) for e in held], axis=-1)
        wanted = np.array([[[e[at] for e in head] for head in layer] for layer in naive.held()])
        np.testing.assert_array_equal(found, wanted)
    logits = atom_jax.apply(lm_of(name), PROMPT, memory=memory).logits[0]
    np.testing.assert_allclose(logits, naive.ask(PROMPT[0]), atol=1e-3, rtol=1e-3)
    stats = memory.stats()
    assert stats["held"] == stats["law"] and stats["tokens"] == 98


def interrupt(calls):
    """A `say` that interrupts reading when it is called once more than so often."""
    left = iter(range(calls))

    def say(n):
        if next(left, None) is None:
            raise KeyboardInterrupt

    return say


def files(memory):
    """What every file holds, by what it is for."""
    m, read = memory._manifest, lambda name: (memory._store.directory / name).read_bytes()
    segments = {(s.level, s.start, s.end): read(s.file) for s in m.segments}
    return segments, read(m.tail), [memory.ids(s.name).tolist() for s in m.sources], m.written, m.waiting


def test_beginning_a_source_traces_nothing_anew(monkeypatch):
    lm, traced, real = lm_of("llama"), [], reader_module._batch
    monkeypatch.setattr(reader_module, "_batch", lambda *given: traced.append(1) or real(*given))
    for source in range(3):
        assert Reader(lm, 16, 2).begin(source).x_1d.shape == (1, 16)
    assert len(traced) <= 1


def test_sessions_do_not_matter(tmp_path, monkeypatch):
    with opened(tmp_path / "one", "llama") as memory:
        nats = [memory.read(text).nll for text in TEXTS]
        whole = files(memory)
    for text in TEXTS:
        # A memory of its own for every text, as a process of its own has it.
        opened(tmp_path / "many", "llama").read(text)
    assert files(Memory.open(tmp_path / "many")) == whole

    monkeypatch.setattr(memory_module, "COMMIT", 32)
    for text, before in zip(TEXTS, nats):
        for calls in (2, 1, 3, 9):
            try:
                done = opened(tmp_path / "cut", "llama").read(text, say=interrupt(calls))
            except KeyboardInterrupt:
                continue
        assert done.tokens == 0 or abs(done.nll - before) < 2
    assert files(Memory.open(tmp_path / "cut")) == whole
    assert opened(tmp_path / "cut", "llama").read(TEXTS[0]).tokens == 0


def test_half_precision_goes_on_where_it_was(tmp_path):
    lm = lm_of("llama")
    lm = dataclasses.replace(
        lm, config=dataclasses.replace(lm.config, dtype="bfloat16"), params=params.cast(lm.params, "bfloat16")
    )
    for name in ("one", "two"):
        memory = Memory.open(tmp_path / name, lm, law="sqrt:entries=4,block=8", part=16)
        for text in TEXTS[1:3]:
            memory.read(text)
            memory = Memory.open(tmp_path / name, lm) if name == "two" else memory
    assert files(memory) == files(Memory.open(tmp_path / "one"))
    assert atom_jax.generate(lm, [[5, 6]], 2, memory=memory).ids


def test_within_the_window_it_is_the_model(tmp_path):
    lm, text = lm_of("llama"), TEXTS[4][:12]
    memory = opened(tmp_path / "m", "llama")
    assert memory.length == 0
    prompts = ["ab", TEXTS[3]]
    assert atom_jax.generate(lm, prompts, 4, memory=memory).ids == atom_jax.generate(lm, prompts, 4).ids
    done = memory.read(text)
    assert done.entries_after == 12 == memory.length
    assert abs(done.nll * 12 + float(score.logprobs(lm, text[None]).sum())) < 1e-3
    both = np.concatenate([text[None], PROMPT], axis=1)
    after = atom_jax.apply(lm, PROMPT, memory=memory).logits
    np.testing.assert_allclose(after, atom_jax.apply(lm, both).logits[:, 12:], atol=1e-4, rtol=1e-4)


def test_rows_lean_on_it_each_by_itself(read):
    lm, memory = lm_of("llama"), opened(read / "llama", "llama", choice=Choice(gated=False))
    prompts = [PROMPT[0].tolist(), [7], TEXTS[3].tolist()]
    made = atom_jax.generate(lm, prompts, 5, stop_ids=[], memory=memory)
    for prompt, ids in zip(prompts, made.ids):
        assert atom_jax.generate(lm, [prompt], 5, stop_ids=[], memory=memory).ids == [ids]
        both = np.array([prompt + ids])
        taught = np.asarray(atom_jax.apply(lm, both, memory=memory).logits[0]).argmax(-1)
        assert taught[len(prompt) - 1 : -1].tolist() == ids
    assert made.ids != atom_jax.generate(lm, prompts, 5, stop_ids=[]).ids
    first = atom_jax.generate(lm, prompts[:1], 5, stop_ids=[], memory=memory, keep_memory=True)
    later = atom_jax.generate(lm, [[3]], 5, stop_ids=[], after=first).ids
    assert atom_jax.generate(lm, [prompts[0] + first.ids[0] + [3]], 5, stop_ids=[], memory=memory).ids == later
    ids = np.zeros((2, 40), int)
    ids[0, :9], ids[1, :33] = prompts[0], prompts[2]
    mask = np.arange(40)[None] < np.array([[9], [33]])
    both = np.asarray(score.logprobs(lm, ids, mask, memory=memory))
    alone = np.asarray(score.logprobs(lm, ids[1:, :33], memory=memory))
    np.testing.assert_allclose(both[1, :32], alone[0], atol=1e-4)


@pytest.mark.parametrize("name, successors, queries", [("qwen3", True, 1), ("llama", False, 2), ("olmo3", True, 8)])
def test_pages_are_chosen_as_in_the_reference(read, scanned, name, successors, queries):
    lm = lm_of(name)
    choice = Choice(whole=20, pages=3, page=4, stride=2, queries=queries, successors=successors)
    memory = opened(read / name, name, choice=choice)
    naive = Naive(lm, memory.settings)
    for text in TEXTS[:3]:
        naive.read(text)
    wanted = naive.answer(PROMPT[0], 5, choice)
    session = Session.prefill(lm, [PROMPT[0].tolist()], memory=memory.front())
    assert session.length.tolist() == [memory.ahead + 9]
    found = [session.logits[0]]
    for logits in wanted[:-1]:
        session = session.step([int(logits.argmax())])
        found.append(session.logits[0])
    np.testing.assert_allclose(found, wanted, atol=5e-4, rtol=5e-4)
    held, seen = session.use()
    # Half of the layers of OLMo 3 have their window of 11, and no entries.
    assert held[0] == (memory.length + 14 if name != "olmo3" else (memory.length + 14 + 11) / 2) and seen[0] < held[0]


def test_rows_choose_each_for_itself(read, scanned):
    lm, choice = lm_of("llama"), Choice(whole=20, pages=2, page=4, stride=2)
    memory = opened(read / "llama", "llama", choice=choice)
    prompts = [PROMPT[0].tolist(), TEXTS[3][:14].tolist(), [7]]
    made = atom_jax.generate(lm, prompts, 7, stop_ids=[], memory=memory).ids
    assert [atom_jax.generate(lm, [p], 7, stop_ids=[], memory=memory).ids[0] for p in prompts] == made
    drafts = {"draft": "ngram", "draft_tokens": 3}
    assert atom_jax.generate(lm, prompts[:1], 7, stop_ids=[], memory=memory, **drafts).ids == made[:1]
    with pytest.raises(AtomError, match="prompts choose among its"):
        atom_jax.apply(lm, PROMPT, memory=memory)


@pytest.mark.parametrize("name, middle", [("llama", 1), ("olmo3", 0)])
def test_recall_names_what_is_attended(read, name, middle):
    memory = opened(read / name, name)
    naive = Naive(lm_of(name), memory.settings)
    for text in TEXTS[:3]:
        naive.read(text)
    (found,) = memory.recall([PROMPT[0].tolist()], k=3)
    assert len(found) == 3 and found[0].weight >= found[1].weight > 0 and sum(p.weight for p in found) <= 1 + 1e-6
    ids = {s.name: memory.ids(s.name) for s in memory.sources}
    for page in found:
        assert page.first % 32 == 0 and page.last < len(ids[page.source])
        assert page.text == ByteTokenizer().decode(ids[page.source][page.first : page.last + 1].tolist())
    # The weights of the reference, summed over the same pages.
    w, held = naive.weights(PROMPT[0])[middle].sum((0, 1)), naive.held()[middle][0]
    where = [(e[0], e[1] // 32) for e in held]
    where = [(0, 0)] * 2 + where + [(2, 0)] * (memory.length - len(held) - 2)
    total = {}
    for page, weight in list(zip(where, w))[2:]:
        total[page] = total.get(page, 0) + weight
    best = max(total, key=total.get)
    assert (memory.sources[best[0]].name, best[1] * 32) == (found[0].source, found[0].first)
    assert abs(total[best] / sum(total.values()) - found[0].weight) < 2e-3


def test_a_learned_score_chooses(tmp_path, monkeypatch):
    lm, name = lm_of("llama"), "llama"
    memory = opened(tmp_path / "plain", name)
    reader = Reader(lm, 16, 2)
    state, moments = reader.begin(0), []
    for _ in range(4):
        state, seen = reader.read(state, TEXTS[0])
        if seen is not None:
            after, place = features(seen.most, seen.total, seen.nll, seen.following), seen.place
            moments.append(Moments.of(after, place % 3 == 0))
    fitted = fit(moments, 3.0, memory.model.fingerprint)
    learned.save(fitted, tmp_path / "s.safetensors")
    with opened(tmp_path / "m", name, score=tmp_path / "s.safetensors") as chosen:
        chosen.read(TEXTS[0])
        again = Memory.open(tmp_path / "m", lm, score="learned")
        held = {int(p): s for e in again.entries() for p, s in zip(e.place, e.score)}
    wanted = dict(zip(place.tolist(), fitted(after)))
    same = held.keys() & wanted.keys()
    assert same and all(abs(held[p] - wanted[p]) < 1e-4 for p in same)
    monkeypatch.setattr(learned, "SHIPPED", tmp_path)
    assert opened(tmp_path / "d", name).settings.score == "learned"
    learned.save(Linear(fitted.mean, fitted.std, fitted.weight, "another"), tmp_path / "t.safetensors")
    assert opened(tmp_path / "e", name, score="observed").settings.score == "observed"
    with pytest.raises(AtomError, match="was fitted for the model another"):
        opened(tmp_path / "n", name, score=tmp_path / "t.safetensors")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("score", ["surprise", "knorm", "random", "recent"])
def test_other_scores(tmp_path, score):
    memory = opened(tmp_path / "m", "llama", score=score, law="sqrt:entries=4,block=8", codec="int8", text="none")
    memory.read(TEXTS[0])
    assert memory.stats()["held"] == memory.stats()["law"] and memory.ids(memory.sources[0].name).size == 0
    if score == "recent":
        block = memory.entries()[-2].place
        assert block.tolist() == list(range(block[-1] - 3, block[-1] + 1)) and block[-1] % 8 == 1


def test_what_is_asked_wrongly(read, tmp_path):
    lm, memory = lm_of("llama"), opened(read / "llama", "llama")
    with pytest.raises(AtomError, match="its law is sqrt:entries=4,block=8, and was asked to be log"):
        opened(read / "llama", "llama", law="log:entries=4,block=8")
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * 2, lm.params))
    with pytest.raises(AtomError, match=r"belongs to the llama model .* not to this one"):
        Memory.open(read / "llama", other)
    for call in (atom_jax.apply, score.logprobs):
        with pytest.raises(AtomError, match="memory: belongs to another model"):
            call(other, PROMPT, memory=memory)
    with pytest.raises(AtomError, match="memory: belongs to another model"):
        atom_jax.generate(other, ["a"], memory=memory)
    with pytest.raises(AtomError, match="exceed the 512 positions"):
        atom_jax.generate(lm, ["a" * 440], 64, memory=memory)
    with pytest.raises(AtomError, match="another text is known there as a"):
        memory.read(b"abc", "a")
        memory.read(b"abd", "a")
    with pytest.raises(AtomError, match="is empty"):
        memory.read(np.zeros(0, int))
    with pytest.raises(AtomError, match="opened without a model, which reading needs"):
        Memory.open(read / "llama").read("x")
    sliding = TransformerConfig(**SIZES, family="olmo3", layer_types=("sliding",) * 3, sliding_window=6)
    lm = LM(sliding, params.init(jax.random.key(1), transformer.spec(sliding)), None)
    with pytest.raises(AtomError, match="this olmo3 model has layers of other kinds"):
        Memory.open(tmp_path / "o", lm)
    with pytest.raises(AtomError, match="part: expected 17 tokens or more, as many as there are sinks, got 16"):
        opened(tmp_path / "o", "llama", sinks=17)
    with pytest.raises(AtomError, match="codec: expected float16, int8"):
        opened(tmp_path / "o", "llama", codec="zip")
    assert not (tmp_path / "o").exists()
