"""Making an empty memory on disk, and comparing one that is there with what is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from atom_jax.kvcache.lasting.score import LEARNED, SCORES, Linear
from atom_jax.lasting import inside, learned, states
from atom_jax.lasting.reader import model_of
from atom_jax.lasting.store import FORMAT, KNN, Manifest, Settings, Store
from atom_jax.typing import LM, AtomError


def make(store: Store, lm: LM, settings: Settings, score: Any) -> None:
    """Writes the manifest of an empty memory. score: as for `Memory.open`."""
    inside.check_part(lm.config, settings.part, settings.sinks)
    if KNN in settings.parts:
        states.check(lm, "parts")
    # Looks at every bit of the model, which takes a while: after all that can be refused without.
    manifest, files = Manifest(FORMAT, model_of(lm), settings), {}
    if score is None and (score := learned.shipped(manifest.model.fingerprint)) is not None:
        manifest = dataclasses.replace(manifest, settings=dataclasses.replace(settings, score=LEARNED))
    if manifest.settings.score == LEARNED:
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


def compare(
    store: Store, manifest: Manifest, lm: LM | None, wanted: dict[str, Any], score: Any,
    fitted: Callable[[], Linear | None],
) -> None:  # fmt: skip
    """Raises AtomError for a memory of other settings than are wanted, of another learned score (`fitted`) than that
    in the file `score`, or of another model."""
    directory = store.directory
    for field, value in wanted.items():
        if (there := getattr(manifest.settings, field)) != value:
            there, value = (",".join(x) if isinstance(x, tuple) else x for x in (there, value))
            raise AtomError(f"{directory}: its {field} is {there}, and was asked to be {value}")
    if score not in (None, LEARNED, *SCORES):
        ours, asked = learned.arrays(fitted()), learned.arrays(learned.load(score))
        if any(not np.array_equal(ours[name], asked[name]) for name in ours):
            raise AtomError(f"{directory}: was made with another learned score than {score}")
    if lm is not None and (own := model_of(lm)) != (of := manifest.model):
        raise AtomError(
            f"{directory}: belongs to the {of.family} model {of.fingerprint} in {of.dtype}, not to this one,"
            f" {own.family} {own.fingerprint} in {own.dtype}"
        )
