"""The commands `convert`, `merge`, `mix`, `adapter` and `info` of python -m atom_jax."""

from __future__ import annotations

import collections
import json
import math
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from atom_jax import checkpoint
from atom_jax import params as params_lib
from atom_jax.checkpoint import adapters, heads
from atom_jax.checkpoint.atomic import check_new
from atom_jax.checkpoint.gguf_import import GGUFSource
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.fields import Expression
from atom_jax.models import lora, mixture, mtp, registry
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import AtomError

FORMATS = ("hf", "orbax")
_Row = tuple[str, tuple[int, ...], str, int]  # name, shape, stored type, bytes


def convert(source: str, target: str, to: str | None = None) -> str:
    """Converts a checkpoint and returns a sentence about what was written.

    to: "hf" or "orbax"; None means orbax for a Hugging Face directory and hf for anything else. The target must be
    missing or empty. Raises AtomError for whatever cannot be read or written.
    """
    from atom_jax.checkpoint import store

    if to is not None and to not in FORMATS:
        raise AtomError(f"--to={to}: expected {' or '.join(FORMATS)}")
    check_new(target)
    path = checkpoint.find(source)
    kind = checkpoint.kind_of(path)
    to = to or ("orbax" if kind == "hf" else "hf")
    lm = checkpoint.load(path)
    if to == "orbax":
        if lm.tokenizer is None:
            raise AtomError(f"{source}: has no tokenizer.json, which an Orbax directory needs")
        store.save_model(target, lm)
    else:
        name = f"{path.stem}, dequantized" if kind == "gguf" else None
        checkpoint.save_hf(lm, target, name=name)
    count = params_lib.count(lm.params)
    return f"{target}: {lm.family}, {count:,} parameters, {'Hugging Face' if to == 'hf' else 'Orbax'} directory"


def merge(source: str, target: str, adapter: str | None) -> str:
    """Writes a model as a Hugging Face directory, with adapters on it, LoRA in its weights, and returns a sentence
    about it. Raises AtomError for whatever cannot be read or written; the target must be missing or empty."""
    check_new(target)
    lm = checkpoint.load(source, adapter=adapter)
    checkpoint.save_hf(lm, target)
    return f"{target}: {lm.family}, {params_lib.count(lm.params):,} parameters"


def mix(source: str, decoder: str, target: str, weight: float, temperature: float) -> str:
    """Writes two models as one (`models.mixture`), an Orbax directory, and returns a sentence about it; errors as of
    `merge`, and AtomError for models that don't go together."""
    from atom_jax.checkpoint import store

    check_new(target)
    lm = mixture.of(checkpoint.load(source), checkpoint.load(decoder), weight, temperature)
    if lm.tokenizer is None:
        raise AtomError(f"{source}: has no tokenizer.json, which an Orbax directory needs")
    store.save_model(target, lm)
    return f"{target}: {weight:g} of {decoder} in {source}, {params_lib.count(lm.params):,} parameters"


def adapter(source: str, target: str) -> str:
    """Writes what a run has trained beside its model, LoRA, learned evictors or multi-token heads, and returns a
    sentence about it; errors as of `merge`, and AtomError where the run trained more than that."""
    check_new(target)
    if heads.trained(source):
        cfg, p = heads.of_run(source)
        heads.save(target, cfg, p)
        return f"{target}: {mtp.count(p)} multi-token heads for a {cfg.family}"
    lm = checkpoint.load(source, merge=False)
    with_lora = getattr(lm.config, "lora", None) is not None
    _refuse_loss(source, lm.config, lora.paths(lm.config) if with_lora else registry.learned(lm.config))
    checkpoint.save_adapter(lm, target)
    return f"{target}: {'LoRA' if with_lora else 'learned evictors'} for a {lm.family}"


def _refuse_loss(source: str, cfg: Any, kept: Collection[str]) -> None:
    """Raises AtomError where a run trained parameters of its model that are not `kept`, the paths of an adapter."""
    path = checkpoint.find(source)
    if not kept or checkpoint.kind_of(path) != "orbax":
        return
    if lost := sorted(_trained(path, cfg) - set(kept)):
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise AtomError(
            f"{source}: the run trained {lost[0]}{more} too, which an adapter leaves out; "
            "`python -m atom_jax merge` writes the whole model"
        )


def _trained(path: Path, cfg: Any) -> set[str]:
    """Paths of the parameters of a run's model that learned, by its `optim.groups`; none of a model directory."""
    from atom_jax.checkpoint import store

    if not (exp := store.settings(path)):
        return set()
    try:
        given = [(group["pattern"], float(group["factor"])) for group in exp["optim"]["groups"]]
        groups = [(Expression(pattern, f"{path}: optim.groups"), factor) for pattern, factor in given]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise AtomError(f"{path}: no groups of parameters are named there") from None
    paths = params_lib.flatten(registry.kind(cfg).spec(cfg))
    return {name for name in paths if next((factor for group, factor in groups if group.matches(name)), 1.0)}


