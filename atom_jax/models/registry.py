"""From a model configuration to the module with its pure functions: spec, hidden, logits, apply; init_cache, full,
grow, unstack, cache_use, decode_params, read_whole, step for generation; and roomier."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from atom_jax.models import hnet, transformer
from atom_jax.typing import AtomError

MODELS: dict[type, ModuleType] = {transformer.TransformerConfig: transformer, hnet.HNetConfig: hnet}


def of(cfg: Any) -> ModuleType:
    """The model module for a configuration. Raises AtomError for a configuration of an unknown type."""
    if type(cfg) not in MODELS:
        known = ", ".join(c.__name__ for c in MODELS)
        raise AtomError(f"no model for configurations of type {type(cfg).__name__}; known: {known}")
    return MODELS[type(cfg)]
