"""Fields of learned evictors in config.json <-> DMS.

Published are the dms_ fields. What only this library has is written as atom_dms_form, atom_dms_bias, atom_dms_rank,
atom_dms_sinks, atom_dms_page and atom_dms_separators, where it differs from the published layout, and overrides it.
"""

from __future__ import annotations

from typing import Any

from atom_jax.checkpoint.fields import Fields
from atom_jax.kvcache.dms import DMS
from atom_jax.kvcache.dms.config import FORMS, LEARNED
from atom_jax.typing import AtomError

OBEYED = {
    "dms_window_size", "dms_alpha_scale", "dms_initial_alpha_offset", "dms_separate_alpha", "dms_alpha_per",
    "dms_tau", "dms_cr", "dms_paged_attention_block_size", "dms_disable_eviction",
    "atom_dms_form", "atom_dms_bias", "atom_dms_rank", "atom_dms_sinks", "atom_dms_page", "atom_dms_separators",
}  # fmt: skip
# How the published code runs, not what it computes.
HARMLESS = {
    "dms_manual_inference_mode", "dms_chunked_prefill", "dms_preallocate_for_tokens", "dms_compile_limit", "auto_map",
}  # fmt: skip
ARCHITECTURES = {"qwen3": "Qwen3ForCausalLMDMS"}


def from_hf(fields: Fields) -> DMS | None:
    """The evictors that a config.json describes; None where it names none.

    Raises AtomError, naming the field, for a senseless value, for evictors without dms_window_size, and for
    dms_disable_eviction.
    """
    data = fields.data
    named = data.get("architectures")
    if data.get("dms_window_size") is None:
        published = isinstance(named, list) and any(name in ARCHITECTURES.values() for name in named)
        given = sorted(name for name in OBEYED if data.get(name) is not None)
        if published or given:
            reason = given[0] if given else "architectures"
            raise AtomError(f"{fields.where}: the field dms_window_size is missing, which {reason} asks for")
        return None
    if fields.flag("dms_disable_eviction", False):
        raise AtomError(f"{fields.where}: dms_disable_eviction is true; only false is supported")
    separate = fields.flag("dms_separate_alpha", False)
    return DMS(
        form=fields.one_of("atom_dms_form", FORMS, "adapter" if separate else "borrowed"),
        window=fields.size("dms_window_size"),
        scale=fields.number("dms_alpha_scale", DMS.scale),
        offset=fields.number("dms_initial_alpha_offset", DMS.offset, positive=False),
        tau=fields.number("dms_tau", DMS.tau),
        per=fields.one_of("dms_alpha_per", ("head", "layer"), "head"),
        bias=fields.flag("atom_dms_bias", False),
        rank=fields.size("atom_dms_rank", 0, least=0),
        sinks=fields.size("atom_dms_sinks", 0, least=0),
        separators=fields.ids("atom_dms_separators", 2**31 - 1),
        page=fields.size("atom_dms_page", DMS.page),
        cr=fields.number("dms_cr", DMS.cr),
        block_size=fields.size("dms_paged_attention_block_size", DMS.block_size),
    )


def to_hf(family: str, dms: DMS) -> dict[str, Any]:
    """Fields of config.json for these evictors, `architectures` among them where the family has a published name."""
    out = {"architectures": [ARCHITECTURES[family]]} if family in ARCHITECTURES else {}
    out |= {
        "dms_window_size": dms.window,
        "dms_alpha_scale": dms.scale,
        "dms_initial_alpha_offset": dms.offset,
        "dms_separate_alpha": dms.form in LEARNED,
        "dms_alpha_per": dms.per,
        "dms_tau": dms.tau,
        "dms_cr": int(dms.cr) if float(dms.cr).is_integer() else dms.cr,
        "dms_paged_attention_block_size": dms.block_size,
        "dms_disable_eviction": False,
    }
    if dms.form in ("observed", "separators"):
        out["atom_dms_form"] = dms.form
    if dms.separators:
        out["atom_dms_separators"] = list(dms.separators)
    return out | {f"atom_dms_{k}": getattr(dms, k) for k in ("bias", "rank", "sinks", "page") if _differs(dms, k)}


def _differs(dms: DMS, name: str) -> bool:
    return getattr(dms, name) != getattr(DMS, name)
