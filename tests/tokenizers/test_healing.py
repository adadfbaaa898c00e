"""Token healing: what is taken back, and what may follow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax.tokenizers import train
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.tokenizers.healing import Healer
from tests.transfer.numbers import tokenizer, view


@pytest.fixture(scope="module")
def words():
    tk = train.train("bpe:330", [b"the theory of the http://www.web.org/ and http://the.net " * 40])
    return tk, Healer(byte_view(tk))


def test_a_cut_word_is_taken_back(words):
    tk, healer = words
    kept, rest = healer.take_back(tk.encode("of theor").tolist())
    assert tk.decode(kept) + rest.decode() == "of theor" and rest == b" theor"
    allowed = healer.allowed(rest)
    assert allowed[healer.view.ids[b" theory"][0]] and allowed[healer.view.ids[b" the"][0]]
    assert not allowed[healer.view.ids[b"the"][0]] and not allowed[list(healer.view.special)].any()
    assert healer.after(rest, healer.view.ids[b" the"][0]) == b"or" and healer.allowed(b"").all()
    assert healer.after(rest, healer.view.ids[b" theory"][0]) == b"" == healer.after(b"", 300)


def test_special_tokens_and_empty_prompts_stay():
    healer = Healer(view("qwenlike"))
    assert healer.take_back([]) == ([], b"") and healer.take_back([300, 1]) == ([300, 1], b"")
    kept, rest = healer.take_back([1, 300])
    assert kept == [1] and rest == healer.view.pieces[300]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["gpt2like", "qwenlike", "gemmalike"]),
    st.text(alphabet="the cat sÿ漢\n.", max_size=24),
    st.integers(0, 2**32),
)
def test_any_allowed_way_writes_the_prompt(name, text, seed):
    seen, rng = view(name), np.random.default_rng(seed)
    healer, ids = Healer(seen), tokenizer(name).encode(text).tolist()
    kept, rest = healer.take_back(ids)
    assert ids[: len(kept)] == kept and b"".join(seen.pieces[i] for i in ids[len(kept) :]) == rest
    assert bool(rest) == bool(ids)
    # What is taken back can be begun by a token; with more of them nothing could.
    pieces = [seen.pieces[i] for i in ids]
    fits = [n for n in range(len(ids)) if any(p.startswith(b"".join(pieces[n:])) for p in seen.pieces.values())]
    assert len(kept) == min(fits, default=0)
    written, left = b"", rest
    while left:
        allowed = healer.allowed(left)
        right = [i for i, p in seen.pieces.items() if p.startswith(left) or left.startswith(p)]
        assert np.flatnonzero(allowed).tolist() == sorted(right)
        token = int(rng.choice(right))
        written, left = written + seen.pieces[token], healer.after(left, token)
    assert written.startswith(rest)


def test_bytes_of_255_are_last_in_order():
    seen = view("gpt2like")
    healer = Healer(seen)
    assert healer.allowed(b"\xff")[seen.ids[b"\xff"][0]] and healer.allowed(b"\xff").sum() == 1
