"""The objectives of training, by name in `OBJECTIVES`."""

from __future__ import annotations

from atom_jax.training.objectives.alm import Alm
from atom_jax.training.objectives.base import OBJECTIVES, Objective, Setting, register
from atom_jax.training.objectives.byteify import Byteify
from atom_jax.training.objectives.classify import Classify
from atom_jax.training.objectives.distill import Distill
from atom_jax.training.objectives.fit import Fit
from atom_jax.training.objectives.foresee import Foresee
from atom_jax.training.objectives.hypernet import TrainHypernet
from atom_jax.training.objectives.images import Images
from atom_jax.training.objectives.mtp import MultiToken
from atom_jax.training.objectives.next_token import NextToken

__all__ = [
    "OBJECTIVES", "Alm", "Byteify", "Classify", "Distill", "Fit", "Foresee", "Images", "MultiToken", "NextToken",
    "Objective", "Setting", "TrainHypernet", "register",
]  # fmt: skip
