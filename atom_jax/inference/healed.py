"""Prompts that end inside a token, healed (`tokenizers.healing`): as a model goes on with them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.inference.byte_law import canonical_of
from atom_jax.session import sampling
from atom_jax.session.prompts import token_rows
from atom_jax.session.session import Session
from atom_jax.tokenizers.healing import Healer
from atom_jax.typing import LM

# What the draws here are independent of those of `generate` by.
_HEALING = 2**31 - 1
_choose = jax.jit(sampling.choose)


def healed(
    lm: LM, prompts: Any, temperature: float = 0.0, key: jax.Array | None = None, *, top_k: int = 0,
    top_p: float = 1.0, min_p: float = 0.0,
) -> list[list[int]]:  # fmt: skip
    """Prompts as ids for `generate`, their last tokens taken back and chosen anew among those that write the same
    bytes; the last one may say more. Arguments and errors as for `generate`, and as for `byte_logprobs`.

    A prompt of which nothing would be left stays as it is.
    """
    how, rows = sampling.sampler(temperature, top_k, top_p, min_p), token_rows(lm, prompts, first=True)
    keys = jax.vmap(lambda k: jax.random.fold_in(k, _HEALING))(sampling.row_keys(key, len(rows)))
    healer = Healer(canonical_of(lm).view)
    taken = [healer.take_back(row.tolist()) for row in rows]
    out = [kept or row.tolist() for (kept, _), row in zip(taken, rows)]
    rests = [rest if kept else b"" for kept, rest in taken]
    if not any(rests):
        return out
    session = Session.prefill(lm, out)
    for step in range(max(map(len, rests))):
        logits = np.array(session.logits)
        for row, rest in enumerate(rests):
            allowed = healer.allowed(rest)
            logits[row, : len(allowed)][~allowed] = -np.inf
            logits[row, len(allowed) :] = -np.inf
        token_b = np.asarray(_choose(jnp.asarray(logits), keys, jnp.int32(step), how))
        live = np.array([bool(rest) for rest in rests])
        for row in np.flatnonzero(live):
            out[row].append(int(token_b[row]))
            rests[row] = healer.after(rests[row], out[row][-1])
        if not any(rests):
            break
        session = session.step(token_b, live)
    return out
