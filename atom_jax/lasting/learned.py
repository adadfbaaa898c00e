"""Learned scores as files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_file
from atom_jax.files import replaced
from atom_jax.kvcache.lasting.score import SCORES, Linear
from atom_jax.typing import AtomError

# Scores that ship with the package.
SHIPPED = Path(__file__).with_name("scores")
_PARTS = ("mean", "std", "weight")


def arrays(score: Linear) -> dict[str, np.ndarray]:
    """What a file holds of it."""
    model = np.frombuffer(score.model.encode(), np.uint8)
    return {**{name: getattr(score, name) for name in _PARTS}, "model": model}


def of(found: dict[str, np.ndarray], where: str) -> Linear:
    """The score of `arrays`. AtomError, which begins with `where`, for what is none."""
    if found.keys() != {*_PARTS, "model"} or any(found[name].dtype != np.float32 for name in _PARTS):
        raise AtomError(f"{where}: is no learned score, which holds {', '.join((*_PARTS, 'model'))}")
    model = found["model"].tobytes().decode("ascii", "replace")
    try:
        return Linear(*(found[name] for name in _PARTS), model)
    except AtomError as e:
        raise AtomError(f"{where}: {e}") from None


def shipped(model: str) -> Path | None:
    """The file of the score that ships for the model with this fingerprint; None where there is none."""
    return next((file for file in sorted(SHIPPED.glob("*.safetensors")) if load(file).model == model), None)


def save(score: Linear, path: str | os.PathLike) -> None:
    """Writes a .safetensors file, whole or not at all."""
    try:
        with replaced(path, parents=True) as part:
            write_file(arrays(score), part)
    except OSError as e:
        raise AtomError(f"{path}: could not be written ({e.strerror or e})") from None


def load(path: str | os.PathLike) -> Linear:
    """The score in a file. AtomError where it can't be read."""
    if not Path(path).is_file():
        raise AtomError(f"score {str(path)!r}: is no file, and none of {', '.join(SCORES)}")
    source = SafetensorsSource(path)
    return of({name: source.read(name) for name in source.infos}, str(path))
