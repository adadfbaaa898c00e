"""All kinds of models, by their configurations."""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

import jax

from atom_jax import params
from atom_jax.kvcache import policies
from atom_jax.kvcache.memory import policies as policies_in
from atom_jax.kvcache.policy import fitted, policies_of
from atom_jax.models import bolmo, cct, hnet, image_tokens, mixture, rmt, transformer_family, world
from atom_jax.models.family import Family, Kind
from atom_jax.models.published import Published
from atom_jax.typing import LM, TEXTS, AtomError

# Kinds of models of texts, those of other things, and all.
FAMILIES: dict[str, Family] = {}
_OTHERS: dict[str, Kind] = {}
KINDS: Mapping[str, Kind] = ChainMap(FAMILIES, _OTHERS)


def register(kind: Kind) -> None:
    """Makes a kind of model known to everything that works with models."""
    (FAMILIES if kind.reads == TEXTS else _OTHERS)[kind.name] = kind


_FAMILIES = (*transformer_family.FAMILIES, hnet.FAMILY, bolmo.FAMILY, mixture.FAMILY, rmt.FAMILY, world.FAMILY)
for _kind in (*_FAMILIES, image_tokens.FAMILY, cct.KIND):
    register(_kind)


def recognise(data: dict[str, Any], where: str) -> Published:
    """How the model with these fields of the config.json `where` is published. Raises AtomError for unknown ones."""
    known = {name: family.published for name, family in FAMILIES.items() if family.published is not None}
    for published in known.values():
        if published.recognises(data):
            return published
    kind = str(data.get("model_type"))[:60]
    raise AtomError(f"{where}: model_type {kind!r} is not supported (known: {', '.join(known)})")


def kind(cfg: Any) -> Kind:
    """The kind of model of a configuration. Raises AtomError for one of an unknown type or name."""
    found = KINDS.get(getattr(cfg, "family", None))
    if found is None or type(cfg) is not found.config:
        known = ", ".join(KINDS)
        raise AtomError(f"no model for configurations of type {type(cfg).__name__}; known: {known}")
    return found


def of(cfg: Any) -> Family:
    """The family of a configuration of a model of streams. Raises AtomError for other kinds of models too."""
    found = kind(cfg)
    if not isinstance(found, Family):
        raise AtomError(
            f"the model is of the kind {found.name}, which reads {found.reads}, no streams of texts or frames"
        )
    return found


def learned(cfg: Any) -> frozenset[str]:
    """Paths of the parameters that the model's cache policies learn; none of what has no memory."""
    family = kind(cfg)
    if not isinstance(family, Family):
        return frozenset()
    without = params.flatten(family.spec(family.with_memory(cfg, None)))
    return frozenset(path for path in params.flatten(family.spec(cfg)) if path not in without)


def check_memory(cfg: Any) -> None:
    """Raises AtomError where a model has no layer for a cache policy of its own configuration."""
    family = of(cfg)
    cache = jax.eval_shape(lambda: family.init_cache(cfg, 1, 1))
    used = set(policies_in(cache))
    for policy in policies_of(family.memory(cfg)):
        if policy not in used:
            raise AtomError(
                f"memory: {policy.name} is for layers that see everything before them; there is none here"
            )


def with_memory(lm: LM, memory: Any) -> LM:
    """The same model with another cache policy, a choice for every layer, or, for None, the dense cache.

    What other policies have learned is left out. Raises AtomError for what the new ones need and the model lacks, and
    for one that a layer could not have.
    """
    policies.check(memory)
    family = of(lm.config)
    memory = fitted(memory, lm.tokenizer, family.memory(lm.config))
    cfg = family.with_memory(lm.config, memory)
    check_memory(cfg)
    wanted, there = params.flatten(family.spec(cfg)), params.flatten(lm.params)
    if missing := [path for path in wanted if path not in there]:
        names = ", ".join(policy.name for policy in policies_of(memory))
        raise AtomError(f"memory: this model has no trained parameters for {names}: {missing[0]} is missing")
    return dataclasses.replace(lm, config=cfg, params=params.unflatten({path: there[path] for path in wanted}))
