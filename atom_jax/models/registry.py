"""From a model configuration to the module with its pure functions: spec, hidden, logits, apply; init_cache, full,
grow, unstack, cache_use, decode_params, read_whole, step for generation; and roomier.

And three constants. TWINS: whether ids have two forms, in the two halves of the vocabulary (such a model has `fuse`,
which puts targets in the form that they have in a text). UNUSED: ids that are never generated. PENDING: whether the
form of a prompt's last token is chosen before the first new token."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from atom_jax.models import bolmo, hnet, transformer
from atom_jax.typing import AtomError

MODELS: dict[type, ModuleType] = {
    transformer.TransformerConfig: transformer,
    hnet.HNetConfig: hnet,
    bolmo.BolmoConfig: bolmo,
}


def of(cfg: Any) -> ModuleType:
    """The model module for a configuration. Raises AtomError for a configuration of an unknown type."""
    if type(cfg) not in MODELS:
        known = ", ".join(c.__name__ for c in MODELS)
        raise AtomError(f"no model for configurations of type {type(cfg).__name__}; known: {known}")
    return MODELS[type(cfg)]