def info(source: str, tensors: bool = False, verify: bool = False, as_json: bool = False) -> str:
    """What is in a checkpoint or adapter: format, family, sizes, parameters, stored types and bytes, tokenizer.

    tensors: adds one line per tensor. verify: reads everything, compares it with its checksums, and says how long
    that took; else only headers are read of a Hugging Face directory or GGUF file. as_json: one JSON object with all
    this as texts (a list of them where several have one name), and the tensors as a list.
    Raises AtomError where it is not a whole, supported checkpoint, or not what was written.
    """
    if heads.is_directory(source) or adapters.is_adapter(source):
        path = Path(source) if heads.is_directory(source) else adapters.find(source)
        kind, (name, said, stored) = "adapter", _about(path)
        rows = _stored(stored)
        fields = [("path", source), ("format", f"adapter: {name}"), *said, *_sizes(rows)]
    else:
        path = checkpoint.find(source)
        kind = checkpoint.kind_of(path)
        cfg, tokenizer, rows = {"hf": _hf, "gguf": _gguf, "orbax": _orbax}[kind](path)
        formats = {"hf": "Hugging Face directory", "gguf": "GGUF file", "orbax": "Orbax directory"}
        fields = [("path", source), ("format", formats[kind]), *_summary(cfg, tokenizer, rows)]
    if verify:
        fields.append(("verified", _verified(path, kind)))
    if as_json:
        table = [{"name": n, "shape": list(shape), "dtype": dtype, "bytes": size} for n, shape, dtype, size in rows]
        said: dict[str, Any] = {}
        for key, value in fields:
            said[key] = value if key not in said else [*([said[key]] if type(said[key]) is str else said[key]), value]
        return json.dumps(said | ({"tensors": table} if tensors else {}))
    lines = [f"{key:<12}{value}" for key, value in fields]
    if tensors:
        width = max(len(row[0]) for row in rows)
        lines += ["", *(f"{name:<{width}}  {dtype:<9} {n:>14,}  {list(shape)}" for name, shape, dtype, n in rows)]
    return "\n".join(lines)


def _about(path: Path) -> tuple[str, list[tuple[str, str]], SafetensorsSource]:
    return heads.about(path) if heads.is_directory(path) else adapters.about(path)


def _verified(path: Path, kind: str) -> str:
    """What was compared with checksums, and the seconds that it took."""
    from atom_jax.checkpoint import store

    began, where, size = time.perf_counter(), "", 0
    if kind == "orbax":
        step, size = store.verify(path)
        where = f" of {step.name}" if step.name.isdigit() else ""
    elif kind != "gguf":
        source = _about(path)[2] if kind == "adapter" else SafetensorsSource(path)
        for name in source.infos:
            source.read(name)
        size = sum(source.infos[name].nbytes for name in source.crcs if name in source.infos)
    if not size:
        return "nothing: it holds no checksums"
    return f"{size:,} bytes{where} are what was written, {time.perf_counter() - began:.2f} s"


def _summary(cfg: Any, tokenizer: Any, rows: list[_Row]) -> list[tuple[str, str]]:
    family = registry.kind(cfg)
    if tokenizer is None:
        described = "none"
    else:
        known = "tokenizer.json" if isinstance(tokenizer, JsonTokenizer) else tokenizer.name
        described = f"{known}, {tokenizer.vocab_size:,} ids"
    return [
        ("family", family.name),
        *family.describe(cfg),
        ("parameters", f"{params_lib.count(family.spec(cfg)):,}"),
        *_sizes(rows)[1:],
        ("tokenizer", described),
    ]


def _sizes(rows: list[_Row]) -> list[tuple[str, str]]:
    types = collections.Counter(row[2] for row in rows)
    return [
        ("parameters", f"{sum(math.prod(row[1]) for row in rows):,}"),
        ("stored as", ", ".join(f"{dtype} ({n} tensors)" for dtype, n in types.most_common())),
        ("bytes", f"{sum(row[3] for row in rows):,}"),
    ]


def _stored(source: SafetensorsSource) -> list[_Row]:
    return [(name, i.shape, i.dtype.name, i.nbytes) for name, i in source.infos.items()]


def _hf(path: Path) -> tuple[Any, Any, list[_Row]]:
    cfg, tokenizer = checkpoint.load_config(path)
    return cfg, tokenizer, _stored(SafetensorsSource(path))


def _gguf(path: Path) -> tuple[Any, Any, list[_Row]]:
    source = GGUFSource(path)
    return *source.described(), source.stored()


def _orbax(path: Path) -> tuple[Any, Any, list[_Row]]:
    from atom_jax.checkpoint import store

    cfg, params, tokenizer = store.load_params(path)
    leaves = params_lib.flatten(params)
    return cfg, tokenizer, [(name, x.shape, np.dtype(x.dtype).name, x.nbytes) for name, x in leaves.items()]
