"""How a family is published: its config.json, and the names of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atom_jax import tokenizers
from atom_jax.naming import Rule
from atom_jax.tokenizers import json_tokenizer
from atom_jax.typing import AtomError


def own_tokenizer(cfg: Any, data: dict[str, Any], path: Path, find: Callable[[str], Path]) -> Any:
    """That of a directory with the config.json `data`: bytes where "atom_tokenizer" says so, or a tokenizer.json, or
    None. find: not used."""
    if (name := data.get("atom_tokenizer")) is None:
        return json_tokenizer.in_directory(path)
    return named_tokenizer(name, ("bytes",), path)


def named_tokenizer(name: Any, known: Sequence[str], path: Path) -> Any:
    """The tokenizer that the field "atom_tokenizer" of the config.json in a directory names; AtomError for unknown
    ones."""
    if name not in known:
        names = " and ".join(map(repr, known))
        raise AtomError(f"{path / 'config.json'}: atom_tokenizer is {str(name)[:60]!r}; known: {names}")
    return tokenizers.from_name(name)


def token_ids(cfg: Any) -> dict[str, Any]:
    """bos, eos and pad as config.json and generation_config.json spell them."""
    eos = cfg.eos_ids[0] if len(cfg.eos_ids) == 1 else list(cfg.eos_ids) or None
    return {"bos_token_id": cfg.bos_id, "eos_token_id": eos, "pad_token_id": cfg.pad_id}


@dataclasses.dataclass(frozen=True)
class Published:
    """How models of a family are published.

    recognises(data): whether the fields of a config.json are one's.
    from_hf(data, where) -> configuration; `where` names the file in messages. Raises AtomError, naming the field, for
        missing or senseless values, and for options that would change the mathematics and are not supported.
    to_hf(cfg, dtype) -> fields of config.json, for weights of `dtype`; AtomError where there is no such option.
    rules(cfg): published names of all tensors.
    token_ids(cfg): the fields of generation_config.json.
    tokenizer(cfg, data, path, find): of a directory with these fields, or None; `find` turns a published name into a
        local directory.
    """

    recognises: Callable[[dict[str, Any]], bool]
    from_hf: Callable[[dict[str, Any], str], Any]
    to_hf: Callable[[Any, str], dict[str, Any]]
    rules: Callable[[Any], Sequence[Rule]]
    token_ids: Callable[[Any], dict[str, Any]] = token_ids
    tokenizer: Callable[[Any, dict[str, Any], Path, Callable[[str], Path]], Any] = own_tokenizer
