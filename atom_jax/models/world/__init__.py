"""Models of worlds: streams of frames and actions, with learned units over time.

An encoder makes a state of every frame and action, from which a local outlet foretells the next frame. Where that
fails (`chunking.rules.surprise`), or wherever another rule says so, a unit starts; the main network runs over units
alone, and what it remembers reaches every frame through the decoder's head:

    port -> encoder (-> local outlet) -> rule -> pool -> main network -> decoder -> head: frame, reward, end
"""

from atom_jax.models.world.config import WorldConfig, spec
from atom_jax.models.world.family import FAMILY
from atom_jax.models.world.forward import Foresight, apply, expected, hidden, local, logits, outputs

__all__ = [
    "FAMILY", "Foresight", "WorldConfig", "apply", "expected", "hidden", "local", "logits", "outputs", "spec"
]  # fmt: skip
