"""Steps that went wrong."""

from __future__ import annotations

import collections
import math
import statistics
from typing import Any

from atom_jax.typing import AtomError

# Steps that say what an ordinary loss is.
WINDOW = 50


class Watch:
    """Looks at every step's metrics. suspect: the last one looked at went wrong."""

    def __init__(self, max_bad_steps: int):
        self._limit = max_bad_steps
        self.suspect = False
        self._recent: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def look(self, step: int, metrics: dict[str, Any]) -> str:
        """A sentence about what is wrong with this step, or "".

        Raises AtomError after too many steps in a row without a finite gradient.
        """
        loss, bad = float(metrics["loss"]), int(metrics["bad"])
        warning = self._warning(step, metrics, loss, bad)
        self.suspect = bool(warning)
        return warning

    def _warning(self, step: int, metrics: dict[str, Any], loss: float, bad: int) -> str:
        if bad >= self._limit:
            raise AtomError(
                f"loss or gradient was not finite in {bad} steps in a row, from step {step - bad + 1} on: training "
                "stops; a smaller optim.learning_rate or optim.clip_norm may help, and the checkpoints are kept"
            )
        if bad:
            return f"step {step}: loss {loss:.4g}, gradient norm {float(metrics['grad_norm']):.4g}: update skipped"
        recent = self._recent
        usual = statistics.median(recent) if len(recent) == WINDOW else math.inf
        # The spread of ordinary steps, but never so small that noise counts as a spike.
        spread = max(3 * (max(recent) - min(recent)), 0.5) if recent else math.inf
        recent.append(loss)
        return f"step {step}: loss {loss:.3f} is far above the usual {usual:.3f}" if loss > usual + spread else ""
