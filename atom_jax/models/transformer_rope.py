"""Rotary settings of config.json <-> RopeScaling, in both published spellings.

transformers 4 has `rope_theta` and `rope_scaling`; transformers 5 has `rope_parameters`, which OLMo 3 nests by layer
type. Both are written, since each version ignores the other's.
"""

from __future__ import annotations

from typing import Any

from atom_jax.fields import Fields
from atom_jax.models.transformer import TransformerConfig
from atom_jax.models.transformer_variants import FAMILIES, FULL, SLIDING, Variant
from atom_jax.nn.rope import RopeScaling
from atom_jax.typing import AtomError

# kind -> published name -> our name, for what a kind must have and may have.
_NEEDED = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_length",
    },
    "yarn": {"factor": "factor"},
}
_OPTIONAL = {
    "yarn": {
        "original_max_position_embeddings": "original_max_length",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    },
}
# Values that mean the same as leaving the field out.
_NEUTRAL = {"partial_rotary_factor": 1.0, "truncate": True, "mscale": None, "mscale_all_dim": None}


def from_hf(fields: Fields, variant: Variant, max_length: int, sliding: bool) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embeddings. Raises AtomError naming the field that is wrong or unsupported."""
    old, new = fields.table("rope_scaling").data, fields.table("rope_parameters").data
    nested = FULL in new or SLIDING in new
    if nested:
        full = {**fields.table("rope_parameters", FULL).data, **old}
    else:
        full = old or new
    theta = (Fields(full, fields.where) if "rope_theta" in full else fields).number("rope_theta", variant.rope_theta)
    if nested and sliding:
        other = fields.table("rope_parameters", SLIDING)
        if _kind(other) != "default" or other.number("rope_theta", theta) != theta:
            raise AtomError(f"{fields.where}: sliding layers with their own rotary scaling or base are not supported")
    scaling = _scaling(Fields(full, fields.where), max_length)
    if scaling is not None and sliding and not variant.full_scaling:
        known = ", ".join(name for name, one in FAMILIES.items() if one.full_scaling)
        raise AtomError(f"{fields.where}: rotary scaling together with sliding layers is only supported for {known}")
    return theta, scaling


def to_hf(cfg: TransformerConfig) -> dict[str, Any]:
    """rope_theta, rope_scaling and rope_parameters for `cfg`."""
    scaling: dict[str, Any] = {}
    variant = FAMILIES[cfg.family]
    if cfg.rope_scaling is not None:
        kind = cfg.rope_scaling.kind
        names = {**_NEEDED[kind], **_OPTIONAL.get(kind, {})}
        values = {theirs: getattr(cfg.rope_scaling, ours) for theirs, ours in names.items()}
        scaling = {"rope_type": kind, **{name: value for name, value in values.items() if value is not None}}
        if "sliding" in cfg.layer_types and not variant.full_scaling:
            raise AtomError(f"rope_scaling: published {cfg.family} models scale sliding layers too, not this one")
    full = {"rope_type": "default", **scaling, "rope_theta": cfg.rope_theta}
    if variant.full_scaling:
        full = {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": cfg.rope_theta}}
    if variant.short_linear and scaling.get("rope_type") == "linear":
        scaling = {"type": "linear", "factor": scaling["factor"]}
    return {"rope_theta": cfg.rope_theta, "rope_scaling": scaling or None, "rope_parameters": full}


def _scaling(fields: Fields, max_length: int) -> RopeScaling | None:
    data, where = fields.data, fields.where
    kind = _kind(fields)
    if kind == "default":
        return None
    if kind not in _NEEDED:
        raise AtomError(f"{where}: rope_type {kind!r} is not supported (known: default, {', '.join(_NEEDED)})")
    optional = _OPTIONAL.get(kind, {})
    names = {**_NEEDED[kind], **optional}
    for name in data.keys() - names.keys() - {"rope_type", "type", "rope_theta"}:
        if name not in _NEUTRAL or data[name] not in (None, _NEUTRAL[name]):
            raise AtomError(f"{where}: {name} of a {kind} rotary scaling is not supported")
    values: dict[str, Any] = {"original_max_length": max_length} if kind == "yarn" else {}
    for name, ours in names.items():
        if name not in optional or data.get(name) is not None:
            values[ours] = fields.size(name) if ours == "original_max_length" else fields.number(name)
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise AtomError(f"{where}: low_freq_factor must be smaller than high_freq_factor")
    try:
        return RopeScaling(kind=kind, **values)
    except AtomError as e:
        raise AtomError(f"{where}: {e}") from None


def _kind(fields: Fields) -> str:
    kind = fields.data.get("rope_type", fields.data.get("type", "default"))
    if not isinstance(kind, str):
        raise AtomError(f"{fields.where}: rope_type is {str(kind)[:60]}; it must be a name")
    return kind
