"""Adapters: learned evictors alone, to be put on the model that they were trained for.

An adapter is a directory:

    adapter.json         {"format": 1, "base": {family, n_layers, d_model, n_kv_heads, n_heads, head_dim, name},
                         "memory": the DMS configuration}
    adapter.safetensors  the evictors' tensors, float32, under the names they have in a whole checkpoint
    README.md            model card, optional
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from atom_jax import config
from atom_jax import params as params_lib
from atom_jax.checkpoint import families
from atom_jax.checkpoint.atomic import staged
from atom_jax.checkpoint.fields import Fields, read_json
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_file
from atom_jax.kvcache.dms import DMS
from atom_jax.kvcache.dms.config import LEARNED
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.typing import LM, AtomError

FORMAT = 1
CONFIG, TENSORS, CARD = "adapter.json", "adapter.safetensors", "README.md"
PART = "attn/dms/"  # what the paths of the evictors' parameters contain, and no others do
SHIPPED = Path(__file__).resolve().parent.parent / "adapters"
_SIZES = ("n_layers", "d_model", "n_kv_heads", "n_heads", "head_dim")


def save_adapter(lm: LM, directory: str | os.PathLike, card: str = "", name: str = "") -> None:
    """Writes the learned evictors of a model, without the model, as float32.

    card: text of README.md; "" leaves one that is there. name: what the base model is called, for readers. All or
    nothing: on any failure `directory` is as before. Raises AtomError where the model has no evictors with parameters
    of their own, or the directory cannot be written.
    """
    cfg = _transformer(lm)
    if not isinstance(cfg.memory, DMS):
        raise AtomError("the model has no learned evictors (its memory is not DMS), so there is no adapter to save")
    if cfg.memory.form not in LEARNED:
        raise AtomError(f"evictors of form {cfg.memory.form!r} have no parameters of their own: save the whole model")
    source = families.ExportSource(cfg, lm.params, PART)
    base = {"family": cfg.family, **{size: getattr(cfg, size) for size in _SIZES}, "name": name}
    table = {"format": FORMAT, "base": base, "memory": config.to_json(cfg.memory)}
    with staged(directory) as staging:
        write_file({k: np.asarray(source.read(k), np.float32, order="C") for k in source.infos}, staging / TENSORS)
        (staging / CONFIG).write_text(json.dumps(table, indent=2) + "\n", "utf-8")
        if card:
            (staging / CARD).write_text(card.rstrip("\n") + "\n", "utf-8")


def load_adapter(lm: LM, reference: str | os.PathLike, dtype: Any = None, shardings: Any = None) -> LM:
    """The same model with the evictors of an adapter: its `memory`, and its parameters under attn/dms.

    reference: as for `find`. dtype: cast the adapter's parameters to it; None keeps float32. shardings: tree of
    jax.sharding.Sharding for the parameters of the result, or None; where it leaves out those of the adapter, every
    device of the embedding's mesh holds all of them. A policy or evictors that the model had are replaced. Raises
    AtomError, naming the file and the field or tensor, where the adapter is malformed or belongs to another model.
    """
    directory = find(reference)
    where = directory / CONFIG
    cfg, memory = _transformer(lm), _check(_transformer(lm), read_json(where), str(where))
    try:
        cfg = dataclasses.replace(cfg, memory=memory)
    except AtomError as e:
        raise AtomError(f"{where}: {e}") from None
    places = None if shardings is None else _places(cfg, params_lib.flatten(shardings))
    source = SafetensorsSource(directory / TENSORS)
    learned = params_lib.flatten(families.load(source, cfg, dtype, places, part=PART, asked_by=CONFIG))
    kept = {path: x for path, x in params_lib.flatten(lm.params).items() if PART not in path}
    return dataclasses.replace(lm, config=cfg, params=params_lib.unflatten(kept | learned))


def find(reference: str | os.PathLike) -> Path:
    """The directory of an adapter: of a shipped one by its name, else a path ("./NAME" for one of the same name).

    Raises AtomError, with the shipped names, where there is neither.
    """
    names = shipped()
    if str(reference) in names:
        return SHIPPED / str(reference)
    path = Path(reference)
    if (path / CONFIG).is_file():
        return path
    known = f"shipped are {', '.join(names)}" if names else "none are shipped"
    what = f"a directory without {CONFIG}" if path.is_dir() else "neither a shipped adapter nor a directory"
    raise AtomError(f"adapter {str(reference)!r} is {what} ({known})")


def shipped() -> list[str]:
    """Names of the adapters that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def _transformer(lm: LM) -> TransformerConfig:
    if not isinstance(lm.config, TransformerConfig):
        raise AtomError(f"models of type {type(lm.config).__name__} have no adapters")
    return lm.config


def _check(cfg: TransformerConfig, data: dict[str, Any], where: str) -> DMS:
    """The evictors of an adapter.json, which must be made for models like `cfg`."""
    if data.get("format") != FORMAT:
        raise AtomError(f"{where}: format is {str(data.get('format'))[:60]}; only {FORMAT} is known")
    base = Fields(data, where).table("base")
    there = {"family": base.data.get("family"), **{size: base.size(size) for size in _SIZES}}
    wrong = [
        f"{k} is {v} in the adapter and {getattr(cfg, k)} in the model"
        for k, v in there.items()
        if v != getattr(cfg, k)
    ]
    if wrong:
        raise AtomError(f"{where}: {', '.join(wrong)}")
    try:
        memory = config.from_json(object, data.get("memory"), "memory")
    except AtomError as e:
        raise AtomError(f"{where}: {e}") from None
    if not isinstance(memory, DMS):
        raise AtomError(f"{where}: memory is {type(memory).__name__}, not DMS")
    if memory.form not in LEARNED:
        raise AtomError(f"{where}: memory.form is {memory.form!r}, which needs a whole model")
    if isinstance(cfg.memory, DMS) and cfg.memory.form == "borrowed":
        raise AtomError(
            f"{where}: the model's own weights hold evictors (form 'borrowed'), an adapter cannot replace them"
        )
    return memory


def _places(cfg: TransformerConfig, given: dict[str, Any]) -> params_lib.Tree:
    """Shardings of the adapter's parameters."""
    embed = given["embed"]
    spread = embed
    if isinstance(embed, jax.sharding.NamedSharding):
        spread = jax.sharding.NamedSharding(embed.mesh, jax.sharding.PartitionSpec())
    paths = [path for path in params_lib.flatten(transformer.spec(cfg)) if PART in path]
    return params_lib.unflatten({path: given.get(path, spread) for path in paths})
