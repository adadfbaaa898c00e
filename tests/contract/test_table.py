"""docs/families.md, and what must not be refused."""

import dataclasses

import jax
import pytest

from atom_jax.chunking import pooling, rules, upsampling
from atom_jax.chunking.rules import fixed
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.kvcache import memory, policies
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.layer import Layer
from atom_jax.models import mixers, registry
from tests.contract import cells


def test_the_page_is_the_present_one():
    assert cells.DOCUMENT.read_text("utf-8") == cells.table(), "python -m tests.contract.cells writes it"


@pytest.mark.parametrize("name", cells.EXAMPLES)
def test_policies_are_refused_where_no_layer_could_have_them_and_by_nothing_else(name):
    for kind in policies.POLICIES.values():
        assert cells.refused(name, kind) == cells.refused(name, cells.ANY).replace(cells.ANY.name, kind.name)
    letters = {letter for layout in getattr(cells.EXAMPLES[name], "layout", ()) for letter in layout}
    relative = any(isinstance(mixers.MIXERS.get(letter), mixers.Relative) for letter in letters)
    assert bool(cells.refused(name, cells.ANY)) == (not dense(name) or relative)


def test_a_new_way_to_make_units_is_an_example_at_once(monkeypatch):
    assert {*cells.by_name()} == {*cells.EXAMPLES}

    @dataclasses.dataclass(frozen=True)
    class Own(Fixed):
        pass

    monkeypatch.setitem(rules.RULES, Own, fixed)
    monkeypatch.setitem(pooling.POOLS, "own", pooling.POOLS["mean"])
    monkeypatch.setitem(upsampling.UPSAMPLERS, "own", upsampling.UPSAMPLERS["repeat"])
    new = {*cells.by_name()} - {*cells.EXAMPLES}
    assert new == {"hnet-own", "hnet-pool-own", "hnet-upsample-own"}


def dense(name):
    """Whether some layer keeps everything."""
    cfg = cells.EXAMPLES[name]
    cache = jax.eval_shape(lambda: registry.of(cfg).init_cache(cfg, 1, 16))
    found = [x for node in memory.nodes(cache) for x in jax.tree.leaves(node.layers, is_leaf=is_layer)]
    return any(isinstance(x, DenseLayer) for x in found)


def is_layer(x):
    return isinstance(x, Layer)
