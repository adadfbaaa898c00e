"""Adapters: what a model's cache policy has learned, or LoRA, alone, to be put on the model that it was trained for.

An adapter is a directory; LoRA's is PEFT's (`checkpoint.peft`), that of a policy has:

    adapter.json         {"format": 1, "base": {family, n_layers, d_model, n_kv_heads, n_heads, head_dim, name},
                         "memory": the policy's configuration}
    adapter.safetensors  the learned tensors, float32, under the names they have in a whole checkpoint
    README.md            model card, optional
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atom_jax import config, sharding
from atom_jax import params as params_lib
from atom_jax.checkpoint import families, peft
from atom_jax.checkpoint.atomic import staged
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_file
from atom_jax.fields import Fields, read_json
from atom_jax.kvcache import policies
from atom_jax.models import registry
from atom_jax.typing import LM, AtomError

FORMAT = 1
CONFIG, TENSORS, CARD = "adapter.json", "adapter.safetensors", "README.md"
SHIPPED = Path(__file__).resolve().parent.parent / "adapters"
# As far as a family has them.
_SIZES = ("n_layers", "d_model", "n_kv_heads", "n_heads", "head_dim")


def save_adapter(lm: LM, directory: str | os.PathLike, card: str = "", name: str = "") -> None:
    """Writes what the cache policy of a model has learned, without the model, as float32; or, where a model of a
    training run has LoRA beside its weights (`load(merge=False)`), that.

    card: text of README.md; "" leaves one that is there. name: what the base model is called, for readers. All or
    nothing: on any failure `directory` is as before. Raises AtomError where the policy has no parameters of its own,
    or the directory cannot be written.
    """
    if getattr(lm.config, "lora", None) is not None:
        peft.save(lm, directory, name)
        return
    learned, memory = registry.learned(lm.config), registry.of(lm.config).memory(lm.config)
    if not learned:
        raise AtomError(f"the model has no learned evictors of its own ({_named(memory)}), so it has no adapter")
    source = families.ExportSource(lm.config, lm.params, learned)
    table = {"format": FORMAT, "base": base_of(lm.config, name), "memory": config.to_json(memory)}
    with staged(directory) as staging:
        write_file({k: np.asarray(source.read(k), np.float32, order="C") for k in source.infos}, staging / TENSORS)
        (staging / CONFIG).write_text(json.dumps(table, indent=2) + "\n", "utf-8")
        if card:
            (staging / CARD).write_text(card.rstrip("\n") + "\n", "utf-8")


def load_adapter(lm: LM, reference: str | os.PathLike, dtype: Any = None, shardings: Any = None) -> LM:
    """The same model with the cache policy of an adapter, and what that has learned; or with LoRA in its weights.

    reference: as for `find`. dtype: cast the adapter's parameters to it; None keeps float32. shardings: tree of
    jax.sharding.Sharding for the parameters of the result, or None; where it leaves out those of the adapter, every
    device of the embedding's mesh holds all of them. A policy that the model had is replaced. Raises AtomError,
    naming the file and the field or tensor, where the adapter is malformed or belongs to another model.
    """
    directory = find(reference)
    if not (directory / CONFIG).is_file():
        return peft.load(lm, directory, shardings)
    cfg = described(lm.config, reference)
    part = registry.learned(cfg)
    places = None if shardings is None else sharding.filled(part, params_lib.flatten(shardings))
    source = SafetensorsSource(directory / TENSORS)
    learned = params_lib.flatten(families.load(source, cfg, dtype, places, part, asked_by=CONFIG))
    old = registry.learned(lm.config)
    kept = {path: x for path, x in params_lib.flatten(lm.params).items() if path not in old}
    return dataclasses.replace(lm, config=cfg, params=params_lib.unflatten(kept | learned))


def described(cfg: Any, reference: str | os.PathLike) -> Any:
    """The configuration of a model with an adapter on it, as `load_adapter` gives it."""
    where = find(reference) / CONFIG
    if not where.is_file():
        return cfg
    try:
        return _with_adapter(cfg, Fields(read_json(where), str(where)))
    except AtomError as e:
        raise AtomError(e if str(e).startswith(str(where)) else f"{where}: {e}") from None


def is_adapter(reference: str | os.PathLike) -> bool:
    """Whether an adapter is meant: a shipped one by its name, or a directory that holds one and no model."""
    path = Path(reference)
    if str(reference) in shipped() and not path.exists():
        return True
    return not (path / "config.json").is_file() and any((path / n).is_file() for n in (CONFIG, peft.CONFIG))


def about(reference: str | os.PathLike) -> tuple[str, list[tuple[str, str]], SafetensorsSource]:
    """What an adapter is (its kind), what is known of it as names and texts, and its tensors. AtomError as of
    `load_adapter`, but for what only its model shows."""
    directory = find(reference)
    where = directory / CONFIG
    if not where.is_file():
        return "LoRA, as PEFT has it", peft.about(directory), peft.tensors(directory)
    fields = Fields(read_json(where), str(where))
    if fields.data.get("format") != FORMAT:
        raise AtomError(f"{where}: format is {str(fields.data.get('format'))[:60]}; only {FORMAT} is known")
    base = fields.table("base").data
    sizes = ", ".join(f"{name} {str(base[name])[:20]}" for name in ("family", *_SIZES) if name in base)
    named = f"{str(base['name'])[:80]} ({sizes})" if base.get("name") else sizes
    try:
        memory = config.from_json(object, fields.data.get("memory"), "memory")
        policies.check(memory)
    except AtomError as e:
        raise AtomError(f"{where}: {e}") from None
    return "learned memory", [("for", named), ("memory", _named(memory))], SafetensorsSource(directory / TENSORS)


def listed(references: str | os.PathLike | Sequence[Any] | None) -> list[Any]:
    """The adapters that a list, or a text with commas, names, in order; each must be there."""
    if isinstance(references, str):
        text, references = references, [part for part in references.split(",") if part]
        if text and not references:
            raise AtomError(f"adapter: expected the name of one or a directory, got {text!r}; leave it out for none")
    elif references is None or isinstance(references, os.PathLike):
        references = [] if references is None else [references]
    for one in references:
        find(one)
    return list(references)


def find(reference: str | os.PathLike) -> Path:
    """The directory of an adapter: of a shipped one by its name, else a path ("./NAME" for one of the same name).

    Raises AtomError, with the shipped names, where there is neither.
    """
    names = shipped()
    if str(reference) in names:
        return SHIPPED / str(reference)
    path = Path(reference)
    if (path / CONFIG).is_file() or (path / peft.CONFIG).is_file():
        return path
    known = f"shipped are {', '.join(names)}" if names else "none are shipped"
    what = "neither a shipped adapter nor a directory"
    what = f"a directory without {CONFIG} or {peft.CONFIG}" if path.is_dir() else what
    raise AtomError(f"adapter {str(reference)!r} is {what} ({known})")


def shipped() -> list[str]:
    """Names of the adapters that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def base_of(cfg: Any, name: str) -> dict[str, Any]:
    """What an adapter says of the model that it was trained for, whose name is for readers."""
    return {"family": cfg.family, **_sizes(cfg), "name": name}


