"""Loading and saving models: Hugging Face directories, Orbax directories and GGUF files."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from atom_jax.checkpoint import adapters, families, peft
from atom_jax.checkpoint.adapters import save_adapter
from atom_jax.checkpoint.atomic import staged
from atom_jax.checkpoint.gguf_import import GGUFSource
from atom_jax.checkpoint.safetensors_io import (
    SHARD_BYTES,
    SafetensorsSource,
    is_weight_file,
    refuse_pickle,
    write_tensors,
)
from atom_jax.fields import read_json
from atom_jax.kvcache import policies
from atom_jax.models import lora, registry
from atom_jax.tokenizers.json_tokenizer import TOKENIZER_FILES
from atom_jax.typing import LM, AtomError

__all__ = ["find", "kind_of", "load", "load_config", "save_adapter", "save_hf", "shipped"]

SHIPPED = Path(__file__).resolve().parent.parent / "pretrained"
CONFIG, GENERATION = "config.json", "generation_config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]


def load(
    path: str | os.PathLike,
    adapter: str | os.PathLike | Sequence[Any] | None = None,
    dtype: Any = None,
    shardings: Any = None,
    merge: bool = True,
    memory: Any = None,
) -> LM:
    """A model from a Hugging Face directory, an Orbax directory (converted, or a training WORKDIR), a .gguf file, by
    its name one that comes with the package (`checkpoint.shipped`), or, with huggingface_hub installed, by a hub id
    such as "HuggingFaceTB/SmolLM2-135M".

    adapter: learned evictors or LoRA to put on it, the name of shipped ones or a directory (`checkpoint.adapters`);
    or several, in a list or with commas between them.
    dtype: "float32" or "bfloat16" converts the parameters and computes in it; None keeps what is stored and computes
    in what config.json names. shardings: tree of jax.sharding.Sharding for the parameters (those of the adapter
    may be left out, each device then holds all of it), or None for one device. merge: LoRA of a training run becomes
    part of the weights; without, it stays beside them, as `save_adapter` takes it. memory: another cache policy, as a
    text such as "tova:budget=512" ("none": keep everything) or as an object; None leaves what the checkpoint has.
    The tokenizer is None where the checkpoint has none. Raises AtomError, naming the file and the tensor or field,
    for whatever is missing, malformed or not supported.
    """
    wanted = adapters.listed(adapter)
    if dtype is not None:
        dtype = _dtype(dtype)
    policy = policies.parse(memory) if isinstance(memory, str) else memory
    path = find(path)
    kind = kind_of(path)
    if kind == "orbax":
        from atom_jax.checkpoint import store  # imports Orbax, which takes a second

        lm = LM(*store.load_params(path, dtype, shardings))
        lm = peft.merged(lm) if merge else lm
    elif kind == "gguf":
        source = GGUFSource(path)
        cfg, tokenizer = source.described()
        lm = LM(cfg, families.load(source, cfg, dtype, shardings), tokenizer)
    else:
        cfg, tokenizer = _described(path)
        lm = LM(cfg, families.load(SafetensorsSource(path), cfg, dtype, shardings), tokenizer)
    if lm.tokenizer is not None and lm.tokenizer.vocab_size > lm.config.vocab_size:
        sizes = f"{lm.tokenizer.vocab_size} ids, the embedding {lm.config.vocab_size} rows"
        logging.warning("%s: the tokenizer has %s; texts with ids beyond them cannot be used", path, sizes)
    for one in wanted:
        lm = adapters.load_adapter(lm, one, dtype, shardings)
    lm = lm if memory is None else registry.with_memory(lm, policy)
    return lm if dtype is None else dataclasses.replace(lm, config=dataclasses.replace(lm.config, dtype=dtype))


def load_config(path: str | os.PathLike, adapter: Any = None) -> tuple[Any, Any]:
    """(configuration, tokenizer or None) of whatever `load` takes, without its weights; adapter: as there."""
    path = find(path)
    kind = kind_of(path)
    if kind == "orbax":
        from atom_jax.checkpoint import store  # imports Orbax, which takes a second

        cfg, tokenizer = store.load_config(path)
    else:
        cfg, tokenizer = GGUFSource(path).described() if kind == "gguf" else _described(path)
    for one in adapters.listed(adapter):
        cfg = adapters.described(cfg, one)
    return lora.without(cfg), tokenizer


def _described(path: Path) -> tuple[Any, Any]:
    """(configuration, tokenizer or None) of a Hugging Face directory."""
    data = read_json(path / CONFIG)
    if (path / GENERATION).is_file():
        # As transformers does: generation_config.json has the last word on which tokens end a text.
        eos = read_json(path / GENERATION).get("eos_token_id")
        data = data if eos is None else {**data, "eos_token_id": eos}
    published = registry.recognise(data, str(path / CONFIG))
    cfg = published.from_hf(data, str(path / CONFIG))
    return cfg, published.tokenizer(cfg, data, path, find)


def save_hf(lm: LM, directory: str | os.PathLike, name: str | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json, generation_config.json, model.safetensors (shards beyond `shard_bytes`) and the tokenizer's
    files, under the family's published names and in the parameters' dtypes. Learned evictors are part of a model, and
    LoRA becomes part of its weights; any other cache policy in its configuration is left out.

    name: what the model is called, kept in config.json. All or nothing: on any failure `directory` is as before.
    Files of an earlier model there are replaced, others stay. Raises AtomError when it cannot be written, or where
    the published family has no such option.
    """
    lm = peft.merged(lm)
    published = registry.of(lm.config).published
    if published is None:
        raise AtomError(f"models of family {lm.family} have no Hugging Face format here")
    config = published.to_hf(lm.config, _most(lm.params))
    source = families.ExportSource(lm.config, lm.params)
    if lm.tokenizer is not None and lm.tokenizer.name == "bytes":
        config["atom_tokenizer"] = lm.tokenizer.name
    if name is not None:
        config["_name_or_path"] = name
    if (Path(directory) / CONFIG).is_file():
        logging.warning("%s: the model that was there is replaced", directory)
    with staged(directory, stale=_is_model_file) as staging:
        write_tensors(staging, source, shard_bytes)
        if lm.tokenizer is None:
            logging.warning("%s: saved without a tokenizer, since the model was loaded without one", directory)
        else:
            lm.tokenizer.save(staging)
        for file, table in ((CONFIG, config), (GENERATION, published.token_ids(lm.config))):
            (staging / file).write_text(json.dumps(table, indent=2) + "\n", "utf-8")


