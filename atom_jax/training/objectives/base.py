"""What a run pursues: the one protocol between the machinery of training and its objectives.

An objective is a frozen, registered configuration (`Objective`), whose hooks say what is minimised and what happens
before the first step and after the last one. Adding one is one file and one line in
`training/objectives/__init__.py`, or, from outside the package, one call of `register`; an experiment has it in its
field `objective`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from atom_jax import checkpoint, config, sharding
from atom_jax.data.config import DataConfig
from atom_jax.data.packing import described
from atom_jax.data.pipeline import make_iterator
from atom_jax.models import registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.params import Tree, flatten
from atom_jax.training.losses import Sums, byte_lengths
from atom_jax.training.plots import Pages
from atom_jax.typing import LM, TEXTS, AtomError, Batch

Rows = dict[str, np.ndarray]
T = TypeVar("T", bound=type)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an objective works on: the experiment (`training.config.Experiment`), whose model is known, the mesh, and
    the tokenizer."""

    exp: Any
    mesh: Mesh
    tokenizer: Any

    def load(self, source: str, cfg: Any) -> LM:
        """The model `source`, whose configuration this is, in float32, laid out over the mesh."""
        places = sharding.shardings(registry.of(cfg).spec(cfg), self.mesh)
        return checkpoint.load(source, dtype="float32", shardings=places)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """i32 [v]: UTF-8 bytes of every id of the model."""
        return byte_lengths(self.tokenizer, self.exp.model.vocab_size)


@dataclasses.dataclass(frozen=True)
class Objective:
    """Base of all objectives. Its hooks are those of training on the text as it is, but for `loss`.

    name: in messages and in `OBJECTIVES`. reads: what its models read (`models.family.Kind`). trains: whether it has
    a loss; what has none goes beside another one that does. spelled: whether it reads rows of two kinds of tokens
    (`DataConfig.tokens`). weighs: whether it knows `Batch.loss_weights`. z_loss: whether it knows
    `OptimConfig.z_loss`. pages: curves of what it reports.
    """

    name: ClassVar[str] = ""
    trains: ClassVar[bool] = True
    reads: ClassVar[str] = TEXTS
    spelled: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    z_loss: ClassVar[bool] = False
    pages: ClassVar[Pages] = {}

    def check(self, exp: Any) -> None:
        """Raises AtomError for what does not go with this objective, before anything is compiled or read."""

    def tokenizer(self, exp: Any) -> Any:
        """The tokenizer that it needs, or None for that of the experiment."""
        return None

    def extra_spec(self, cfg: Any) -> Tree:
        """ParamSpecs of parameters besides those of the model `cfg`, under other names. They are trained (or frozen)
        along and kept apart in checkpoints."""
        return {}

    def begin(self, setting: Setting, params: Any, places: Tree, data: Iterator[Rows]) -> tuple[Any, list[str]]:
        """The parameters before the first step, and what is to be said of them. Those that are absent are drawn.

        params: of `init_from`, or None. places: shardings of all parameters. data: this run's rows.
        """
        return params, []

    def rows(self, setting: Setting, cfg: DataConfig, index: int, count: int) -> Any:
        """What makes the rows that process `index` of `count` reads of some data (`data.pipeline.make_iterator`)."""
        return make_iterator(cfg, setting.tokenizer, index, count)

    def described(self, setting: Setting) -> Rows:
        """Zeros in the shapes of a whole batch of `rows`, which take no memory."""
        return described(setting.exp.data)

    def batch(self, rows: Rows) -> Any:
        """The batch of this process's rows of the data; it has a `loss_mask`."""
        names = (f.name for f in dataclasses.fields(Batch))
        return Batch(**{name: rows[name] for name in names if name in rows})

    def unit(self, exp: Any) -> tuple[str, int]:
        """What a run's speed is told in, and how many targets (`Sums.tokens`) make one of it."""
        return "tokens" if self.reads == TEXTS else self.reads, 1

    def counts(self, batch: Any, setting: Setting) -> Any:
        """Whatever the means in the loss are divided by, as far as a batch alone says it."""
        return None

    def loss(
        self, params: Any, batch: Any, key: jax.Array | None, step: Any, *, setting: Setting, counts: Any = None
    ) -> Sums:
        """What is minimised: `Sums.objective` over the number of targets of the whole batch.

        batch: a part of it, and all of it where nothing is accumulated; `objective` of all parts adds up to that of
        the whole, as far as `counts`, those of the whole batch, allow. key: for what is drawn. step: i32 [], from 0.
        Both None in a validation, where nothing is drawn.
        """
        raise NotImplementedError

    def judge(self, params: Any, batch: Any, *, setting: Setting) -> Sums:
        """What a validation reports: `loss`, with nothing drawn."""
        return self.loss(params, batch, None, None, setting=setting)

    def reference(self, setting: Setting, batches: Callable[[], Iterator[Any]]) -> dict[str, float]:
        """Figures to stand beside every validation, made once; those that are called NAME_bits_per_byte are drawn.
        batches: those of a validation, on the devices."""
        return {}

    def finish(self, setting: Setting, params: Any, data: Iterator[Rows]) -> Any:
        """The parameters after the last step, from those that validation and `load` use."""
        return params

    def operations(self, setting: Setting, factors: Mapping[str, float]) -> tuple[float, float]:
        """Operations of a step that training needs, and those done a second time to save memory, both counted as
        `Kind.flops` does. factors: of the learning rate, by the path of a parameter; 0 = frozen."""
        exp = setting.exp
        tokens, again = exp.data.batch_size * exp.data.seq_len, forward_flops(exp) if exp.model.remat else 0.0
        return training_flops(exp, factors) * tokens, again * tokens


OBJECTIVES: dict[str, type[Objective]] = {}


def register(cls: T) -> T:
    """Makes a subclass of `Objective`, a frozen dataclass, known by its name and to configurations that are read."""
    OBJECTIVES[cls.name] = cls
    return config.register(cls)


def check_frozen(exp: Any, name: str, paths: Iterable[str]) -> None:
    """Raises AtomError, in the name of an objective, where optim.groups let one of these parameters learn."""
    for path in paths:
        if next((g.factor for g in exp.optim.groups if re.fullmatch(g.pattern, path)), 1.0):
            raise AtomError(f"{name}: {path} must not learn, and optim.groups does not freeze it")


def forward_flops(exp: Any) -> float:
    """Operations of a forward pass, per token."""
    return registry.kind(exp.model).flops(exp.model, exp.data.seq_len)


def training_flops(exp: Any, factors: Mapping[str, float]) -> float:
    """Operations of a forward and a backward pass, per token."""
    needed, cfg = 3 * forward_flops(exp), exp.model
    if isinstance(cfg, TransformerConfig):
        # Matrices that do not learn need no gradients of their own.
        flat = flatten(registry.of(cfg).spec(cfg))
        frozen = [s for k, s in flat.items() if not factors[k] and "vocab" not in s.axes]
        needed -= 2 * sum(math.prod(s.shape) for s in frozen if len(s.axes) > 2)
        table = "embed" if cfg.tie_embeddings else "unembed"
        if not factors[table]:
            needed -= 2 * math.prod(flat[table].shape)
    return needed
