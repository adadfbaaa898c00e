"""Rows of ragged batches are what they are alone, over two turns.

`make soak SOAK=rows` takes every example with every policy, and both of XLA's settings.
"""

import pytest

from atom_jax.kvcache.policies import POLICIES
from tests.contract import cells
from tests.reliability import rows

# Keys of equal norms, and layers with a policy next to layers that slide.
CASES = [("qwen3", "plain", "knorm"), ("olmo3", "sliding", "h2o")]


def test_every_family_goes_with_every_policy():
    found = {(family, name) for family, _, name in rows.cases(1)}
    some = {cfg.family for name, cfg in cells.EXAMPLES.items() if not cells.refusal(name, "cache policies")}
    assert found == {(family, name) for family in some for name in POLICIES}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_row_is_what_it_is_alone(case):
    lm = rows.model(*case)
    for seed in range(4):
        assert rows.difference(lm, seed) == ""


def test_norms_that_are_equal_need_fewer_digits():
    """Keys of a Qwen 3 have equal norms, but for rounding: with all digits many ranks differ, with 13 none."""
    lm = rows.model("qwen3", "plain", "knorm", budget=400)
    total, (few, all_of_them) = rows.flips(lm, 3, (13, 23))
    assert few == 0 and all_of_them > total / 10
