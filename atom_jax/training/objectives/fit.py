"""Decisions found in closed form before the first step, beside whatever is trained (`transfer.dms_fit` of evictors,
`transfer.dmc_fit` of merging)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

from tqdm import tqdm

from atom_jax.kvcache.dmc import DMC
from atom_jax.params import Tree
from atom_jax.training.objectives.base import Objective, Rows, Setting, register
from atom_jax.transfer import dmc_fit, dms_fit
from atom_jax.transfer.ridge import FitConfig, thresholds
from atom_jax.typing import AtomError, Batch


@register
@dataclasses.dataclass(frozen=True)
class Fit(FitConfig, Objective):
    __doc__ = FitConfig.__doc__

    name: ClassVar[str] = "fit"
    trains: ClassVar[bool] = False

    def begin(self, setting: Setting, params: Any, places: Tree, data: Iterator[Rows]) -> tuple[Any, list[str]]:
        """Fits the decisions. Raises AtomError for parameters that are not there yet."""
        if params is None:
            raise AtomError("fit: set init_from; evictors are fitted to a model that has learned something")
        with tqdm(total=self.windows + self._moves(setting), desc="fit", unit="row", mininterval=1) as bar:
            rows = _rows(data, bar, setting.exp.data.whole)
            return _of(setting).fit(params, setting.exp.model, rows, self, bar.set_postfix_str), []

    def finish(self, setting: Setting, params: Any, data: Iterator[Rows]) -> Any:
        """Moves the threshold to where `entries` keys stay."""
        with tqdm(total=self._moves(setting), desc="threshold", unit="row", mininterval=1) as bar:
            rows = _rows(data, bar, setting.exp.data.whole)
            return _of(setting).calibrate(params, setting.exp.model, rows, self, bar.set_postfix_str)

    def _moves(self, setting: Setting) -> int:
        """Rows that thresholds take."""
        return 3 * self.calibration * thresholds(setting.exp.model.memory, setting.exp.data.seq_len)


def _of(setting: Setting) -> Any:
    """The fit of the model's policy."""
    return dmc_fit if isinstance(setting.exp.model.memory, DMC) else dms_fit


def _rows(data: Iterator[Rows], bar: Any, packed: bool) -> Iterator[Batch]:
    """The rows of `data`, [1, t] each: those that hold a single document, or, `packed`, all."""
    for batches in range(10**9):
        if batches > 1000 and not bar.n:
            raise AtomError("fit: no row of the data holds a single document; data.seq_len is too long for them")
        batch = next(data)
        for row in zip(*(batch[name][:, None] for name in ("ids", "positions", "segments"))):
            if packed or (row[2] == 1).all():
                bar.update()
                yield Batch(*row)
