"""Exact laws of bytes against full enumeration on toy vocabularies, and what may follow what."""

import functools
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from atom_jax.tokenizers import train
from atom_jax.tokenizers.canonical import Canonical
from atom_jax.tokenizers.covers import Covers, contexts_of
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.tokenizers.merges import Merges
from tests.transfer.numbers import array, numbers, tokenizer


def toy():
    fixture = numbers("exact_bytes")
    tk = Tokenizer(models.BPE({t: i for i, t in enumerate(fixture["vocab"])}, [tuple(m) for m in fixture["merges"]]))
    tk.decoder = decoders.ByteLevel()
    return Canonical(JsonTokenizer.from_files({"tokenizer.json": tk.to_str()}, "toy")), fixture


def markov(fixture):
    """The law of a chain over tokens."""
    init, transition = np.log(array(fixture["init"])), np.log(array(fixture["transition"]))
    return lambda ids: transition[ids[-1]] if ids else init


def walked(canonical, law, text, **options):
    covers = Covers(canonical, **options)
    for byte in text:
        covers = covers.push(byte, covers.masked(law))
    return covers


def test_laws_equal_full_enumeration():
    canonical, fixture = toy()
    law = markov(fixture)
    for row in fixture["rows"]:
        covers = walked(canonical, law, row["prefix"].encode())
        np.testing.assert_allclose(np.exp(covers.log_total), row["p_prefix"], atol=2e-9)
        found = np.exp(covers.next_bytes(covers.masked(law)))
        np.testing.assert_allclose(found[[97, 98]], row["next_byte"], atol=2e-9)
        assert found[[97, 98]].sum() == pytest.approx(1, abs=1e-12)
        names = {tuple(fixture["vocab"][i] for i in ids): w for ids, w in listed(covers)}
        for tokens, weight in row["cover"]:
            assert names.pop(tuple(tokens)) == pytest.approx(weight, abs=2e-9)
        assert not names


@st.composite
def vocabularies(draw):
    """Merges of a and b, as byte-level BPE."""
    vocab, merges = ["a", "b"], []
    for _ in range(draw(st.integers(0, 5))):
        pair = tuple(vocab[draw(st.integers(0, len(vocab) - 1))] for _ in range(2))
        if "".join(pair) not in vocab:
            vocab.append("".join(pair))
            merges.append(pair)
    tk = Tokenizer(models.BPE({t: i for i, t in enumerate(vocab)}, merges))
    tk.decoder = decoders.ByteLevel()
    return Canonical(JsonTokenizer.from_files({"tokenizer.json": tk.to_str()}, "toy"))


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(canonical=vocabularies(), seed=st.integers(0, 2**16))
def test_masses_add_up_to_one_and_equal_brute_force(canonical, seed):
    size, tk = canonical.view.size, canonical._tokenizer

    @functools.cache
    def law(ids):
        return np.log(np.random.default_rng((seed, *ids)).dirichlet(np.ones(size)))

    @functools.cache
    def ways(ids):
        """Tokens that keep a sequence canonical: (the longer sequence, its text, probability)."""
        longer = [(*ids, t) for t in range(size)]
        kept = [way for way in longer if tuple(tk.encode(canonical.text(way)).tolist()) == way]
        p = np.exp(law(ids))[[way[-1] for way in kept]]
        return list(zip(kept, map(canonical.text, kept), p / p.sum()))

    def brute(text, ids=()):
        """Probability of all canonical sequences that go on from these and whose last token holds the text's end."""
        goes_on = [p * brute(text, way) for way, said, p in ways(ids) if text.startswith(said) and said != text]
        return sum(goes_on) + sum(p for _, said, p in ways(ids) if said.startswith(text))

    level = {b"": Covers(canonical)}
    for _ in range(4):
        masked = {text: covers.masked(law) for text, covers in level.items()}
        level = {text + bytes([b]): level[text].push(b, masked[text]) for text in level for b in b"ab"}
        masses = {text: np.exp(covers.log_total) for text, covers in level.items()}
        assert sum(masses.values()) == pytest.approx(1, abs=1e-9)
    for text in (b"abab", b"aabb"):
        assert masses[text] == pytest.approx(brute(text), abs=1e-9)


def listed(covers):
    """Covers as (ids, probability), the whole text's own encoding among them."""
    out = [((*covers.contexts[c], int(t)), np.exp(w)) for c, t, w in zip(covers.context, covers.token, covers.logw)]
    return out + [(ids, np.exp(w)) for ids, w in covers.wholes.items()]


def test_what_may_follow_is_what_is_encoded_so():
    canonical, _ = toy()
    tk = canonical._tokenizer
    for length in (1, 2, 3, 4):
        for ids in itertools.product(range(5), repeat=length):
            right = tuple(tk.encode(canonical.text(ids)).tolist()) == ids
            steps = all(canonical.follows(ids[:i], np.array([ids[i]]))[0] for i in range(length))
            assert right == steps, ids


