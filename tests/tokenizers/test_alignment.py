"""Chunks of two tokenisations: against byte-exact numbers, and as a partition of the bytes."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax.data import pairs
from atom_jax.tokenizers import ByteTokenizer, alignment
from atom_jax.tokenizers.alignment import Role
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from tests.transfer.numbers import numbers, tokenizer, view

FUZZ = settings(max_examples=40, deadline=None, derandomize=True, database=None)
PAIRS = ("gpt2like_to_qwenlike", "gemmalike_to_qwenlike")


def sides(pair):
    return [(tokenizer(name), view(name)) for name in pair.split("_to_")]


def cells(found):
    """[[teacher begin, end, student begin, end]] of chunks."""
    out = []
    for chunk in range(max(side.chunks.max() for side in found) + 1):
        places = [np.flatnonzero(side.chunks == chunk) for side in found]
        assert all((np.diff(p) == 1).all() for p in places)
        out.append([b for p in places for b in (int(p[0]), int(p[-1]) + 1)])
    return out


@pytest.mark.parametrize("pair", PAIRS)
def test_chunks_are_byte_exact(pair):
    fixture = numbers("alm_alignment")["pairs"][pair]
    for i, text in enumerate(numbers("alm_alignment")["texts"]):
        found = alignment.aligned([text], sides(pair))
        for side, ids, mask in zip(found, ("teacher_ids", "student_ids"), ("teacher_mask", "student_mask")):
            expected = np.array(fixture[ids][i])[np.array(fixture[mask][i], bool)]
            np.testing.assert_array_equal(side.ids[: len(expected)], expected)
        # The numbers were made of rows of 40 and 36 tokens.
        full = cells(found)
        assert [c for c in full if c[1] <= fixture["max_teacher"] and c[3] <= fixture["max_student"]] == (
            fixture["byte_exact"][i]
        )


def test_characters_are_composed_for_both_where_they_are_for_one():
    parsed = json.loads(tokenizer("qwenlike").backend.to_str()) | {"normalizer": {"type": "NFC"}}
    composing = JsonTokenizer.from_files({"tokenizer.json": json.dumps(parsed)}, "composing")
    both = [(tk, byte_view(tk)) for tk in (tokenizer("gpt2like"), composing)]
    assert [v.composes for _, v in both] == [False, True]
    text = "cafe\u0301 2 \u2126s"
    for unit in (text, text.encode()):
        for side, (tk, _) in zip(alignment.aligned([unit], both), both):
            assert tk.decode(side.ids) == "caf\u00e9 2 \u03a9s" and (side.chunks >= 0).all()


def test_merged_chunks():
    pair = PAIRS[1]
    fixture = numbers("alm_alignment")["pairs"][pair]["kinds"]
    both = sides(pair)
    views = [v for _, v in both]
    for i, text in enumerate(numbers("alm_alignment")["texts"][:3]):
        found = alignment.aligned([text], both)
        spaced = alignment.merged(found, alignment.closes_at_spaces(found, views))
        for name, side in zip(("teacher", "student"), spaced):
            expected = fixture["space"][name][i]
            mine = [[k, np.flatnonzero(side.chunks == k).tolist()] for k in range(side.chunks.max() + 1)]
            assert mine == expected, (name, i)
        # What ALM reads with words=true: "first" and "last" would add what begins and ends documents.
        given = pairs.chunks({"text": text, "first": False, "last": False}, both, words=True).ids
        for n, side in enumerate(spaced):
            assert [chunk[n].tolist() for chunk in given] == [
                side.ids[side.chunks == k].tolist() for k in range(side.chunks.max() + 1)
            ]


def test_text_without_a_token_has_no_words():
    assert len(pairs.chunks({"text": "", "first": False, "last": False}, sides(PAIRS[1]), words=True).ids) == 0


def test_pairs_that_may_end_a_chunk():
    pair = PAIRS[0]
    fixture = numbers("alm_alignment")["pairs"][pair]
    allowed = {(row[0], row[1]) for row in fixture["pair_bias"] if max(row[4], row[5]) <= 1e-2}
    for i, text in enumerate(numbers("alm_alignment")["texts"][:2]):
        found = alignment.aligned([text], sides(pair))
        last = [side.ids[alignment.last_tokens(side)] for side in found]
        closes = np.array([(a, b) in allowed for a, b in zip(*map(np.ndarray.tolist, last))])
        for name, side in zip(("teacher", "student"), alignment.merged(found, closes)):
            mine = [[k, np.flatnonzero(side.chunks == k).tolist()] for k in range(side.chunks.max() + 1)]
            assert mine == fixture["kinds"]["unbiased_1e_2"][name][i], (name, i)


@FUZZ
@given(text=st.text(max_size=40).filter(lambda text: "\u2581" not in text))
def test_chunks_partition_the_bytes(text):
    views = [view("gemmalike"), byte_view(ByteTokenizer())]
    found = alignment.aligned([text], [(tokenizer("gemmalike"), views[0]), (ByteTokenizer(), views[1])])
    for side, seen in zip(found, views):
        assert (side.chunks >= 0).all() and (np.diff(side.chunks) >= 0).all() and (np.diff(side.chunks) <= 1).all()
        assert b"".join(seen.pieces[i] for i in side.ids.tolist()) == text.encode()
    for chunk in range(found[0].chunks.max(initial=-1) + 1):
        parts = [
            b"".join(seen.pieces[i] for i in side.ids[side.chunks == chunk].tolist())
            for side, seen in zip(found, views)
        ]
        assert parts[0] == parts[1] and parts[0]


def test_special_tokens_are_chunks_of_their_own():
    units = [Role("bos"), Role("start_header"), "user\n", "hi there", Role("eot"), "\n"]
    found = alignment.aligned(units, sides(PAIRS[1]))
    assert found[0].ids[:2].tolist() == [2, 4] and found[1].ids[0] == 0
    # The bos that only one side has is part of what follows: the header that both have.
    assert found[0].chunks[:2].tolist() == [0, 0] and found[1].chunks[0] == 0
    ends = [side.chunks[np.flatnonzero(side.ids == i)[0]] for side, i in zip(found, (5, 1))]
    assert ends[0] == ends[1] and (found[0].chunks == ends[0]).sum() == 1
    assert found[0].chunks[-1] == found[1].chunks[-1] == ends[0] + 1
