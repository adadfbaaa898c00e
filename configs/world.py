"""Models of a world that is watched before one may act in it (`atom_jax.data.envs.watch`), a variant for each way to
find units over time.

    python train.py --config=configs/world.py:watch --workdir=runs/watch
    python -m benchmarks.world            # trains some of them, plans with each, and prints a table

Runs have stages, each in a directory first/ of the next: the local prediction (LOCAL); then watches that
become longer, with encoder and local prediction frozen, so that units stand still.

watch          units start where the local prediction fails (surprise).
watch_cosine   H-Net's router, trained end to end with its ratio loss; nothing is frozen.
watch_every    every frame is a unit. watch_fixed: every ten frames are one. watch_change: wherever a frame differs.
minigrid       MemoryS16 of the package xminigrid (the extra `envs`), units by surprise.
video          sprites that fly and rest, in pixels; nobody acts.
codes          the same, read as codes of a tokenizer of images, which is trained first.
watch_local    no main network: nothing is remembered for longer than three frames.
large          1.1 billion parameters, for an accelerator.
tiny           seconds; for tests.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.change import Change
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.surprise import Surprise
from atom_jax.data.config import DataConfig
from atom_jax.models.hnet.ports import Cells, Codes, Pixels
from atom_jax.models.world import WorldConfig
from atom_jax.training.config import Experiment, Group, OptimConfig, TrainConfig
from atom_jax.training.objectives import Foresee, Images


class Lesson(NamedTuple):
    """least, most: frames of a watch. frames: of a row. flash: probability of one. steps, rate: of learning."""

    least: int
    most: int
    frames: int
    flash: float
    steps: int
    rate: float


# For the local prediction: short watches, so that most frames move, then how rare events are.
LOCAL = (Lesson(4, 6, 14, 0.25, 500, 5e-3), Lesson(32, 48, 54, 0.0625, 200, 2e-3))
# For everything else.
CURRICULUM = (
    Lesson(4, 6, 14, 0.25, 800, 3e-3),
    Lesson(8, 12, 22, 0.25, 400, 2e-3),
    Lesson(18, 26, 36, 0.0625, 400, 2e-3),
    Lesson(32, 48, 54, 0.0625, 600, 2e-3),
)
TINY = Lesson(4, 6, 14, 0.25, 10, 5e-3)
FORESEE = Foresee()
FROZEN = (Group(r"(cells|action|inlet|local)(/.*)?|stage0/(encoder|rule)/.*"),)


def model(rule: Any, pool: str = "first", capacity: float = 0.3, **changes: Any) -> WorldConfig:
    units = Chunking(**{"rule": rule, "pool": pool, "residual": "identity", "capacity": capacity} | changes)
    return WorldConfig(
        port=Cells(grid=(5, 5), classes=8, actions=4), layout=("T1", "T2", "T1"), d_model=(64, 64),
        d_intermediate=(128, 128), n_heads=(2, 2), rotary_dim=(16, 16), window=(1, -1), chunking=(units,),
        qk_norm=True, init_std=0.1, hidden=128, secrets=4, max_length=4096,
    )  # fmt: skip


def stage(
    before: Experiment | None, cfg: WorldConfig, lesson: Lesson, objective: Foresee = FORESEE, batch: int = 32,
    groups: tuple[Group, ...] = (), world: str = "",
) -> Experiment:  # fmt: skip
    """One stage, after the one before."""
    world = world or f"env:watch:least={lesson.least},most={lesson.most},flash={lesson.flash}"
    rate, steps = lesson.rate, lesson.steps
    return Experiment(
        model=cfg, objective=objective, first=before,
        data=DataConfig(sources=(world,), seq_len=lesson.frames, batch_size=batch),
        optim=OptimConfig(learning_rate=rate, warmup_steps=30, weight_decay=0.0, b2=0.99, groups=groups),
        train=TrainConfig(steps=steps, eval_every=steps, eval_batches=4, log_every=50, checkpoint_every=0),
    )  # fmt: skip


def learned(cfg: WorldConfig, frozen: bool = True) -> Experiment:
    """All stages."""
    exp = None
    for lesson in LOCAL:
        exp = stage(exp, cfg, lesson, Foresee(only_local=True), batch=64)
    for lesson in CURRICULUM:
        exp = stage(exp, cfg, lesson, groups=FROZEN if frozen else ())
    return exp


def watch() -> Experiment:
    """Flashes and `go` take the local prediction 3 nats and more, the pad that is lit at the end log 4, all else next
    to nothing."""
    return learned(model(Surprise(tau=2.5)))


def watch_cosine() -> Experiment:
    how = {"mix": "ema", "confidence": True, "residual": "linear"}
    return learned(model(Cosine(target=8.0, weight=0.3), capacity=0.5, **how), frozen=False)


def watch_every() -> Experiment:
    return learned(model(Fixed(1), "last", 1.0))


def watch_fixed() -> Experiment:
    return learned(model(Fixed(10), "mean", 0.15))


def watch_change() -> Experiment:
    return learned(model(Change(), capacity=1.0))


def watch_local() -> Experiment:
    """Units that never end, so that nothing is ever read."""
    return learned(model(Fixed(2**20), "mean", 0.1))


def minigrid() -> Experiment:
    """MemoryS16: what lay in the first room? One of two things, so that to see it costs log 2 = 0.69 nats."""
    port = Cells(grid=(3, 3, 2), classes=13, actions=3)
    cfg = dataclasses.replace(model(Surprise(tau=0.5), capacity=0.6), port=port, secrets=2)
    lesson = Lesson(0, 0, 41, 0.0, 400, 3e-3)
    first = stage(None, cfg, lesson, Foresee(only_local=True), batch=64, world="env:minigrid")
    return stage(first, cfg, lesson._replace(steps=1200), groups=FROZEN, world="env:minigrid")


def video() -> Experiment:
    """Most of what comes next is what was there, or moves on as it moved: a unit every eight frames or so."""
    cfg = dataclasses.replace(
        model(Surprise(target=8.0), capacity=0.5), port=Pixels(actions=1), secrets=0, window=(4, -1)
    )
    lesson = Lesson(0, 0, 64, 0.0, 1000, 3e-3)
    first = stage(None, cfg, lesson, Foresee(only_local=True), batch=16, world="env:video")
    groups = (*FROZEN, Group(r"pixels/.*"))
    return stage(first, cfg, lesson._replace(steps=500), batch=16, groups=groups, world="env:video")


def codes() -> Experiment:
    """A frame is at most 8 of 200 codes. A sprite that moves on changes many of them, and one that rests none."""
    cfg = dataclasses.replace(
        model(Surprise(target=8.0), capacity=0.5), port=Codes(actions=1), secrets=0, window=(4, -1)
    )
    size, seen = cfg.port.tokenizer.max_length, ("image:sprites",)
    tokenizer = Experiment(
        model=cfg.port.tokenizer, tokenizer="pixels", objective=Images(),
        data=DataConfig(sources=seen, seq_len=size, batch_size=48, whole=True),
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=100, final_fraction=0.02, weight_decay=0.01),
        train=TrainConfig(steps=3000, log_every=20, eval_every=600, eval_batches=8),
    )  # fmt: skip
    lesson, frozen = Lesson(0, 0, 64, 0.0, 1000, 3e-3), (Group(r"tokenizer/.*"),)
    first = stage(tokenizer, cfg, lesson, Foresee(only_local=True), batch=16, groups=frozen, world="env:video")
    groups = (*frozen, *FROZEN, Group("codes"))
    return stage(first, cfg, lesson._replace(steps=500), batch=16, groups=groups, world="env:video")


def large() -> Experiment:
    """For an accelerator; a size, not a recipe."""
    sizes = {"layout": ("T4", "T20", "T4"), "d_model": (1024, 2048), "d_intermediate": (2816, 5632)}
    sizes |= {"n_heads": (16, 16), "rotary_dim": (64, 128), "hidden": 4096, "init_std": 0.02}
    port = Cells(grid=(5, 5), classes=8, actions=4, hidden=4096)
    cfg = dataclasses.replace(model(Surprise(tau=2.5)), port=port, dtype="bfloat16", remat=True, **sizes)
    return stage(None, cfg, Lesson(200, 240, 256, 0.0625, 10000, 3e-4), batch=512)


def tiny() -> Experiment:
    small = {"layout": ("T1", "T1", "T1"), "d_model": (16, 16), "d_intermediate": (16, 16), "rotary_dim": (4, 4)}
    port = Cells(grid=(5, 5), classes=8, actions=4, hidden=16)
    cfg = dataclasses.replace(model(Surprise()), port=port, hidden=16, **small)
    first = stage(None, cfg, TINY, Foresee(only_local=True), batch=8)
    return stage(first, cfg, TINY, batch=8, groups=FROZEN)


_ALL = (watch, watch_cosine, watch_every, watch_fixed, watch_change, watch_local, minigrid, video, codes, large, tiny)
VARIANTS = {f.__name__: f for f in _ALL}
