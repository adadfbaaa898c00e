"""The machine of models that choose their own units: what a model supplies is `stage.Stage`, the rest is here.

    encoder -> rule -> plan -> pool -> what is inside -> upsample, combine -> decoder

Positions are vectors and where they stand; what they mean (bytes, frames) is the model's. What is inside may be a
stage again. Training, prompts, later turns and single positions are one code path (`stage.run`); in generation rows
wait for each other (`waiting.step`).
"""

from atom_jax.units.memory import Latest, Parts
from atom_jax.units.report import late_loss, report
from atom_jax.units.stage import Notes, Place, Stage, find, run, spread
from atom_jax.units.waiting import stale, step, waits, without_inside

__all__ = [
    "Latest", "Notes", "Parts", "Place", "Stage", "find", "late_loss", "report", "run", "spread", "stale", "step",
    "waits", "without_inside",
]  # fmt: skip
