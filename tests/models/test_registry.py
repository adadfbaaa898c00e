"""Every family that is registered, from its record alone."""

import dataclasses

import jax
import pytest

from atom_jax import params
from atom_jax.kvcache.memory import policies
from atom_jax.kvcache.streaming_llm import StreamingLLM
from atom_jax.models import registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.typing import LM, AtomError

CASES = [(f.name, name, cfg) for f in registry.FAMILIES.values() for name, cfg in f.examples().items()]
EACH = pytest.mark.parametrize("family, name, cfg", CASES, ids=[f"{f}-{name}" for f, name, _ in CASES])


@EACH
def test_the_record_of_a_configuration_is_found(family, name, cfg):
    assert registry.of(cfg) is registry.FAMILIES[family] and cfg.family == family
    assert hash(registry.of(cfg).codec(cfg)) == hash(registry.of(cfg).codec(dataclasses.replace(cfg)))


@EACH
def test_every_family_says_what_it_costs_and_what_it_is(family, name, cfg):
    record = registry.of(cfg)
    matrices = params.count({k: v for k, v in record.spec(cfg).items() if not k.startswith("embed")})
    assert record.flops(cfg, 64) > 0.2 * matrices
    labels = [label for label, _ in record.describe(cfg)]
    assert {"vocabulary", "positions"} <= set(labels) and all(text for _, text in record.describe(cfg))


@EACH
def test_memory_is_replaced_where_it_lives(family, name, cfg):
    record, policy = registry.of(cfg), StreamingLLM(budget=8)
    p = params.init(jax.random.key(0), record.spec(cfg))
    if policy not in set(policies(jax.eval_shape(lambda: record.init_cache(record.with_memory(cfg, policy), 1, 1)))):
        with pytest.raises(AtomError, match="for layers that see everything before them"):
            registry.with_memory(LM(cfg, p, None), policy)
        return
    found = registry.with_memory(LM(cfg, p, None), policy)
    assert record.memory(found.config) == policy and not registry.learned(found.config)
    assert jax.tree.structure(found.params) == jax.tree.structure(p)
    assert registry.with_memory(found, None).config == cfg == record.with_memory(found.config, None)


def test_unknown_configurations_are_refused():
    class Other(TransformerConfig):
        pass

    for cfg in (Other(), 3):
        with pytest.raises(AtomError, match="no model for configurations"):
            registry.of(cfg)
