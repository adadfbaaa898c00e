"""Tokenizers of images: errors by tokens, and what it gains that images get as many as they need."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from scipy import ndimage, stats

from atom_jax import config
from atom_jax.data import images
from atom_jax.data.config import SPLITS
from atom_jax.evaluation import image_strip
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.metrics import Metric, Result, columns, mean
from atom_jax.inference import image_tokens as lib
from atom_jax.inference.image_tokens import Offers
from atom_jax.models.image_tokens import ImageTokensConfig
from atom_jax.typing import IMAGES, LM, AtomError

# Of what SSIM compares, and what keeps it finite (Wang et al., 2004, for pixels in [0, 1]).
_SIGMA, _C1, _C2 = 1.5, 0.01**2, 0.03**2


@dataclasses.dataclass(frozen=True)
class ImagesSettings:
    """Which images, and how many tokens they get.

    source: as in DataConfig.sources, without "image:"; "": those that a training directory was trained on.
    split, limit: the first so many images of it.
    tokens: for all images, and, on average, where each gets as many as it needs; as many as every image can do with
        where the tokenizer's fewest are more.
    """

    source: str = ""
    split: str = "test"
    limit: int = 400
    tokens: int = 4

    def __post_init__(self):
        config.check(self, limit=(2, 2**20), tokens=(1, 2**16))


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """Of every length: mse, psnr, ssim and mae, means over the images, and bits. Of `tokens` on average, for all
    images alike (same), by one bound on the error (adaptive) and where they help most (gain): the mean squared error
    and that of the worst tenth. Of adaptive also the rank correlation of tokens with complexity: the number of shapes
    where that is known, else the bytes of a PNG; absent where all are alike. The bound is the one with which these
    very images have that many tokens."""

    settings = ImagesSettings()
    reads = IMAGES

    def run(self, lm: LM, settings: ImagesSettings, encoder: Encoder | None, out: pathlib.Path | None) -> Result:
        """Also draws OUT.png: some images, from simple to complex ones."""
        lib.check(lm, "--checkpoint")
        if settings.split not in SPLITS:
            raise AtomError(f"images.split={settings.split}: expected one of {', '.join(SPLITS)}")
        pictures = images.parse(settings.source or "shapes")
        pixels = images.arrays(pictures, settings.split, settings.limit)
        found = lib.offers(lm, pixels)
        ranks, kind = complexity(pictures, settings, pixels)
        by_length = lengths(found, pixels, lm.config)
        metrics = {f"mse_{row['name']}": Metric(row["mse"], row["mse_stderr"]) for row in by_length}
        tokens = max(settings.tokens, int(found.tokens.min(axis=0).max()))
        ways = allocations(found, tokens)
        for name, at in ways.items():
            used, errors = lib.tokens_of(found, at), lib.errors_of(found, at)
            metrics |= {
                f"{name}_tokens": mean(used), f"{name}_mse": mean(errors), f"{name}_worst_tenth": mean(worst(errors)),
            }  # fmt: skip
        used = lib.tokens_of(found, ways["adaptive"])
        if np.ptp(used) and np.ptp(ranks):
            metrics["rank_correlation"] = Metric(float(stats.spearmanr(used, ranks).statistic), math.nan)
        if out is not None:
            shown = min(image_strip.MOST, len(ranks))
            some = np.argsort(ranks, kind="stable")[np.linspace(0, len(ranks) - 1, shown).astype(int)]
            order = np.concatenate([some, np.setdiff1d(np.arange(len(ranks)), some)])
            image_strip.draw(pixels[order], taken(found, order), ways["adaptive"][order], out.with_suffix(".png"))
        notes = {
            "lengths": by_length, "complexity": kind, "by_complexity": spread(found, ways["adaptive"], ranks),
            "error_bound": lib.threshold(found, tokens),
        }  # fmt: skip
        return Result(metrics, len(pixels), notes, table(by_length, metrics, notes))


def allocations(found: Offers, tokens: int) -> dict[str, np.ndarray]:
    """The offers that each image gets, by the way of choosing them."""
    adaptive = lib.within(found, lib.threshold(found, tokens))
    return {"same": lib.at_most(found, tokens), "adaptive": adaptive, "gain": lib.by_gain(found, tokens)}


def complexity(pictures: images.Pictures, settings: ImagesSettings, pixels: np.ndarray) -> tuple[np.ndarray, str]:
    """How much there is to see in each image, i64 [n], and what that counts."""
    if pictures.endless:
        drawn = images.Drawn(pictures, settings.split)
        return np.array([drawn.drawn(i)[1] for i in range(len(pixels))]), "shapes"
    return np.array([images.png_bytes(image) for image in pixels]), "png_bytes"


def lengths(found: Offers, pixels: np.ndarray, cfg: ImageTokensConfig) -> list[dict[str, Any]]:
    """Figures of every length; `tokens` is a mean, where images have different ones."""
    rows, codes = [], cfg.quantiser.codes
    for k, name in enumerate(cfg.length.labels(cfg)):
        tokens, errors = float(found.tokens[k].mean()), found.errors[k]
        difference = np.abs(found.images[k] - pixels / np.float32(255))
        rows.append({
            "name": name.replace(" ", "_"), "tokens": tokens, "bits": tokens * math.log2(codes) if codes else None,
            "mse": float(errors.mean()), "mse_stderr": mean(errors).stderr,
            "psnr": float(np.mean(-10 * np.log10(np.maximum(errors, 1e-10)))),
            "ssim": float(ssim(found.images[k], pixels / np.float32(255)).mean()), "mae": float(difference.mean()),
        })  # fmt: skip
    return rows


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity f64 [n] of images [n, h, w, c] in [0, 1], with a Gaussian window of 11 pixels, over the
    whole images (their borders are mirrored)."""

    def blurred(x: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(x.astype(np.float64), (0, _SIGMA, _SIGMA, 0), truncate=3.5)

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + _C1) * (2 * both + _C2)
    return np.mean(top / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2)), axis=(1, 2, 3))


