"""The table of cache policies by name, and how they are written on a command line: "snapkv:budget=512,window=32", or
"quest:budget=512;0=none;1=none" with others for some layers."""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax import config, params
from atom_jax.kvcache.adakv import AdaKV
from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.dms import DMS
from atom_jax.kvcache.expected_attention import ExpectedAttention
from atom_jax.kvcache.h2o import H2O
from atom_jax.kvcache.keydiff import KeyDiff
from atom_jax.kvcache.knorm import KNorm
from atom_jax.kvcache.memory import Sizes, Stack, stack_layers
from atom_jax.kvcache.observed_attention import ObservedAttention
from atom_jax.kvcache.policy import PerLayer, Policy, policies_of
from atom_jax.kvcache.pyramidkv import PyramidKV
from atom_jax.kvcache.quest import Quest
from atom_jax.kvcache.random_policy import RandomPolicy
from atom_jax.kvcache.snapkv import SnapKV
from atom_jax.kvcache.streaming_llm import StreamingLLM
from atom_jax.kvcache.tova import TOVA
from atom_jax.kvcache.window import WindowLayer
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


def parse(text: str) -> Policy | PerLayer | None:
    """The policy that a text such as "tova:budget=512" names; None for "none". After it, ";LAYER=POLICY" names other
    ones for single layers.

    Raises AtomError for an unknown name, an unknown field or an unreadable value.
    """
    first, *others = text.split(";")
    if not others:
        return _parse(first)
    at = []
    for other in others:
        layer, _, one = other.partition("=")
        if not layer.strip().isdecimal():
            raise AtomError(f"memory {other!r}: expected LAYER=POLICY")
        at.append((int(layer), _parse(one)))
    return PerLayer(_parse(first), tuple(at))


def _parse(text: str) -> Policy | None:
    name, _, fields = text.strip().partition(":")
    if name == "none":
        return None
    if name not in POLICIES:
        raise AtomError(f"memory {name!r}: expected none, {', '.join(POLICIES)}")
    return config.build(POLICIES[name], [f for f in fields.split(",") if f], f"memory {name}:")


def check(memory: Any) -> None:
    """Raises AtomError for what is neither None nor a known policy, or a choice among these."""
    for policy in policies_of(memory):
        if type(policy) not in POLICIES.values():
            raise AtomError(f"memory: expected none or one of {', '.join(POLICIES)}, got {policy!r}")


def empty(policy: Policy | None, sizes: Sizes, capacity: int, numbers: tuple[int, ...], window: int | None) -> Stack:
    """The empty memory of a run of equal layers, with room for `capacity` tokens per row; see `Policy.init`.

    window: of sliding layers, which keep a ring where there is no policy, else None.
    """
    if policy is not None:
        return Stack(policy.init(sizes, capacity, numbers))
    shape = (sizes.b, sizes.h, capacity, sizes.k, sizes.dtype)
    layer = DenseLayer.empty(*shape) if window is None else WindowLayer.empty(*shape, window)
    return Stack(stack_layers(layer, len(numbers)))


def with_memory(lm: LM, memory: Policy | PerLayer | None) -> LM:
    """The same model with another cache policy, or, for None, with the dense cache; of a Bolmo in its layers over
    patches.

    Learned evictors stay only under a DMS policy. Raises AtomError for a DMS policy whose evictors the model does not
    have.
    """
    check(memory)
    where = "main" if hasattr(lm.config, "main") else None
    inside = dataclasses.replace(getattr(lm.config, where) if where else lm.config, memory=memory)
    cfg = dataclasses.replace(lm.config, **{where: inside}) if where else inside
    flat = params.flatten(lm.params)
    learned = {path for path in flat if f"/{DMS.name}/" in path}
    wanted = [policy for policy in policies_of(memory) if isinstance(policy, DMS)]
    for policy in wanted:
        if policy.form != "borrowed" and not learned:
            raise AtomError(f"memory: this model has no trained evictors for dms:form={policy.form}")
    kept = lm.params if wanted else params.unflatten({path: x for path, x in flat.items() if path not in learned})
    return dataclasses.replace(lm, config=cfg, params=kept)