@pytest.mark.parametrize("name", ["gpt2like", "qwenlike", "gemmalike"])
def test_texts_are_walked_along_their_own_tokens(name):
    tk = tokenizer(name)
    canonical = Canonical(tk)
    for text in numbers("byteify")["texts"][:4]:
        data = text.encode()
        asked, end = contexts_of(Covers(canonical), data)
        whole = tuple(tk.encode(text).tolist())
        assert whole in end.wholes
        assert all(canonical.text(ids) == data[: len(canonical.text(ids))] for ids in asked)
        assert end.stable == whole[: len(end.stable)]
        for cut in (3, 9, len(data) // 2):
            begin = tuple(tk.encode(data[:cut].decode("utf-8", "ignore")).tolist())
            kept = canonical.settled(begin)
            assert whole[:kept] == begin[:kept]


def test_total_of_all_texts_is_one_with_ends():
    """A tokenizer with specials: all texts up to two bytes, and longer ones, have probability 1 together."""
    tk = train.train("bpe:262", [b"abababa ab"])
    canonical = Canonical(tk)
    rng = np.random.default_rng(0)
    laws = {}

    def law(ids):
        if ids not in laws:
            laws[ids] = np.log(rng.dirichlet(np.full(canonical.view.size, 0.05)) + 1e-12)
        return laws[ids]

    for drop in (True, False):
        covers = Covers(canonical, renormalise=not drop)
        first = covers.next_bytes(covers.masked(law))
        assert np.exp(first).sum() == pytest.approx(1)
        after = covers.push(97, covers.masked(law))
        if not drop:
            assert after.log_total == pytest.approx(first[97])
        second = after.next_bytes(after.masked(law))
        assert np.exp(second).sum() == pytest.approx(1) and second[256] > -np.inf


def test_special_tokens_split():
    tk = JsonTokenizer.from_files(
        {"tokenizer.json": tokenizer("qwenlike").backend.to_str(), "tokenizer_config.json": json.dumps({})}, "q"
    )
    canonical = Canonical(tk)
    ids = tuple(tk.encode("the<|im_end|>\n").tolist())
    assert ids[-2] == 1 and canonical.settled(ids) == len(ids) - 1
    assert canonical.text(ids) == b"the<|im_end|>\n"
    every = np.arange(canonical.view.size)
    np.testing.assert_array_equal(canonical.follows(ids[:-1], every), canonical.follows((), every))
    assert canonical.follows(ids, every)[[0, 1, 2]].all()


def test_what_is_unlikely_is_not_looked_at(monkeypatch):
    monkeypatch.setattr("atom_jax.tokenizers.canonical._SMALL", 0)
    looked_at = Canonical(tokenizer("gpt2like")).likely(np.log(np.array([1e-9, 0.5, 9.5e-7, 0.4, 0.1, 9e-8])))
    assert sorted(looked_at) == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def looked_up():
    """Tokenizers for which what may follow is looked up among merges wherever that can be."""
    texts = [f"the other version, (not {word}) of it's FileNames; a_b {word.title()}!!".encode() for word in WORDS]
    trained = [train.train(f"bpe:{size}", texts * 9) for size in (300, 420)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("atom_jax.tokenizers.canonical._FEW", 0)
        yield [Canonical(tk) for tk in [*trained, *map(tokenizer, ("gpt2like", "qwenlike"))]]


WORDS = ("banana", "ananas", "aaaa", "hello", "otherwise", "ofthe")


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    text=st.one_of(
        st.text("ab nethoi'(,A!\n", max_size=9),
        st.sampled_from([*WORDS, "it's", "don't s", "x (", "an  ", "caf\u00e9 A"]),
    )
)
def test_what_is_looked_up_is_what_is_encoded(looked_up, text):
    for canonical in looked_up:
        assert canonical._merges is not None and (canonical._kinds >= 0).sum() > 20
        ids = tuple(canonical._tokenizer.encode(text).tolist())
        tail = ids[canonical._cut(ids) :]
        every = np.flatnonzero(canonical.first < 256)
        np.testing.assert_array_equal(canonical.follows(tail, every), canonical._kept(tail, every))


def test_pairs_stay_apart_as_the_model_itself_has_it():
    canonical = Canonical(tokenizer("qwenlike"))
    view, merges = canonical.view, canonical._merges
    own = np.array([i for i, piece in view.pieces.items() if merges.sure[i] and view.cut(piece) == [i]])
    rng = np.random.default_rng(0)
    for a in rng.choice(own, 40).tolist():
        others = rng.choice(own, 60)
        expected = [view.cut(view.pieces[a] + view.pieces[b]) == [a, b] for b in others.tolist()]
        assert merges.apart(a, others).tolist() == expected


def test_vocabularies_that_do_more_than_merge():
    tk = json.loads(tokenizer("qwenlike").backend.to_str())
    assert Merges.of(Tokenizer.from_str(json.dumps(tk)), 1000) is not None
    tk["model"]["ignore_merges"] = True
    assert Merges.of(Tokenizer.from_str(json.dumps(tk)), 1000) is None
    single = np.array([True, True, False, False])
    with pytest.raises(ValueError, match="before its parts"):
        Merges(4, np.array([[2, 1, 3], [0, 1, 2]], np.int32), single)
