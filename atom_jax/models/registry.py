"""All kinds of models, by their configurations."""

from __future__ import annotations

from typing import Any

from atom_jax.models import bolmo, hnet, transformer_family
from atom_jax.models.family import Family
from atom_jax.typing import AtomError

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a kind of model known to everything that works with models."""
    FAMILIES[family.name] = family


for _family in (*transformer_family.FAMILIES, hnet.FAMILY, bolmo.FAMILY):
    register(_family)


def of(cfg: Any) -> Family:
    """The family of a configuration. Raises AtomError for one of an unknown type or name."""
    family = FAMILIES.get(getattr(cfg, "family", None))
    if family is None or type(cfg) is not family.config:
        known = ", ".join(FAMILIES)
        raise AtomError(f"no model for configurations of type {type(cfg).__name__}; known: {known}")
    return family
