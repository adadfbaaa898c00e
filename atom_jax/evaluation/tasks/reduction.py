"""Token reducers next to each other: what a classifier of images loses, and saves, with fewer tokens.

Every reducer acts after the attention of one layer; ToMe, as in its paper, also merges some in every layer.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from atom_jax import config, reduction
from atom_jax.data.config import SPLITS
from atom_jax.data.images import labelled
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.metrics import Result, columns, mean, proportion
from atom_jax.evaluation.tasks import source_maps
from atom_jax.evaluation.tasks.kv import joined
from atom_jax.models import cct
from atom_jax.reduction.tome import ToMe, schedule
from atom_jax.terminal import progress
from atom_jax.typing import IMAGES, LM, AtomError

_ALL = (
    "random", "random:merge=true", "kth", "pool", "kmeans", "hiprune:deep_layer=-1", "globalcom2", "todre",
    "todre:mode=maxsum", "tome",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReductionSettings:
    """What is compared, and on what.

    reducers: as `reduction.parse` reads them; (): all, some in two ways (HiPrune with the layer in which it acts for
        its deep one, for here there are no more). Those that can't leave just as many tokens
        as a ratio asks for are left out there.
    ratios: of the tokens left.
    layer: after whose attention they act, from 0.
    inflections: ToMe in all layers too, with these schedules, to about the same number of tokens after the last one.
    source, split: as `data.images.labelled` names images with their classes, such as "digits:size=8"; "": those that
        the checkpoint was trained on. limit: of them, the first so many (0: all).
    batch: images at once. repeats: seconds are the least of so many rounds over all methods, on the images of one
        batch.
    shown, images: the picture has the methods at this ratio and so many images.
    """

    reducers: tuple[str, ...] = ()
    ratios: tuple[float, ...] = (0.75, 0.5, 0.25)
    layer: int = 1
    inflections: tuple[float, ...] = (0.0, -1.0)
    source: str = ""
    split: str = "test"
    limit: int = 0
    batch: int = 256
    repeats: int = 5
    shown: float = 0.5
    images: int = 6

    def __post_init__(self):
        some, share = (1, 2**20), (1e-6, 1)
        config.check(
            self, ratios=share, layer=(0, 2**20), limit=(0, 2**31 - 1), inflections=(-1, 1), batch=some, repeats=some,
            shown=share, images=some,
        )  # fmt: skip


class Method(NamedTuple):
    """A reducer as the table names it, the share of the tokens that it leaves, and what acts in every layer."""

    name: str
    ratio: float
    reducers: tuple[Any, ...]


class Measured(NamedTuple):
    """hit: bool [n], which images a method has right; seconds for an image."""

    hit: np.ndarray
    seconds: float


@dataclasses.dataclass(frozen=True)
class Reducing:
    """Accuracy, tokens per layer, operations and seconds of every reducer at every ratio."""

    settings = ReductionSettings()
    reads = IMAGES

    def run(self, lm: LM, settings: ReductionSettings, encoder: Encoder | None, out: pathlib.Path | None) -> Result:
        """Rows in the notes, under "rows". With `out` a picture is drawn next to it: which tokens went together."""
        if not isinstance(lm.config, cct.CCTConfig):
            raise AtomError(f"reduction: needs a classifier of images (cct), the model is of the kind {lm.family}")
        if not settings.source:
            raise AtomError("reduction.source: name labelled images, such as digits:size=8")
        if settings.split not in SPLITS:
            raise AtomError(f"reduction.split={settings.split}: expected one of {', '.join(SPLITS)}")
        pixels, labels = labelled.arrays(settings.source, settings.split, settings.limit)
        chosen = methods(settings, lm.config)
        found = _measure(lm, chosen, pixels, labels, settings)
        rows = [_row(lm.config, method, one, found[0]) for method, one in zip(chosen, found)]
        if out is not None:
            batch, n = next(_batches(pixels, settings.batch)), settings.images
            maps = {m.name: _sources(lm, m, batch)[:n] for m in chosen if m.ratio == settings.shown}
            source_maps.draw(batch[:n], lm.config.grid, maps, out.with_suffix(".png"))
        metrics = {f"acc/{m.name}/{m.ratio:g}": proportion(one.hit) for m, one in zip(chosen, found)}
        return Result(metrics, len(labels), {"rows": rows}, table(rows))


def methods(settings: ReductionSettings, cfg: cct.CCTConfig) -> list[Method]:
    """All methods, "none" first. Raises AtomError for a layer that isn't there and texts that name no reducer."""
    if settings.layer >= cfg.n_layers:
        raise AtomError(f"reduction.layer: {settings.layer}, but the model has {cfg.n_layers} layers, from 0")
    out = [Method("none", 1.0, ())]
    for ratio in settings.ratios:
        m = round(ratio * cfg.tokens)
        for name in joined(settings.reducers) or _ALL:
            reducer = reduction.parse(name)
            try:
                reducer = reduction.leaving(reducer, m, cfg.grid)
            except AtomError as e:
                print(f"reduction: {name} at {ratio:g}: {e}", file=sys.stderr)
                continue
            layers = tuple(reducer if i == settings.layer else None for i in range(cfg.n_layers))
            out.append(Method(name, ratio, layers))
        for inflection in settings.inflections:
            layers = _spread(cfg, m, inflection)
            if abs(cct.left(cfg, layers)[-1] - m) <= cfg.n_layers:
                out.append(Method(f"tome, all layers ({inflection:g})", ratio, layers))
    return out


