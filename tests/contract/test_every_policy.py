"""Every cache policy in every kind of model, and every example with some policy."""

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.kvcache import memory, policies
from atom_jax.kvcache.memory import Layer
from atom_jax.kvcache.policy import policies_of
from tests.contract import cells

# All prompts are padded to the same length.
ROWS, MORE, NEW = (30, 26), (4, 2), 4
DEALT = cells.dealt()


@pytest.fixture(scope="module", params=DEALT)
def lm(request):
    """An example under its policies."""
    yield cells.model(cells.under(*DEALT[request.param]))
    jax.clear_caches()


def make(lm, rows, after=None):
    return atom_jax.generate(lm, rows, NEW, stop_ids=(), keep_memory=True, after=after)


def test_a_conversation_in_which_no_row_minds_the_others(lm):
    found = cells.texts(lm, *ROWS, *MORE)
    first, more = found[:2], found[2:]
    one = make(lm, first)
    check(one.memory)
    two = make(lm, more, one)
    for row in range(2):
        alone = make(lm, 2 * [first[row]])
        assert alone.ids == 2 * [one.ids[row]]
        assert make(lm, 2 * [more[row]], alone).ids == 2 * [two.ids[row]]


def check(session):
    """Where a policy is to hold, or to read, less than all, it does."""
    found = set()
    for node in memory.nodes(session.memory):
        length = int(np.asarray(node.length)[0])
        for layer in jax.tree.leaves(node.layers, is_leaf=lambda x: isinstance(x, Layer)):
            if getattr(layer, "policy", None) is not None and layer.policy.expected(length) < length:
                use = np.minimum(layer.held(node.length), layer.read(node.length))
                assert use[0].mean() < length
                found.add(layer.policy)
    assert found == set(memory.policies(session.memory))


def test_every_policy_has_its_turn_in_every_kind_of_model():
    kinds = {type(cfg) for cfg in cells.EXAMPLES.values()}
    taken = {(type(cells.EXAMPLES[name]), type(p)) for name, chosen in DEALT.values() for p in policies_of(chosen)}
    assert taken == {(kind, policy) for kind in kinds for policy in policies.POLICIES.values()}
    names = {name for name in cells.EXAMPLES if not cells.refusal(name, "cache policies")}
    assert {name for name, _ in DEALT.values()} == names
