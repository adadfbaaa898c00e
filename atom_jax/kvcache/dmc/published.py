"""Learned merging in whole checkpoints: fields of config.json <-> Settings, and the names of tensors.

The models of the paper are Megatron checkpoints, which borrow a channel of queries and keys and have no tensors of
their own; dmc_window_size, dmc_init_val, dmc_temp and dmc_cr are the arguments of NVIDIA's code under its names. What
only this library has is written as atom_dmc_ and the name of the setting, where it differs from the default.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax.fields import Fields
from atom_jax.kvcache.dmc.config import FORMS, Settings
from atom_jax.naming import Rule
from atom_jax.typing import AtomError

RULES = (
    Rule("dmc_norm.weight", "norm"),
    Rule("dmc_alpha.weight", "alpha", 1),
    Rule("dmc_alpha.bias", "bias"),
    Rule("dmc_weight.weight", "weight", 1),
    Rule("dmc_evict.weight", "evict", 1),
    Rule("dmc_evict.bias", "evict_bias"),
    Rule("dmc_evict_observed.weight", "evict_observed", 1),
    Rule("dmc_alpha_observed.weight", "alpha_observed", 1),
    Rule("dmc_weight_observed.weight", "weight_observed", 1),
)
_OWN = ("form", "window", "turned", "mass", "evicts", "scale", "bias", "sinks", "page")
FIELDS = frozenset({"dmc_window_size", "dmc_init_val", "dmc_temp", "dmc_cr", *(f"atom_dmc_{name}" for name in _OWN)})


def from_hf(fields: Fields) -> dict[str, Any] | None:
    """The settings that a config.json describes, by name; None where it names none. Raises AtomError, naming the
    field, for a senseless value, and for others without dmc_window_size."""
    data = fields.data
    if data.get("dmc_window_size") is None:
        given = sorted(name for name in FIELDS if data.get(name) is not None)
        if given:
            raise AtomError(f"{fields.where}: the field dmc_window_size is missing, which {given[0]} asks for")
        return None
    return dict(
        span=fields.size("dmc_window_size", least=0),
        offset=fields.number("dmc_init_val", Settings.offset, positive=False),
        tau=fields.number("dmc_temp", Settings.tau),
        cr=fields.number("dmc_cr", Settings.cr),
        form=fields.one_of("atom_dmc_form", FORMS, "borrowed"),
        window=fields.size("atom_dmc_window", 0, least=0),
        turned=fields.flag("atom_dmc_turned", False),
        mass=fields.flag("atom_dmc_mass", False),
        evicts=fields.flag("atom_dmc_evicts", False),
        scale=fields.number("atom_dmc_scale", Settings.scale, positive=False),
        bias=fields.flag("atom_dmc_bias", False),
        sinks=fields.size("atom_dmc_sinks", 0, least=0),
        page=fields.size("atom_dmc_page", Settings.page),
    )


def to_hf(dmc: Settings) -> dict[str, Any]:
    """Fields of config.json."""
    out = {"dmc_window_size": dmc.span, "dmc_init_val": dmc.offset, "dmc_temp": dmc.tau, "dmc_cr": dmc.cr}
    default = dataclasses.replace(Settings(), form="borrowed")
    own = {name: getattr(dmc, name) for name in _OWN}
    return out | {f"atom_dmc_{name}": x for name, x in own.items() if x != getattr(default, name)}
