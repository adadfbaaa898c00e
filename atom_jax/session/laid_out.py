"""Parameters as generation reads them fastest on the devices at hand: made once for a model, which keeps them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.models import registry
from atom_jax.typing import LM


def of(lm: LM) -> Any:
    """The model's `decode_params` for this backend, kept as long as `lm` lives and its arrays are the same."""
    leaves = jax.tree.leaves(lm.params)
    known, laid_out = lm.kept.get("laid_out", ([], None))
    if len(known) != len(leaves) or any(a is not b for a, b in zip(known, leaves)):
        model = registry.of(lm.config)
        laid_out = model.decode_params(lm.params, lm.config, unroll=unrolls(lm))
        laid_out |= jax.tree.map(jnp.asarray, model.codec(lm.config).beside(lm.tokenizer))
        lm.kept["laid_out"] = leaves, laid_out
    return laid_out


def scanned(lm: LM) -> Any:
    """The parameters for scanned layers, with what reading on needs beside them."""
    beside = registry.of(lm.config).codec(lm.config).beside(lm.tokenizer)
    return lm.params | {name: of(lm)[name] for name in beside} if beside else lm.params


def unrolls(lm: LM) -> bool:
    """Whether generation runs separate layers instead of stacked ones: on one CPU device."""
    leaves = jax.tree.leaves(lm.params)
    spread = any(len(x.sharding.device_set) > 1 for x in leaves if isinstance(x, jax.Array))
    return jax.default_backend() == "cpu" and not spread
