"""Every example of every family writes: a row of a batch what it writes alone, and in a later turn what follows from
all that was said before."""

import functools

import numpy as np
import pytest

import atom_jax
from atom_jax.models import registry
from atom_jax.session import laid_out
from atom_jax.session.session import Session
from tests.contract import cells

# All prompts and conversations have the shapes of one bucket.
ROWS, MORE, NEW = (11, 6), (3, 2), 5
FIRST = cells.first_of_each(lambda cfg: cfg.family)


@pytest.fixture(scope="module", autouse=True)
def scanned():
    """Layers as accelerators have them, which compile in a fraction of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laid_out, "unrolls", lambda lm: False)
        yield


def rows(lm):
    """Prompts and what follows them."""
    found = cells.texts(lm, *ROWS, *MORE)
    return found[:2], found[2:]


def make(lm, prompts, new=NEW, **how):
    return atom_jax.generate(lm, prompts, new, stop_ids=(), keep_memory=True, **how)


@functools.cache
def made(name):
    lm = cells.example(name)
    return make(lm, rows(lm)[0]).ids


def test_a_row_makes_what_it_makes_in_other_company(name):
    lm = cells.example(name)
    (one, other), _ = rows(lm)
    assert [len(ids) for ids in made(name)] == [NEW, NEW]
    assert make(lm, [other, one]).ids == made(name)[::-1] and make(lm, [other, other]).ids == 2 * made(name)[1:]


def test_a_row_makes_what_it_makes_alone(name):
    if name not in FIRST:
        pytest.skip("one example of every family")
    lm = cells.example(name)
    for prompt, ids in zip(rows(lm)[0], made(name)):
        assert make(lm, [prompt]).ids == [ids]


def test_a_turn_is_read_as_if_all_had_been_read_at_once(name):
    lm = cells.example(name)
    first, more = rows(lm)
    later = Session.prefill(lm, first).extend(more)
    whole = Session.prefill(lm, [a + b for a, b in zip(first, more)])
    np.testing.assert_array_equal(later.length, whole.length)
    np.testing.assert_array_equal(later.use()[0], whole.use()[0])
    np.testing.assert_allclose(later.logits, whole.logits, atol=2e-4)


def test_a_conversation_goes_on_from_what_was_made(name):
    lm = cells.example(name)
    first, more = rows(lm)
    turn = make(lm, more, after=make(lm, first))
    if registry.of(lm.config).codec(lm.config).pending:
        # Ids that were made have a form, and given ones get theirs: their row alone says what follows.
        other = make(lm, more[::-1], after=make(lm, first[::-1]))
        assert turn.ids == other.ids[::-1] and [len(ids) for ids in turn.ids] == [NEW, NEW]
        return
    assert turn.ids == make(lm, [a + b + c for a, b, c in zip(first, made(name), more)]).ids
