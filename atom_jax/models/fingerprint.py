"""Which model it is: a few digits that depend on every bit of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config, params
from atom_jax.typing import LM


def fingerprint(lm: LM) -> str:
    """16 hex digits that depend on the configuration and on every bit of the parameters, not on where they lie."""
    about = config.to_json(lm.config)
    # Results were kept before models had this field.
    return _digest(lm, {name: x for name, x in about.items() if name != "lora" or x is not None})


def identity(lm: LM) -> str:
    """As `fingerprint`, for what is kept for long: of fields of the configuration only those count that don't have
    their defaults, so that fields of later versions change nothing."""
    # Nothing that is computed depends on remat.
    fields = [f for f in dataclasses.fields(lm.config) if f.name != "remat"]
    return _digest(lm, {f.name: config.to_json(x) for f in fields if (x := getattr(lm.config, f.name)) != f.default})


def _digest(lm: LM, about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, leaf in params.flatten(lm.params).items():
        digest.update(f"{name} {leaf.shape} {leaf.dtype} {_checksum(leaf)}\n".encode())
    return digest.hexdigest()[:16]


def _checksum(x: jax.Array) -> int:
    """64 bits from all bits of an array and their places."""
    return sum(int(half) << 32 * i for i, half in enumerate(_sums(jnp.asarray(x))))


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums, uint32, of numbers mixed from each element and its place; computed where the array lies."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    mixed = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    for axis in range(x.ndim):
        mixed = _mix(mixed + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(0x9E3779B1))
    return jnp.sum(_mix(mixed), dtype=jnp.uint32), jnp.sum(_mix(mixed ^ jnp.uint32(0x5BD1E995)), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 by which every input bit reaches every output bit (the last step of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