def _spread(cfg: cct.CCTConfig, m: int, inflection: float) -> tuple[Any, ...]:
    """ToMe in every layer, so that about m tokens are left: each may merge half of its tokens at most."""
    every = schedule(cfg.n_layers, (cfg.tokens - m) // cfg.n_layers, inflection)
    return tuple(ToMe(r) if r else None for r in every)


def _measure(
    lm: LM, chosen: list[Method], pixels: np.ndarray, labels: np.ndarray, settings: ReductionSettings
) -> list[Measured]:
    """Every method on all images, then again and again on one batch, one method after the other."""
    batches = list(_batches(pixels, settings.batch))
    hits, programs = [], []
    for method in progress(chosen, desc="reduction", unit="method"):
        run = _program(lm.config, method.reducers)
        logits = np.concatenate([np.asarray(run(lm.params, batch).logits) for batch in batches])
        hits.append(logits[: len(labels)].argmax(1) == labels)
        programs.append(run)
    seconds = np.full(len(chosen), np.inf)
    for _ in progress(range(settings.repeats), desc="seconds", unit="round"):
        for i, run in enumerate(programs):
            began = time.perf_counter()
            jax.block_until_ready(run(lm.params, batches[0]).logits)
            seconds[i] = min(seconds[i], time.perf_counter() - began)
    return [Measured(hit, float(s) / len(batches[0])) for hit, s in zip(hits, seconds)]


@functools.cache
def _program(cfg: cct.CCTConfig, reducers: tuple[Any, ...]) -> Callable[..., cct.Classified]:
    return jax.jit(lambda p, x_bhwc: cct.classify(p, x_bhwc, cfg, reducers))


def _batches(pixels: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Batches of one size; the last one is filled up with zeros."""
    size = min(size, len(pixels))
    for i in range(0, len(pixels), size):
        part = pixels[i : i + size]
        yield np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))


def _sources(lm: LM, method: Method, pixels: np.ndarray) -> np.ndarray:
    """i32 [b, p]: the slot of every token after the last layer, -1 where it was dropped."""
    found = _program(lm.config, method.reducers)(lm.params, pixels)
    slot = np.asarray(found.trace.slot)
    return np.where(slot < found.trace.m, slot, -1)


def _row(cfg: cct.CCTConfig, method: Method, one: Measured, full: Measured) -> dict[str, Any]:
    right, lost = proportion(one.hit), mean(full.hit.astype(float) - one.hit)
    return {
        "reducer": method.name, "ratio": method.ratio, "tokens": cct.left(cfg, method.reducers),
        "flops": cct.image_flops(cfg, method.reducers), "accuracy": right.value, "stderr": right.stderr,
        "lost": lost.value, "lost_stderr": lost.stderr, "seconds": one.seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as lines of text."""
    cells = [("reducer", "left", "tokens per layer", "MFLOP", "ms / 1000 images", "accuracy", "points lost")]
    for row in rows:
        cells.append(
            (
                row["reducer"], f"{row['ratio']:g}", " ".join(map(str, row["tokens"])), f"{row['flops'] / 1e6:.2f}",
                f"{row['seconds'] * 1e6:.0f}", f"{row['accuracy']:.4f}",
                f"{100 * row['lost']:.2f} +- {100 * row['lost_stderr']:.2f}",
            )
        )  # fmt: skip
    return columns(cells, 1)
