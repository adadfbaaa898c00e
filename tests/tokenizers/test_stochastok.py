"""StochasTok: the authors' numbers, and the same text whatever is drawn."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax.tokenizers.byte_view import ByteView
from atom_jax.tokenizers.stochastok import expand, scatter, split_table
from tests.transfer.numbers import numbers, tokenizer, view


def toy():
    fixture = numbers("stochastok")
    pieces = {b: bytes([b]) for b in range(256)} | {i: text.encode() for text, i in fixture["extra_vocab"]}
    ids = {piece: (i,) for i, piece in pieces.items()}
    return ByteView("toy", 270, pieces, ids, frozenset(), {}, {}, None, lambda piece: []), fixture


def test_splits_equal_the_authors():
    seen, fixture = toy()
    splits = split_table(seen)
    found = {}
    for i in range(seen.size):
        span = slice(*splits.offsets[i : i + 2])
        if span.stop > span.start:
            found[str(i)] = np.stack([splits.left[span], splits.right[span]], axis=1).tolist()
    assert found == fixture["expansions"]


def test_exact_expansion_equals_the_authors():
    seen, fixture = toy()
    for run in fixture["runs"]:
        place, way = np.random.RandomState(0).randint, random.Random(0)._randbelow
        out = expand(np.array(fixture["ids"]), split_table(seen), run["prop"], place, way)
        assert out.tolist() == run["out"] and out.dtype == np.int32


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["gpt2like", "qwenlike", "gemmalike"]),
    st.text(alphabet="the cat sat é漢\n", max_size=80),
    st.floats(0, 4),
    st.integers(0, 2**32),
)
def test_text_is_unchanged(name, text, share, seed):
    tk, splits = tokenizer(name), split_table(view(name))
    ids, rng = tk.encode(text), np.random.default_rng(seed)
    out, source = scatter(ids, splits, share, rng)
    assert tk.decode_bytes(out) == tk.decode_bytes(ids) and out.dtype == np.int32
    for i, whole in enumerate(ids):
        assert b"".join(view(name).pieces[int(t)] for t in out[source == i]) == view(name).pieces[int(whole)]
    assert (np.diff(source) >= 0).all()
    draw = lambda n: int(rng.integers(n))  # noqa: E731
    assert tk.decode_bytes(expand(ids, splits, share, draw, draw)) == tk.decode_bytes(ids)


def test_the_clock_stands_for_the_count():
    """Sequences get about as long by either procedure, and every way is drawn alike."""
    seen, fixture = toy()
    splits, rng = split_table(seen), np.random.default_rng(0)
    ids, draw = np.array(fixture["ids"] * 1000, np.int32), lambda n: int(rng.integers(n))
    for share in (0.1, 0.5):
        exact, clock = (
            len(x) - len(ids) for x in (expand(ids, splits, share, draw, draw), scatter(ids, splits, share, rng)[0])
        )
        assert 0.95 * np.log1p(share) / share < clock / exact < 1.05
    assert scatter(np.array([256]), splits, 1e9, rng)[0].tolist() == [116, 104]
    for i in (265, 269):
        out, source = scatter(np.full(20_000, i), splits, 0.05, rng)
        first = out[np.flatnonzero(np.diff(source, prepend=-1))]
        parts = [(first == left).sum() for left, _ in fixture["expansions"][str(i)]]
        assert max(parts) < 1.3 * min(parts) and 900 < sum(parts) < 1050


def test_special_tokens_and_ids_beyond_the_vocabulary_stay():
    ids = np.array([0, 1, 2, 10**6])
    out, source = scatter(ids, split_table(view("qwenlike")), 50.0, np.random.default_rng(0))
    assert out.tolist() == ids.tolist() and source.tolist() == [0, 1, 2, 3]