def kind_of(path: Path) -> str:
    """ "gguf", "orbax" or "hf": what kind of checkpoint an existing path is. AtomError when it is none."""
    if path.is_file() and path.suffix == ".gguf":
        return "gguf"
    if path.is_dir() and not (path / CONFIG).is_file():
        from atom_jax.checkpoint import store

        if store.is_checkpoint(path):
            return "orbax"
    refuse_pickle(path)
    if path.is_dir() and (path / CONFIG).is_file():
        return "hf"
    raise AtomError(f"{path}: not a Hugging Face directory ({CONFIG}, safetensors), an Orbax directory or a .gguf")


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG}"))


def find(path: str | os.PathLike, weights: bool = True) -> Path:
    """The local path of a checkpoint: of what lies there, of a shipped one by its name, or downloaded first where
    `path` is a hub id, without its weights where they are not needed. AtomError when there is none."""
    if not isinstance(path, str | os.PathLike):
        raise AtomError(f"path: expected that of a checkpoint, as a text, got {path!r:.80}")
    local = Path(path)
    if os.path.exists(path):
        return local
    if str(path) in (names := shipped()):
        return SHIPPED / str(path)
    # A name below a directory that exists is a mistyped path, and nothing to ask the network about.
    if not _HUB_ID.fullmatch(str(path)) or local.parent.is_dir():
        near = difflib.get_close_matches(str(path), names, 1, 0.8)
        raise AtomError(f"{path}: no such file or directory" + (f" (did you mean {near[0]}?)" if near else ""))
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        hint = "for a model id of the Hugging Face hub install huggingface_hub (pip install 'atom-jax[hub]')"
        raise AtomError(f"{path}: no such file or directory; {hint}") from None
    try:
        wanted = _HUB_FILES if weights else [name for name in _HUB_FILES if not name.endswith(".safetensors")]
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as e:  # its errors have no common base: HTTP, file system, validation, offline mode
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise AtomError(f"{path}: not a local path, and the Hugging Face hub did not deliver it ({reason})") from None


def _dtype(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except (TypeError, UnicodeError):
        name = str(dtype)
    if name not in ("float32", "bfloat16"):
        raise AtomError(f"dtype {name} is not supported for loading (float32 and bfloat16 are)")
    return name


def _most(params: Any) -> str:
    """The dtype of most parameters."""
    sizes: collections.Counter[str] = collections.Counter()
    for x in jax.tree.leaves(params):
        sizes[x.dtype.name] += x.size
    return max(sizes, key=sizes.get, default="float32")


def _is_model_file(name: str) -> bool:
    return is_weight_file(name) or name in TOKENIZER_FILES
