"""Making an empty memory on disk."""

from __future__ import annotations

import dataclasses
from typing import Any

from atom_jax.kvcache.lasting.score import LEARNED
from atom_jax.lasting import learned
from atom_jax.lasting.reader import model_of
from atom_jax.lasting.store import FORMAT, Manifest, Settings, Store
from atom_jax.typing import LM, AtomError


def make(store: Store, lm: LM, settings: Settings, score: Any) -> None:
    """Writes the manifest of an empty memory."""
    manifest, files = Manifest(FORMAT, model_of(lm), settings), {}
    if settings.sinks + 2 * settings.part > lm.config.max_length:
        need = f"{settings.sinks} sinks and two parts of {settings.part} tokens"
        raise AtomError(f"part: {need} exceed the {lm.config.max_length} positions of the model")
    if settings.score == LEARNED:
        if score == LEARNED:
            raise AtomError("score: name the file of the learned one")
        fit = learned.load(score)
        if fit.model != manifest.model.fingerprint:
            own = manifest.model.fingerprint
            raise AtomError(f"{score}: was fitted for the model {fit.model}, and this one is {own}")
        manifest = dataclasses.replace(manifest, score="score-00000000.safetensors", next=1)
        files = {manifest.score: learned.arrays(fit)}
    try:
        store.directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise AtomError(f"{store.directory}: cannot be made ({e.strerror})") from None
    with store.lock():
        if not store.exists:
            store.commit(manifest, files)
