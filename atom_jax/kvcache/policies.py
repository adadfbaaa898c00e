"""The table of cache policies by name, and how they are written on a command line: "snapkv:budget=512,window=32"."""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax import config
from atom_jax.kvcache.adakv import AdaKV
from atom_jax.kvcache.dms.config import DMS
from atom_jax.kvcache.expected_attention import ExpectedAttention
from atom_jax.kvcache.h2o import H2O
from atom_jax.kvcache.keydiff import KeyDiff
from atom_jax.kvcache.knorm import KNorm
from atom_jax.kvcache.memory import Policy
from atom_jax.kvcache.observed_attention import ObservedAttention
from atom_jax.kvcache.pyramidkv import PyramidKV
from atom_jax.kvcache.quest import Quest
from atom_jax.kvcache.random_policy import RandomPolicy
from atom_jax.kvcache.snapkv import SnapKV
from atom_jax.kvcache.streaming_llm import StreamingLLM
from atom_jax.kvcache.tova import TOVA
from atom_jax.typing import LM, AtomError

POLICIES: dict[str, type[Policy]] = {
    p.name: p
    for p in (
        DMS,
        StreamingLLM,
        TOVA,
        H2O,
        ObservedAttention,
        SnapKV,
        PyramidKV,
        AdaKV,
        KNorm,
        ExpectedAttention,
        KeyDiff,
        RandomPolicy,
        Quest,
    )
}


def parse(text: str) -> Policy | None:
    """The policy that a text such as "tova:budget=512" names; None for "none".

    Raises AtomError for an unknown name, an unknown field or an unreadable value.
    """
    name, _, fields = text.partition(":")
    if name == "none":
        return None
    if name not in POLICIES:
        raise AtomError(f"memory {name!r}: expected none, {', '.join(POLICIES)}")
    return config.build(POLICIES[name], [f for f in fields.split(",") if f], f"memory {name}:")


def check(policy: Any) -> None:
    """Raises AtomError for what is neither None nor a known policy."""
    if policy is not None and type(policy) not in POLICIES.values():
        raise AtomError(f"memory: expected none or one of {', '.join(POLICIES)}, got {policy!r}")


def with_memory(lm: LM, policy: Policy | None) -> LM:
    """The same model with another cache policy, or, for None, with the dense cache.

    Learned evictors stay only under a DMS policy. Raises AtomError for models without a choice of memory, and for a
    DMS policy whose evictors the model does not have.
    """
    check(policy)
    if hasattr(lm.config, "main"):
        # A Bolmo: its memory is that of its layers over patches.
        inside = with_memory(LM(lm.config.main, {"layers": lm.params["main"]}, None), policy)
        cfg = dataclasses.replace(lm.config, main=inside.config)
        return dataclasses.replace(lm, config=cfg, params={**lm.params, "main": inside.params["layers"]})
    if not any(f.name == "memory" for f in dataclasses.fields(lm.config)):
        raise AtomError(f"memory: models of family {lm.family} have no choice of cache policies")
    params = lm.params
    if not isinstance(policy, DMS):
        attn = {name: x for name, x in params["layers"]["attn"].items() if name != "dms"}
        params = {**params, "layers": {**params["layers"], "attn": attn}}
    elif policy.form != "borrowed" and "dms" not in params["layers"]["attn"]:
        raise AtomError(f"memory: this model has no trained evictors for dms:form={policy.form}")
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, memory=policy), params=params)
