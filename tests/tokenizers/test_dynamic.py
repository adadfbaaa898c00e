"""Merging over a batch: the authors' merges, and those of a plain loop."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from atom_jax.tokenizers import ByteTokenizer
from atom_jax.tokenizers.dynamic import BOUNDARIES, Merger, mean_lengths, merges_for
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import AtomError
from tests.transfer.numbers import numbers, spelled, tokenizer, view


def begun():
    """With a token that begins texts but isn't special, as the numbers have it."""
    tk = Tokenizer.from_str(tokenizer("gpt2like").backend.to_str())
    tk.add_tokens([AddedToken("<s>", normalized=False)])
    return JsonTokenizer.from_files({"tokenizer.json": tk.to_str()}, "begun")


def said(merged, merger):
    known = merger.view.pieces | {merged.size + i: piece for i, piece in enumerate(merged.pieces)}
    return [[known[i] for i in row] for row in merged.rows]


@pytest.mark.parametrize("n", range(4))
def test_merges_equal_the_authors(n):
    fixture = numbers("dynamic_bpe")
    run, tk = fixture["runs"][n], begun()
    assert run["boundary"] == BOUNDARIES[n]
    rows = [tk.encode(f"<s>{text}") for text in fixture["texts"]]
    merger = Merger(tk, run["boundary"])
    assert said(merger.merge(rows, 0), merger) == [[*map(spelled, row)] for row in fixture["base"]]
    whole = merger.merge(rows)
    assert whole.merges == [(spelled(a), spelled(b)) for a, b in run["merges"]]
    assert said(whole, merger) == [[*map(spelled, row)] for row in run["final"]]
    ten = merger.merge(rows, 10)
    assert said(ten, merger) == [[*map(spelled, row)] for row in run["after_10"]]
    assert whole.totals[[0, 10, -1]].tolist() == [sum(map(len, run_)) for run_ in (rows, ten.rows, whole.rows)]


def plain(merger, rows, most):
    """From the definition, with pieces."""
    rows, merges = [[merger.view.pieces[int(i)] for i in row] for row in rows], []
    for _ in range(most):
        counts = collections.Counter(p for row in rows for p in itertools.pairwise(row) if merger.joins(*p))
        if not counts:
            break
        best = max(counts, key=counts.get)
        merges.append(best)
        for row in rows:
            i = 0
            while i + 1 < len(row):
                if (row[i], row[i + 1]) == best:
                    row[i : i + 2] = [b"".join(best)]
                i += 1
    return rows, merges


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["gpt2like", "gemmalike"]),
    st.sampled_from(BOUNDARIES[1:]),
    st.lists(st.text(alphabet="aab é\n-.", max_size=40), min_size=1, max_size=3),
    st.integers(0, 30),
)
def test_any_batch_equals_the_definition(name, boundary, texts, most):
    merger, tk = Merger(tokenizer(name), boundary), tokenizer(name)
    rows = [tk.encode(text) for text in texts]
    if not any(map(len, rows)):
        return
    merged = merger.merge(rows, most)
    assert (said(merged, merger), merged.merges) == plain(merger, rows, most)
    assert len(set(merged.pieces)) == len(merged.pieces) and not set(merged.pieces) & merger.view.ids.keys()


def test_special_tokens_stay_alone():
    tk = tokenizer("qwenlike")
    rows = [tk.encode("ab<|im_end|>ab<|im_end|>ab")]
    merged = Merger(tk, "sentence").merge(rows)
    assert (merged.rows[0] == 1).sum() == 2 and len(merged.rows[0]) == 5
    assert view("qwenlike").special[1] == "<|im_end|>"


def test_curve_and_share_of_the_reduction():
    tk = tokenizer("gpt2like")
    merger = Merger(tk, "word")
    batches = [[tk.encode(text) for text in ("a stone, a stone", "some stones")], [tk.encode("zzzzzz")]]
    curve = mean_lengths(merger, batches)
    assert curve[0] == np.mean([len(row) for rows in batches for row in rows])
    assert curve[-1] == np.mean([len(row) for rows in batches for row in merger.merge(rows).rows])
    assert (np.diff(curve) <= 0).all()
    assert merges_for(curve, 0) == 0 and merges_for(curve, 1) == len(curve) - 1
    half = merges_for(curve, 0.5)
    assert curve[half] <= (curve[0] + curve[-1]) / 2 < curve[half - 1]
    with pytest.raises(AtomError, match="share: expected a number from 0 to 1"):
        merges_for(curve, 1.5)


def test_what_cannot_be_merged_is_said():
    with pytest.raises(AtomError, match="expected one of pretokens, word"):
        Merger(tokenizer("gpt2like"), "line")
    for tk in (tokenizer("gemmalike"), ByteTokenizer()):
        with pytest.raises(AtomError, match="splits texts by no rule"):
            Merger(tk)
    with pytest.raises(AtomError, match="the batch has no token"):
        Merger(tokenizer("gpt2like")).merge([np.zeros(0, np.int32)])
