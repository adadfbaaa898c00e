"""Giving a model another tokenizer: what a user names, found and loaded, for `transfer.transplant`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from atom_jax import checkpoint, config, tokenizers
from atom_jax.checkpoint import hypernets
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.transfer import initialisers
from atom_jax.transfer import transplant as lib
from atom_jax.transfer.initialisers import Aux, FromHypernet, Initialiser, vectors
from atom_jax.transfer.transplant import Report
from atom_jax.typing import LM, AtomError


def transplant(
    lm: LM,
    tokenizer: Any,
    method: str | Initialiser = "fvt",
    *,
    donor: Any = None,
    texts: Iterable[bytes] | None = None,
    source_vectors: np.ndarray | None = None,
    target_vectors: np.ndarray | None = None,
    embed: Callable[[Sequence[str]], np.ndarray] | None = None,
    hypernet: Any = None,
    fallback: str | Initialiser = "normal",
    special: Mapping[str, str] | None = None,
    untrained: float = 0.0,
) -> tuple[LM, Report]:
    """The model with another tokenizer, and a report of what became of every row of its table.

    Args:
      lm: a transformer over subwords (SmolLM2, Qwen3, Llama, OLMo).
      tokenizer: a path, a model id, "bytes" or a tokenizer.
      method: how rows are made for tokens that the model's vocabulary lacks, for example "fvt", "focus" or "omp:k=32"
        (`transfer.initialisers`); fallback: for those of which the method knows nothing.
      donor: a model that has this tokenizer, or what `atom_jax.load` takes; for omp, neighbours, landmarks.
      texts: UTF-8; for focus, which learns its vectors from them, unless target_vectors are given.
      source_vectors, target_vectors: f32 [ids, e], zeros for unknown tokens; for wechsel and focus.
      embed: texts -> f32 [texts, e]; for tokenadapt.
      hypernet: a network and its parameters (`checkpoint.hypernets.load`); for hypernet, where it has no path.
      special: names of special tokens of the new tokenizer -> those of the model whose rows they get.
      untrained: share of the model's rows that count as hardly trained, from which no others are made.
    Raises AtomError for models, tokenizers and options that don't go together.
    """
    method = initialisers.parse(method) if isinstance(method, str) else method
    fallback = initialisers.parse(fallback, "fallback") if isinstance(fallback, str) else fallback
    tokenizer = find_tokenizer(tokenizer) if isinstance(tokenizer, str | os.PathLike) else tokenizer
    if target_vectors is None and texts is not None:
        target_vectors = vectors.from_text(tokenizer, texts)
    config.in_range("untrained", untrained, float, 0, 0.5)
    table = None if donor is None else donor_table(donor, tokenizer)
    if isinstance(method, FromHypernet) and method.path:
        hypernet = hypernets.load(method.path)
    aux = Aux(table, source_vectors, target_vectors, embed, hypernet)
    return lib.transplant(lm, tokenizer, method, aux, fallback, special, untrained)


def find_tokenizer(name: str | os.PathLike) -> Any:
    """The tokenizer of this path or model id, or "bytes". Where its files name no token that ends a text, it is found
    by the names that published models give it. Raises AtomError where there is none."""
    known = str(name) == "bytes" or os.path.exists(name)
    found = tokenizers.from_name(name if known else checkpoint.find(name, weights=False))
    if found.eos_ids or not hasattr(found, "with_special"):
        return found
    view = byte_view(found)
    return found.with_special({f"{role}_token": view.special[i] for role, i in view.roles.items() if role != "eot"})


def donor_table(donor: Any, tokenizer: Any) -> np.ndarray:
    """The table f32 [ids, n, e] of a model, or of what `atom_jax.load` takes. Raises AtomError for one without such a
    table, or with another tokenizer than this."""
    donor = donor if isinstance(donor, LM) else checkpoint.load(donor)
    if "embed" not in donor.params:
        raise AtomError(f"donor: a {donor.family} has no table of subwords")
    if donor.tokenizer is not None:
        theirs, ours = byte_view(donor.tokenizer), byte_view(tokenizer)
        if any(theirs.pieces.get(i) != piece for i, piece in ours.pieces.items()):
            raise AtomError(f"donor: its tokenizer ({theirs.name}) is not the one that is wanted ({ours.name})")
    return lib.stacked(donor)
