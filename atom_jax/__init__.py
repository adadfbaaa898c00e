"""AToM-JAX: adaptive tokenization and memory for language models."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "atom_jax.checkpoint",
    "save_hf": "atom_jax.checkpoint",
    "save_adapter": "atom_jax.checkpoint",
    "apply": "atom_jax.inference.score",
    "generate": "atom_jax.inference.generate",
    "reason": "atom_jax.inference.scaling",
    "transplant": "atom_jax.inference.transplant",
    "byte_logprobs": "atom_jax.inference.byte_law",
    "chat": "atom_jax.inference.chat",
    "Chat": "atom_jax.inference.chat",
    "Engine": "atom_jax.inference.engine",
    "Session": "atom_jax.session.session",
    "Memory": "atom_jax.lasting.memory",
    "observe": "atom_jax.inference.imagine",
    "imagine": "atom_jax.inference.imagine",
    "plan": "atom_jax.inference.imagine",
    "Frames": "atom_jax.typing",
    "LM": "atom_jax.typing",
    "Output": "atom_jax.typing",
    "Batch": "atom_jax.typing",
    "AtomError": "atom_jax.typing",
}
__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that `import atom_jax` stays quick."""
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'atom_jax' has no attribute {name!r}")
