"""LoRA in the format of PEFT: a directory with adapter_config.json and adapter_model.safetensors.

The tensors are those of `models.lora` under the names of the weights that they correct,
"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" [r, inputs] and "...lora_B.weight" [outputs, r].
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from atom_jax import params as params_lib
from atom_jax import sharding
from atom_jax.checkpoint import families
from atom_jax.checkpoint.atomic import staged
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, refuse_pickle, write_file
from atom_jax.fields import Fields, read_json
from atom_jax.models import lora, transformer
from atom_jax.models.lora import LoRA
from atom_jax.typing import LM, AtomError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What tensors of a correction are called; the last name but two is that of the projection.
_NAME = re.compile(r"(?:.*\.)?(\w+)_proj\.lora_[AB]\.weight")
# Other values of these fields mean corrections that are not computed here.
_FIXED = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False,
    "modules_to_save": None, "layers_to_transform": None, "rank_pattern": {}, "alpha_pattern": {},
    "layer_replication": None, "trainable_token_indices": None, "target_parameters": None, "use_qalora": False,
    "alora_invocation_tokens": None, "use_bdlora": None, "arrow_config": None, "kasa_config": None,
    "monteclora_config": None,
}  # fmt: skip
# How corrections began, where that has left the weights beside them as they were.
_BEGINNINGS = ("gaussian", "eva", "orthogonal")


def save(lm: LM, directory: str | os.PathLike, name: str = "") -> None:
    """Writes the corrections of a model, float32. name: of the model that they belong to, for readers. All or
    nothing. Raises AtomError where it has none, or the directory cannot be written."""
    if (found := getattr(lm.config, "lora", None)) is None:
        raise AtomError("the model has no LoRA beside its weights")
    source = families.ExportSource(lm.config, lm.params, lora.paths(lm.config))
    table = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name or None, "r": found.rank,
        "lora_alpha": found.alpha, "target_modules": [f"{n}_proj" for n in found.targets], "lora_dropout": 0.0,
        "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "inference_mode": True,
        "modules_to_save": None,
    }  # fmt: skip
    with staged(directory) as staging:
        tensors = {_PREFIX + k: np.asarray(source.read(k), np.float32, order="C") for k in source.infos}
        write_file(tensors, staging / TENSORS)
        (staging / CONFIG).write_text(json.dumps(table, indent=2) + "\n", "utf-8")


def load(lm: LM, directory: Path, shardings: Any = None) -> LM:
    """The model with the corrections of a directory merged into its weights, in their dtype.

    shardings: tree of jax.sharding.Sharding for the parameters, or None. Raises AtomError, naming the file and the
    field or tensor, where the directory is malformed, belongs to another model, or asks for more than corrections of
    projections.
    """
    if not isinstance(lm.config, transformer.TransformerConfig):
        raise AtomError(f"{directory}: LoRA is for transformers, and the model is of the family {lm.family}")
    if lm.config.lora is not None:
        raise AtomError(f"{directory}: the model has LoRA beside its weights already; load it with merge=True")
    source = tensors(directory)
    found = _described(directory / CONFIG, tuple(source.infos), source.label)
    cfg = dataclasses.replace(lm.config, lora=found)
    part = lora.paths(cfg)
    places = None if shardings is None else sharding.filled(part, params_lib.flatten(shardings))
    renamed = families.Renamed(source, {name.removeprefix(_PREFIX): name for name in source.infos})
    corrections = families.load(renamed, cfg, np.float32, places, part, asked_by=CONFIG)
    leaves = params_lib.flatten(lm.params) | params_lib.flatten(corrections)
    return dataclasses.replace(lm, params=lora.merged(params_lib.unflatten(leaves), found))


def tensors(directory: Path) -> SafetensorsSource:
    """The tensors of a directory. AtomError where there are none, or pickled ones."""
    if not (directory / TENSORS).is_file():
        refuse_pickle(directory)
    return SafetensorsSource(directory / TENSORS)


def about(directory: Path) -> list[tuple[str, str]]:
    """What corrections say of themselves without their model, as names and texts; errors as of `load`."""
    source, where = tensors(directory), directory / CONFIG
    found = _described(where, tuple(source.infos), source.label)
    name = read_json(where).get("base_model_name_or_path")
    said = [("LoRA", f"rank {found.rank}, alpha {found.alpha:g}, beside {', '.join(found.targets)}")]
    return [("for", str(name)[:80]), *said] if name else said


def merged(lm: LM) -> LM:
    """The model with its corrections in its weights; the same model where it has none."""
    if (found := getattr(lm.config, "lora", None)) is None:
        return lm
    return dataclasses.replace(lm, config=lora.without(lm.config), params=lora.merged(lm.params, found))


def _described(where: Path, names: tuple[str, ...], label: str) -> LoRA:
    """The corrections of an adapter_config.json beside tensors with these names, which say the targets."""
    fields = Fields(read_json(where), str(where))
    for name, value in _FIXED.items():
        if (given := fields.data.get(name)) not in (value, None) and given:
            raise AtomError(f"{where}: {name} is {str(given)[:60]}; only {json.dumps(value)} is supported")
    if isinstance(began := fields.data.get("init_lora_weights"), str) and began not in _BEGINNINGS:
        raise AtomError(f"{where}: init_lora_weights is {began[:60]}, which changes the weights too")
    targets = [m.group(1) if (m := _NAME.fullmatch(name)) else name for name in names]
    if wrong := [name for name in targets if name not in lora.INPUTS]:
        raise AtomError(f"{label}: {wrong[0]} is no correction of a projection ({', '.join(lora.INPUTS)})")
    if not targets:
        raise AtomError(f"{label}: holds no tensors")
    rank, alpha = fields.size("r"), fields.number("lora_alpha")
    # rsLoRA divides by the root of the rank instead.
    alpha = alpha * math.sqrt(rank) if fields.flag("use_rslora", False) else alpha
    return LoRA(rank, float(alpha), tuple(name for name in lora.INPUTS if name in targets))
