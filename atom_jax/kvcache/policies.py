"""The table of cache policies by name, and how they are written on a command line: "snapkv:budget=512,window=32"."""

from __future__ import annotations

from typing import Any

from atom_jax import config
from atom_jax.kvcache.dms.config import DMS
from atom_jax.kvcache.memory import Policy
from atom_jax.typing import AtomError

POLICIES: dict[str, type[Policy]] = {p.name: p for p in (DMS,)}


def parse(text: str) -> Policy | None:
    """The policy that a text such as "tova:budget=512" names; None for "none".

    Raises AtomError for an unknown name, an unknown field or an unreadable value.
    """
    name, _, fields = text.partition(":")
    if name == "none":
        return None
    if name not in POLICIES:
        raise AtomError(f"memory {name!r}: expected none, {', '.join(POLICIES)}")
    return config.override(POLICIES[name](), [f for f in fields.split(",") if f])


def check(policy: Any) -> None:
    """Raises AtomError for what is neither None nor a known policy."""
    if policy is not None and type(policy) not in POLICIES.values():
        raise AtomError(f"memory: expected none or one of {', '.join(POLICIES)}, got {policy!r}")
