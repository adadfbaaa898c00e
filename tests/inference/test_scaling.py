"""Chains that vote: early ends that change nothing, parts of larger runs, refusals."""

import dataclasses
import itertools

import numpy as np
import pytest

import atom_jax
from atom_jax.fields import Expression
from atom_jax.inference import scaling
from atom_jax.inference.scaling import last_match, majority
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import AtomError
from tests.reliability import rows as examples

PROMPTS = ["once upon", "a time"]


@pytest.fixture(scope="module")
def lm():
    return dataclasses.replace(examples.plain("llama", "plain"), tokenizer=ByteTokenizer())


def first_letter(text):
    return text[:1] or None


def think(lm, chains, most, **options):
    stops = list(range(5, 250, 9))
    return atom_jax.reason(lm, PROMPTS, chains, most, extract=first_letter, stop_ids=stops, **options)


@pytest.fixture(scope="module")
def whole(lm):
    return think(lm, 4, 16)


def test_fewer_and_shorter_chains_are_parts_of_more_and_longer_ones(lm, whole):
    less = think(lm, 2, 8, rows=3)
    for many, few in zip(whole.chains, less.chains):
        for a, b in zip(many, few):
            assert b.ids == a.ids[: 8 if not b.ended else 7] and b.ended == (a.ended and len(a.ids) < 8)
            np.testing.assert_array_equal(b.read, a.read[: len(b.read)])
    stats = whole.stats
    reads = sum(one.read.sum() for group in whole.chains for one in group)
    assert stats["kv_reads"] == pytest.approx(reads) and stats["chains"] == 8
    assert stats["kv_entries_peak"] == max(scaling.peak([c.held for c in group]) for group in whole.chains)


def test_answers_are_those_of_chains_that_ended(whole):
    for votes, chains, texts, answer in zip(whole.votes, whole.chains, whole.text, whole.answers):
        assert votes == [first_letter(t) if c.ended else None for t, c in zip(texts, chains)]
        assert answer == majority(votes)


def test_a_decided_vote_is_never_changed(lm, whole):
    less = think(lm, 4, 16, stop="decided")
    assert less.answers == whole.answers
    for votes in itertools.product([None, "a", "b"], repeat=5):
        for order in (range(5), reversed(range(5))):
            group = scaling._Group(0, 5, lambda group: group.decided, None)
            for w in order:
                if w in group.alive:
                    group.take(w, votes[w])
            assert group.answer("majority") == majority(votes)


def test_other_ends_and_votes(lm, whole):
    right = lambda p, said: said == whole.votes[p][-1]  # noqa: E731
    checked = think(lm, 4, 16, verify=right, vote="verify", stop="verified")
    assert checked.right == [v[-1] is not None for v in whole.votes]
    assert think(lm, 4, 16, stop="first:1").stats["new_tokens"] <= whole.stats["new_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stop": "soon"}, "stop=soon: expected none, decided"), ({"stop": "first:0"}, "stop=first:0"),
     ({"stop": "verified"}, "nothing can check"), ({"vote": "verify"}, "vote=verify"), ({"rows": 0}, "rows"),
     ({"key": 3}, "key: expected a key"), ({"min_p": 2}, "min_p is 2")],
)  # fmt: skip
def test_bad_options(lm, options, message):
    with pytest.raises(AtomError, match=message):
        think(lm, 2, 8, **options)


def test_bad_sizes(lm):
    with pytest.raises(AtomError, match="chains"):
        think(lm, 0, 8)
    with pytest.raises(AtomError, match="no tokenizer"):
        atom_jax.reason(dataclasses.replace(lm, tokenizer=None), [[1]], 2, 8, extract=first_letter)
    with pytest.raises(AtomError, match="exceed the"):
        think(lm, 2, lm.config.max_length)


def test_answers_in_texts():
    assert last_match(r"answer: (\d+)")("answer: 3, no, answer: 4.") == "4"
    assert last_match("boxed")(r"so \boxed{1} or \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert last_match("boxed")("none") is None and last_match(r"\d")("none") is None
    with pytest.raises(AtomError, match="not a regular expression"):
        last_match("(")
    assert majority(["a", None, "b", "b", "a"]) == "a" and majority([None]) is None


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 3000, "[", "(?P<x>a)(?P<x>b)[", "*"])
def test_answers_that_are_no_expression(pattern):
    with pytest.raises(AtomError, match="--answer") as refused:
        scaling.last_match(pattern)
    assert len(str(refused.value)) < 300


def test_an_expression_that_never_ends(monkeypatch):
    monkeypatch.setattr(Expression, "SECONDS", 0.1)
    with pytest.raises(AtomError, match="takes more than"):
        scaling.last_match(r"^(a|a)*$")("a" * 40 + "b")
    assert scaling.last_match(r"is (\d+)")("it is 3, or is 45") == "45"
    assert scaling.last_match("boxed|x")("none") is None
