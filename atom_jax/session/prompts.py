"""What a user gives, as token ids, checked: prompts, and ids that end a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from atom_jax import config
from atom_jax.kvcache.dense import bucket
from atom_jax.models import registry
from atom_jax.typing import LM, TEXTS, AtomError


def check_model(lm: Any) -> None:
    """Raises AtomError for what is no model of texts."""
    if not isinstance(lm, LM):
        raise AtomError(f"lm: expected a model, as atom_jax.load gives it, got {lm!r:.80}")
    reads = registry.kind(lm.config).reads
    if reads != TEXTS:
        raise AtomError(f"the model is of the kind {lm.family}, which reads {reads} and no text")


def token_rows(lm: LM, prompts: Any, first: bool) -> list[np.ndarray]:
    """Prompts, texts or lists of ids (or one text), as i32 arrays. first: whether they begin a text.

    Raises AtomError where there is none, for ids out of range, for an empty prompt, and for what is no model.
    """
    check_model(lm)
    prompts = [prompts] if isinstance(prompts, str | bytes) else listed("prompts", prompts)
    if not prompts:
        raise AtomError("prompts: there is none")
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str | bytes):
            ids = _encode(lm, prompt, first)
        else:
            try:
                ids = np.asarray(prompt)
            except ValueError:  # lists of different lengths
                raise AtomError(f"prompts[{i}]: expected a text or a list of token ids") from None
            if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not ids.size):
                raise AtomError(f"prompts[{i}]: expected a text or a list of token ids")
        if not ids.size:
            raise AtomError(f"prompts[{i}] is empty, and the model has no token that begins a text")
        check_ids(ids, lm.config.vocab_size)
        rows.append(ids.astype(np.int32))
    return rows


def listed(name: str, values: Any) -> list[Any]:
    """The values of the argument `name` as a list; AtomError for what is none."""
    try:
        return list(values)
    except TypeError:
        raise AtomError(f"{name}: expected a list, got {values!r}") from None


def _encode(lm: LM, text: str | bytes, first: bool) -> np.ndarray:
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise AtomError("this model has no tokenizer: give prompts as lists of token ids")
    ids = np.asarray(tokenizer.encode(text))
    return np.concatenate([np.array(getattr(tokenizer, "front", ()), ids.dtype), ids]) if first else ids


def check_ids(ids: np.ndarray, vocab_size: int) -> None:
    """Raises AtomError when an id is outside [0, vocab_size)."""
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise AtomError(f"token id {wrong[0]} is outside the vocabulary of {vocab_size}")


def padded(rows: Sequence[np.ndarray], longest: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids i32 [b, t], padded on the right to the first of few sizes that holds all rows and `longest`, and their
    lengths i32 [b]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), bucket(max(int(lengths.max()), longest))), np.int32)
    for row, out in zip(rows, ids):
        out[: len(row)] = row
    return ids, lengths


def end_ids(lm: LM, ids: Sequence[int] | None) -> np.ndarray:
    """Ids at which a row ends, in all their forms (None: those of the tokenizer and the model): i32 [n], filled up
    with -1 to a multiple of 8, so that their number does not recompile."""
    if ids is None:
        known = {*lm.config.eos_ids, *(lm.tokenizer.eos_ids if lm.tokenizer is not None else ())}
        ids = {i for i in known if 0 <= i < lm.config.vocab_size}
    last = lm.config.vocab_size - 1
    found = sorted(config.whole("a token id of stop_ids", i, 0, last) for i in listed("stop_ids", ids))
    out = np.array(found, np.int64)
    out = registry.of(lm.config).codec(lm.config).forms(out)
    return np.pad(out, (0, 8 - len(out) % 8), constant_values=-1).astype(np.int32)
