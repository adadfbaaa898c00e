"""The published families of transformers: one record each with everything that differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from atom_jax.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Variant:
    """What distinguishes one published family from the others.

    architecture: its name in config.json.
    qk_norm: where queries and keys are normalised: "none", "head" (per head) or "full" (all heads together).
    post_norm: whether norms act on the output of attention and MLP instead of on their input.
    head_dim, rope_theta: where config.json has none; None: width / heads, and a complaint.
    kinds(fields, n): published layer types of n layers where config.json has none; None: no layers slide.
    switch: the field without which no layers slide, or None.
    full_scaling: whether rotary scaling acts on full layers alone, where some slide.
    short_linear: whether its published code wants nothing but type and factor of a linear rotary scaling.
    extra(cfg): further fields of config.json.
    """

    architecture: str
    qk_norm: str = "none"
    post_norm: bool = False
    head_dim: int | None = None
    rope_theta: float | None = None
    kinds: Callable[[Fields, int], list[str]] | None = None
    switch: str | None = None
    full_scaling: bool = False
    short_linear: bool = False
    extra: Callable[[Any], dict[str, Any]] = lambda cfg: {}


def _qwen_kinds(fields: Fields, n: int) -> list[str]:
    first = fields.size("max_window_layers", 28, least=0) if fields.flag("use_sliding_window", False) else n
    return [SLIDING if i >= first else FULL for i in range(n)]


def _qwen_extra(cfg: Any) -> dict[str, Any]:
    if "sliding" not in cfg.layer_types:
        return {"sliding_window": None, "use_sliding_window": False, "max_window_layers": cfg.n_layers}
    return {"use_sliding_window": True, "max_window_layers": cfg.layer_types.index("sliding")}


FAMILIES = {
    "llama": Variant("LlamaForCausalLM", rope_theta=10000.0),
    "qwen3": Variant(
        "Qwen3ForCausalLM",
        qk_norm="head",
        head_dim=128,
        rope_theta=10000.0,
        kinds=_qwen_kinds,
        switch="use_sliding_window",
        extra=_qwen_extra,
    ),
    # Versions of transformers disagree on the rotary base of OLMo.
    "olmo2": Variant("Olmo2ForCausalLM", qk_norm="full", post_norm=True, short_linear=True),
    "olmo3": Variant(
        "Olmo3ForCausalLM",
        qk_norm="full",
        post_norm=True,
        kinds=lambda fields, n: [FULL if i % 4 == 3 else SLIDING for i in range(n)],
        full_scaling=True,
    ),
}
