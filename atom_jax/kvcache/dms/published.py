"""Learned evictors in whole checkpoints: fields of config.json <-> Settings, and the names of tensors.

Published are the dms_ fields. What only this library has is written as atom_dms_form, atom_dms_per, atom_dms_bias,
atom_dms_beyond, atom_dms_shared, atom_dms_rank, atom_dms_sinks, atom_dms_page and atom_dms_separators, where it
differs from the published layout, and overrides it.
"""

from __future__ import annotations

from typing import Any

from atom_jax.fields import Fields
from atom_jax.kvcache.dms.config import FORMS, LEARNED, PER, Settings
from atom_jax.naming import Rule
from atom_jax.nn import low_rank
from atom_jax.typing import AtomError

# The first two are published, the others our own, the corrections under the names of PEFT.
RULES = (
    Rule("dms_proj_alpha.weight", "alpha", 1),
    Rule("dms_proj_alpha_norm.weight", "norm"),
    Rule("dms_observed.weight", "observed", 1),
    Rule("dms_proj_alpha.bias", "bias"),
    Rule("dms_slope", "slope"),
    Rule("dms_tell", "tell"),
    Rule("dms_hear", "hear"),
    *(Rule(f"{n}_proj.lora_A.weight", f"{n}_a", inputs) for n, inputs in low_rank.ATTENTION.items()),
    *(Rule(f"{n}_proj.lora_B.weight", f"{n}_b", 1) for n in low_rank.ATTENTION),
)
_OBEYED = {
    "dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset", "dms_separate_alpha", "dms_alpha_per",
    "dms_tau", "dms_cr", "dms_paged_attention_block_size", "dms_disable_eviction",
    "atom_dms_form", "atom_dms_per", "atom_dms_bias", "atom_dms_rank", "atom_dms_sinks", "atom_dms_page",
    "atom_dms_separators", "atom_dms_shared", "atom_dms_beyond",
}  # fmt: skip
# How the published code runs, not what it computes.
_HARMLESS = {
    "dms_manual_inference_mode", "dms_chunked_prefill", "dms_preallocate_for_tokens", "dms_compile_limit", "auto_map",
}  # fmt: skip
FIELDS = frozenset(_OBEYED | _HARMLESS)
_ARCHITECTURES = {"qwen3": "Qwen3ForCausalLMDMS"}


def from_hf(fields: Fields) -> dict[str, Any] | None:
    """The settings of the evictors that a config.json describes, by name; None where it names none.

    Raises AtomError, naming the field, for a senseless value, for evictors without dms_window_size, and for
    dms_disable_eviction.
    """
    data = fields.data
    named = data.get("architectures")
    if data.get("dms_window_size") is None:
        published = isinstance(named, list) and any(name in _ARCHITECTURES.values() for name in named)
        given = sorted(name for name in _OBEYED if data.get(name) is not None)
        if published or given:
            reason = given[0] if given else "architectures"
            raise AtomError(f"{fields.where}: the field dms_window_size is missing, which {reason} asks for")
        return None
    if fields.flag("dms_disable_eviction", False):
        raise AtomError(f"{fields.where}: dms_disable_eviction is true; only false is supported")
    separate = fields.flag("dms_separate_alpha", False)
    return dict(
        form=fields.one_of("atom_dms_form", FORMS, "adapter" if separate else "borrowed"),
        window=fields.size("dms_window_size"),
        scale=fields.number("dms_alpha_scale", Settings.scale),
        offset=fields.number("dms_initial_alpha_offset", Settings.offset, positive=False),
        tau=fields.number("dms_tau", Settings.tau),
        per=fields.one_of("atom_dms_per", PER, fields.one_of("dms_alpha_per", ("head", "layer"), "head")),
        bias=fields.flag("atom_dms_bias", False),
        beyond=fields.size("atom_dms_beyond", 0, least=0),
        shared=fields.size("atom_dms_shared", 0, least=0),
        rank=fields.size("atom_dms_rank", 0, least=0),
        sinks=fields.size("atom_dms_sinks", 0, least=0),
        separators=fields.ids("atom_dms_separators", 2**31 - 1),
        page=fields.size("atom_dms_page", Settings.page),
        cr=fields.number("dms_cr", Settings.cr),
        block_size=fields.size("dms_paged_attention_block_size", Settings.block_size),
    )


def to_hf(family: str, dms: Settings) -> dict[str, Any]:
    """Fields of config.json for these evictors, `architectures` among them where the family has a published name."""
    out = {"architectures": [_ARCHITECTURES[family]]} if family in _ARCHITECTURES else {}
    out |= {
        "dms_window_size": dms.window,
        "dms_alpha_scale": dms.scale,
        "dms_initial_alpha_offset": dms.offset,
        "dms_separate_alpha": dms.form in LEARNED,
        "dms_alpha_per": "head" if dms.per == "mean" else dms.per,
        "dms_tau": dms.tau,
        "dms_cr": int(dms.cr) if float(dms.cr).is_integer() else dms.cr,
        "dms_paged_attention_block_size": dms.block_size,
        "dms_disable_eviction": False,
    }
    if dms.form in ("observed", "separators"):
        out["atom_dms_form"] = dms.form
    if dms.per == "mean":
        out["atom_dms_per"] = dms.per
    if dms.separators:
        out["atom_dms_separators"] = list(dms.separators)
    differs = lambda name: getattr(dms, name) != getattr(Settings, name)  # noqa: E731
    return out | {
        f"atom_dms_{k}": getattr(dms, k) for k in ("bias", "beyond", "shared", "rank", "sinks", "page") if differs(k)
    }
