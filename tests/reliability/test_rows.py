"""Rows of ragged batches are what they are alone, over two turns.

`make soak SOAK=rows` takes every example with every policy, and both of XLA's settings.
"""

import pytest

from atom_jax.kvcache.policies import POLICIES
from atom_jax.models import registry
from tests.reliability import rows

# A policy for every family, of every kind of score: of keys, of attention, of positions, learned.
CASES = [
    ("qwen3", "plain", "knorm"), ("llama", "untied", "kvcompose"), ("olmo2", "plain", "h2o"),
    ("olmo3", "sliding", "keydiff"), ("hnet", "hnet", "expected_attention"), ("bolmo", "qwen3-plain", "knorm"),
]  # fmt: skip


def test_every_family_goes_with_every_policy():
    found = {(family, name) for family, _, name in rows.cases()}
    without = {("hnet", "sepllm"), ("bolmo", "sepllm")}  # no ids there, of which some separate
    assert found == {(family, name) for family in registry.FAMILIES for name in POLICIES} - without
    assert {family for family, _, _ in CASES} == set(registry.FAMILIES) and set(CASES) <= set(rows.cases())


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_row_is_what_it_is_alone(case):
    lm = rows.model(*case)
    for seed in range(6):
        assert rows.difference(lm, seed) == ""


def test_norms_that_are_equal_need_fewer_digits():
    """Keys of a Qwen 3 have equal norms, but for rounding: with all digits many ranks differ, with 13 none."""
    lm = rows.model("qwen3", "plain", "knorm", budget=400)
    total, (few, all_of_them) = rows.flips(lm, 3, (13, 23))
    assert few == 0 and all_of_them > total / 10