def worst(errors: np.ndarray) -> np.ndarray:
    """The largest tenth of errors."""
    return np.sort(errors)[-max(len(errors) // 10, 1) :]


def spread(found: Offers, at: np.ndarray, ranks: np.ndarray) -> dict[str, float]:
    """Mean tokens of images by their complexity, in up to seven groups."""
    used = lib.tokens_of(found, at)
    if len(np.unique(ranks)) <= 7:
        return {str(rank): float(used[ranks == rank].mean()) for rank in np.unique(ranks)}
    edges = np.quantile(ranks, np.linspace(0, 1, 6))
    groups = np.clip(np.searchsorted(edges, ranks, side="right") - 1, 0, 4)
    return {f"{edges[g]:.0f}-{edges[g + 1]:.0f}": float(used[groups == g].mean()) for g in np.unique(groups)}


def taken(found: Offers, order: np.ndarray) -> Offers:
    """The offers of some images."""
    codes = None if found.codes is None else found.codes[:, order]
    return Offers(found.tokens[:, order], found.errors[:, order], found.images[:, order], codes)


def table(rows: list[dict], metrics: dict[str, Metric], notes: dict) -> str:
    """The results in lines: lengths, ways of choosing them, and tokens by complexity."""
    names = ("tokens", "bits", "mse", "psnr", "ssim", "mae")
    digits = {"tokens": ".3g", "bits": ".0f", "psnr": ".2f"}
    lines = [[("-" if row[n] is None else f"{row[n]:{digits.get(n, '.4f')}}") for n in names] for row in rows]
    ways = [
        (name, *(f"{metrics[f'{name}_{part}'].value:.4f}" for part in ("tokens", "mse", "worst_tenth")))
        for name in ("same", "adaptive", "gain")
    ]
    groups = ", ".join(f"{name}: {value:.1f}" for name, value in notes["by_complexity"].items())
    correlation = metrics.get("rank_correlation")
    ranked = "" if correlation is None else f"; rank correlation {correlation.value:.2f}"
    return "\n".join([
        columns([names, *lines], 0), "", columns([("", "tokens", "mse", "worst tenth"), *ways], 1), "",
        f"tokens by {notes['complexity']}: {groups}{ranked}",
    ])  # fmt: skip
