"""The examples of every family that is registered, as models with random parameters."""

import functools
from typing import Any

import jax
import numpy as np

from atom_jax import params, tokenizers
from atom_jax.models import registry
from atom_jax.typing import LM

EXAMPLES = {
    f"{family.name}-{name}": cfg for family in registry.FAMILIES.values() for name, cfg in family.examples().items()
}


@functools.cache
def model(name: str) -> LM:
    """An example with random parameters. Its tokenizer is one that its family can have."""
    cfg = EXAMPLES[name]
    return with_parameters(cfg)


def with_parameters(cfg: Any) -> LM:
    """A model of this configuration, large values so that little is likely twice."""
    family = registry.of(cfg)
    p = params.init(jax.random.key(0), family.spec(cfg))
    kind = "bolmo" if family.codec(cfg).pending else "bytes"
    return LM(cfg, p, tokenizers.from_name(kind))


def prompts(lm: LM, *lengths: int) -> list[list[int]]:
    """Prompts of these lengths whose ids the model's text may hold: printable characters, in the tokenizer's ids."""
    rng = np.random.default_rng(0)
    text = bytes(rng.choice(np.frombuffer(b"etaoin shrdlu, cmfwyp", np.uint8), sum(lengths)))
    ids, out = lm.tokenizer.encode(text), []
    for n in lengths:
        out.append([int(i) for i in ids[:n]])
        ids = ids[n:]
    return out
