"""Every example of every family writes: a row of a batch what it writes alone, and in a later turn what follows from
all that was said before."""

import functools

import numpy as np
import pytest

import atom_jax
from atom_jax.models import registry
from atom_jax.session.session import Session
from tests.contract import cells

# All prompts and conversations are padded to the same length.
ROWS, MORE, NEW = (33, 20), (2, 1), 5


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
    assert make(lm, [other, one]).ids == made(name)[::-1] and make(lm, [one, one]).ids == 2 * made(name)[:1]


@pytest.mark.parametrize("name", cells.first_of_each(lambda cfg: cfg.family))
def test_a_row_makes_what_it_makes_alone(name):
    lm = cells.example(name)
    assert make(lm, rows(lm)[0][:1]).ids == made(name)[:1]


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
    said, more = rows(lm)
    if registry.of(lm.config).codec(lm.config).pending:
        # Ids that were made have a form, given ones get theirs: what follows is said by the row alone.
        assert turns(lm, said, more) == [ids[::-1] for ids in turns(lm, said[::-1], more[::-1])]
        return
    for ids in turns(lm, said, more):
        assert make(lm, said).ids == ids
        said = [a + b + c for a, b, c in zip(said, ids, more)]


def turns(lm, said, more):
    """What is made in three turns."""
    one = make(lm, said)
    two = make(lm, more, after=one)
    three = make(lm, more, after=two)
    return [one.ids, two.ids, three.ids]