def check_base(cfg: Any, fields: Fields) -> None:
    """Raises AtomError where these fields of an adapter are of one for a model unlike `cfg`."""
    base = fields.table("base")
    ours = {"family": cfg.family, **_sizes(cfg)}
    there = {k: base.size(k) if isinstance(v, int) else base.data.get(k) for k, v in ours.items()}
    wrong = [f"{k} is {v} in the adapter and {ours[k]} in the model" for k, v in there.items() if v != ours[k]]
    if wrong:
        raise AtomError(", ".join(wrong))


def _with_adapter(cfg: Any, fields: Fields) -> Any:
    """`cfg` with the policy of an adapter.json, which must be made for models like it."""
    if fields.data.get("format") != FORMAT:
        raise AtomError(f"format is {str(fields.data.get('format'))[:60]}; only {FORMAT} is known")
    check_base(cfg, fields)
    memory = config.from_json(object, fields.data.get("memory"), "memory")
    policies.check(memory)
    family = registry.of(cfg)
    new, old = family.with_memory(cfg, memory), family.memory(cfg)
    if not registry.learned(new):
        raise AtomError(f"memory ({_named(memory)}) has no parameters of its own: it needs a whole model")
    if policies.to_hf(old, cfg.family) and not registry.learned(cfg):
        raise AtomError(f"the model's own weights serve its memory ({_named(old)}), an adapter cannot replace that")
    return new


def _sizes(cfg: Any) -> dict[str, Any]:
    return {size: value for size in _SIZES if isinstance(value := getattr(cfg, size, None), int)}


def _named(memory: Any) -> str:
    return "it keeps everything" if memory is None else memory.describe()
