"""What a training run is: model, data, optimiser, schedule, mesh."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from typing import Any

from atom_jax import config
from atom_jax.data.config import DataConfig
from atom_jax.models.lora import LoRA
from atom_jax.sharding import MeshConfig
from atom_jax.tokenizers import is_trained
from atom_jax.training.objectives import OBJECTIVES, Byteify, Distill, Fit, NextToken, Objective
from atom_jax.typing import AtomError


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters whose whole path ("layers/attn/q") matches the regular expression learn at `factor` times the
    learning rate; 0 freezes them: no gradient, no moments, no weight decay."""

    pattern: str
    factor: float = 0.0

    def __post_init__(self):
        config.check(self, factor=(0, 1e6))


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser and how its learning rate moves."""

    # "adamw", or "muon" for matrices with AdamW for embeddings and norms.
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    # After the warm-up: "cosine" down to final_fraction, "wsd" (constant, then a linear fall) or "constant".
    schedule: str = "cosine"
    warmup_steps: int = 100
    # Share of all steps that the fall of "wsd" takes.
    decay_fraction: float = 0.2
    # Learning rate at the last step over learning_rate.
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    # Decoupled, times the learning rate; acts on matrices only, not on embeddings, norms or biases,
    weight_decay: float = 0.1
    # or, with adamw, on the parameters whose path matches this regular expression.
    decay_pattern: str = ""
    # Gradients with a larger global norm are scaled down to it; 0 = never.
    clip_norm: float = 1.0
    # Decay of the moving average of the parameters that validation and `load` use; 0 = none is kept.
    ema: float = 0.0
    # Weight of the squared log-partition function in the loss.
    z_loss: float = 0.0
    # Parts into which a batch is cut, one after the other, to save memory. The result is the same but for what is
    # drawn, for the models' own losses (those of rules that find units, which are means over the rows that they see
    # together, and count by a part's targets), and for byteify.official_means.
    accumulate: int = 1
    # The first group that matches a parameter counts.
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        config.check(
            self, learning_rate=(0, 1e6), warmup_steps=(0, 2**31 - 1), decay_fraction=(0, 1), final_fraction=(0, 1e6),
            b1=(0, 1), b2=(0, 1), eps=(0, 1), weight_decay=(0, 1e6), clip_norm=(0, 1e30), z_loss=(0, 1e6),
        )  # fmt: skip
        if self.optimizer not in ("adamw", "muon"):
            raise AtomError(f"optim.optimizer: expected adamw or muon, got {self.optimizer!r}")
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise AtomError(f"optim.schedule: expected cosine, wsd or constant, got {self.schedule!r}")
        if self.decay_pattern and self.optimizer != "adamw":
            raise AtomError(f"optim.decay_pattern goes with adamw, the optimizer is {self.optimizer}")
        if self.accumulate < 1:
            raise AtomError(f"optim.accumulate: expected at least 1, got {self.accumulate}")
        if not 0 <= self.ema < 1:
            raise AtomError(f"optim.ema: expected a decay in [0, 1), got {self.ema}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to write down on the way."""

    steps: int = 1000
    # Steps between lines of metrics.jsonl.
    log_every: int = 10
    # Steps between validations; 0 = never.
    eval_every: int = 200
    # Validate before the first step too.
    eval_first: bool = False
    # Batches per validation, each as large as one of the optim.accumulate parts of a training batch.
    eval_batches: int = 16
    # A checkpoint is due after so many steps or minutes, whichever comes first; 0 = only at the end.
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 10.0
    # Checkpoints kept, the newest ones.
    keep: int = 2
    # Training stops after so many steps in a row whose gradient is not finite.
    max_bad_steps: int = 10
    # Text that the model continues after every validation; "" = none.
    sample_prompt: str = ""
    sample_tokens: int = 200

    def __post_init__(self):
        every = (0, 2**31 - 1)
        config.check(self, eval_every=every, checkpoint_every=every, checkpoint_minutes=(0, 1e9), sample_tokens=every)
        for name in ("steps", "log_every", "eval_batches", "keep", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise AtomError(f"train.{name}: expected at least 1, got {getattr(self, name)}")


@config.register
@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that determines a run."""

    # The model's configuration, or None for the model of init_from.
    model: Any = None
    # Cache policy for the model of init_from; None leaves the one that it has.
    memory: Any = None
    # Corrections beside the weights of the model of init_from, to be trained alone (optim.groups freezes the rest).
    lora: LoRA | None = None
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    # "bytes"; "bpe:SIZE", "unigram:SIZE" or "words:SIZE", trained on the train split of tokenizer_sources (at most
    # 64, 4 and 1 MiB of it); a tokenizer.json or its directory; "" = the tokenizer of init_from.
    tokenizer: str = "bytes"
    # As data.sources; (): these.
    tokenizer_sources: tuple[str, ...] = ()
    # Any checkpoint that `atom_jax.load` reads, to start from instead of random values.
    init_from: str = ""
    # Adapters to put on it first, as in `load`: learned evictors, or LoRA, which becomes part of its weights.
    adapter: str = ""
    # What the run pursues: at most one objective with a loss, and others beside it; without one, the next token of
    # the text. Fits the model's evictors in closed form before the first step; None: they start as they are.
    fit: Fit | None = None
    # Trains the model with eviction towards itself without, instead of on the text.
    distill: Distill | None = None
    # Makes a Bolmo of a subword model; data.tokens must be set.
    byteify: Byteify | None = None
    # Any other objective that is registered (`training.objectives`).
    objective: Objective | None = None
    # An experiment that is run before this one, in WORKDIR/first, and whose result is this one's init_from.
    first: Any = None
    seed: int = 0

    def __post_init__(self):
        config.check(self, seed=(0, 2**31 - 1))
        for name in ("fit", "distill", "byteify", "objective"):
            held = getattr(self, name)
            known = [OBJECTIVES[name]] if name in OBJECTIVES else list(OBJECTIVES.values())
            if held is not None and type(held) not in known:
                names = " or ".join(cls.__name__ for cls in known)
                raise AtomError(f"{name}: expected {names} (objectives are registered), got {held!r}")
        if self.fit is not None and (self.lora or getattr(self.model, "lora", None)):
            raise AtomError("fit and lora: fit the evictors in a run of its own (first)")
        if self.adapter and not self.init_from:
            raise AtomError(f"adapter is {self.adapter!r}, but there is no init_from to put it on")
        if len(losses := [o.name for o in self.objectives if o.trains]) > 1:
            raise AtomError(f"{' and '.join(losses)}: a run has one loss; give the others runs of their own (first)")

    @property
    def tokenizer_texts(self) -> tuple[str, ...]:
        """Sources of the text on which a tokenizer is trained."""
        return self.tokenizer_sources or self.data.sources

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the run pursues; the last one has the loss."""
        held = [getattr(self, f.name) for f in dataclasses.fields(self)]
        found = sorted((o for o in held if isinstance(o, Objective)), key=lambda o: o.trains)
        return tuple(found) if found and found[-1].trains else (*found, NextToken())

    def stages(self, workdir: pathlib.Path) -> list[tuple[Experiment, pathlib.Path]]:
        """The experiments that `first` chains, each with its directory, in the order in which they are run. One
        tokenizer is trained for all that ask for the same, on the text of all of them. Raises AtomError where one has
        an init_from beside `first`."""
        if self.first is None:
            return [(self, workdir)]
        if self.init_from:
            given = f"init_from is {self.init_from}, but this run starts from the result of `first`"
            raise AtomError(f"{given}: set first.init_from, or first=none")
        first, then = self.first, self
        if is_trained(self.tokenizer) and first.tokenizer == self.tokenizer:
            texts = dict.fromkeys((*first.tokenizer_texts, *self.tokenizer_texts))
            first = dataclasses.replace(first, tokenizer_sources=tuple(texts))
            then = dataclasses.replace(self, tokenizer="", tokenizer_sources=())
        before = first.stages(workdir / "first")
        return [*before, (dataclasses.replace(then, init_from=str(before[-1][1])), workdir)]


# Differences with which a run may be resumed; all others would silently make it another run. Whether data.sources
# are the same is seen by their text (`data.pipeline`).
RESUMABLE = re.compile(
    r"(first\.)*(train\.|mesh\.|model\.remat|data\.sources|init_from|adapter"
    r"|optim\.(learning_rate|schedule|warmup_steps|decay_fraction|final_fraction|clip_norm))"
)


def check_resumable(old: Experiment, new: Experiment, where: str) -> list[str]:
    """Differences between a checkpoint's experiment and the present one, all of them harmless.

    Raises AtomError that lists the others.
    """
    lines = config.diff(old, new)
    refused = [line for line in lines if not RESUMABLE.match(line)]
    if refused:
        raise AtomError(
            f"{where} belongs to a run with another configuration ({'; '.join(refused)}): "
            "use another --workdir, or undo these changes to resume"
        )
    return lines
