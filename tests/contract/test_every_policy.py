"""Every cache policy in every kind of model, and every example with some policy."""

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.kvcache import memory, policies
from atom_jax.kvcache.layer import Layer
from atom_jax.kvcache.policy import policies_of
from atom_jax.session.session import Session
from tests.contract import cells

# All prompts are padded to the same length.
ROWS, MORE, NEW = (30, 26), (4, 2), 4
DEALT = cells.dealt()


@pytest.fixture(scope="module", params=DEALT)
def lm(request):
    """An example under its policies."""
    yield cells.model(cells.under(*DEALT[request.param]))
    jax.clear_caches()


def test_a_row_minds_no_other_row(lm):
    found = cells.texts(lm, *ROWS, *MORE)
    first, more = found[:2], found[2:]
    made = make(lm, first)
    check(made.memory)
    later = Session.prefill(lm, first).extend(more).logits
    assert np.isfinite(later).all() and np.abs(later[0] - later[1]).max() > 1e-2
    for row in range(2):
        assert make(lm, 2 * [first[row]]).ids == 2 * [made.ids[row]]
        alone = Session.prefill(lm, 2 * [first[row]]).extend(2 * [more[row]]).logits
        np.testing.assert_allclose(alone[0], later[row], atol=2e-4)


def make(lm, rows):
    return atom_jax.generate(lm, rows, NEW, stop_ids=(), keep_memory=True)


def check(session):
    """Where a policy is to hold, or to read, less than all, it does."""
    for node in memory.nodes(memory.unstack(session.memory)):
        length = int(np.asarray(node.length)[0])
        for layer in jax.tree.leaves(node.layers, is_leaf=lambda x: isinstance(x, Layer)):
            if getattr(layer, "policy", None) is not None and layer.policy.expected(length) < length:
                use = np.minimum(layer.held(node.length), layer.read(node.length))
                assert use[0].mean() < length


def test_every_policy_has_its_turn_in_every_kind_of_model():
    every = list(policies.POLICIES.values())
    some = {name for name in cells.EXAMPLES if not cells.refusal(name, "cache policies")}
    kind = {name: type(cells.EXAMPLES[name]) for name in some}
    taken = {(kind[name], type(p)) for name, chosen in DEALT.values() for p in policies_of(chosen)}
    assert taken == {(one, policy) for one in kind.values() for policy in every}
    assert {name for name, _ in DEALT.values()} == some
