"""Images to codes and back, with as many tokens as each of them needs.

Letters besides those of `atom_jax.typing`: k lengths that a tokenizer offers, n images, r registers.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.files import replaced
from atom_jax.models import image_tokens
from atom_jax.models.image_tokens import Choices, ImageTokensConfig, lengths
from atom_jax.nn import vit
from atom_jax.typing import LM, AtomError

# Images that go through the tokenizer at once, with all their lengths.
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Offers:
    """For n images: tokens i32 [k, n] and errors f32 [k, n], mean squares of pixels in [0, 1];
    images f32 [k, n, size, size, channels], decoded; codes i32 [k, n, r], -1 for tokens not kept, or None."""

    tokens: np.ndarray
    errors: np.ndarray
    images: np.ndarray
    codes: np.ndarray | None


def check(lm: LM, what: str) -> None:
    """Raises AtomError, which begins with `what`, for models that are no tokenizers of images."""
    if not isinstance(lm.config, ImageTokensConfig):
        raise AtomError(f"{what} is a {lm.family}, not a tokenizer of images (configs/image.py)")


def offers(lm: LM, images: np.ndarray) -> Offers:
    """All that a tokenizer offers for images u8 [n, size, size, channels]; its lengths are decoded in one call.

    Raises AtomError for images of another size.
    """
    cfg, wanted = lm.config, (lm.config.size, lm.config.size, lm.config.channels)
    if images.shape[1:] != wanted or not len(images):
        raise AtomError(
            f"images are {list(images.shape)}, expected [n, {', '.join(map(str, wanted))}] with n above 0"
        )
    parts = []
    for start in range(0, len(images), _AT_ONCE):
        part = images[start : start + _AT_ONCE]
        filled = np.pad(part, [(0, min(_AT_ONCE, len(images)) - len(part)), (0, 0), (0, 0), (0, 0)])
        parts.append(jax.device_get(_choices(lm.params, filled, cfg=cfg)))
    found = jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, : len(images)], *parts)
    errors = np.mean(np.square(found.patches - images / np.float32(255)), axis=(2, 3, 4))
    return Offers(found.tokens, errors, found.patches, found.index)


@functools.partial(jax.jit, static_argnames="cfg")
def _choices(p: Any, images_nhwc: jax.Array, *, cfg: ImageTokensConfig) -> Choices:
    """Choices with images f32 [k, n, size, size, channels] in place of patches."""
    x = vit.patches(images_nhwc.astype(jnp.float32) / 255, cfg.patch)
    found = cfg.length.choices(p, x, cfg)
    return found.replace(patches=jax.vmap(functools.partial(image_tokens.pictured, cfg=cfg))(found.patches))


def decoded(lm: LM, codes: np.ndarray) -> np.ndarray:
    """Images f32 [n, size, size, channels] of codes i32 [n, r], -1 for tokens that are not kept.

    Raises AtomError for codes that the tokenizer doesn't have.
    """
    cfg = lm.config
    if not cfg.quantiser.codes:
        raise AtomError("this tokenizer of images has no codes")
    whole = codes.ndim == 2 and codes.size and codes.shape[1] == cfg.registers and codes.dtype.kind in "iu"
    if not whole or codes.min() < -1 or codes.max() >= cfg.quantiser.codes:
        raise AtomError(f"codes: expected [n, {cfg.registers}] of numbers from -1 to {cfg.quantiser.codes - 1}")
    return np.asarray(_decoded(lm.params, codes, cfg=cfg))


@functools.partial(jax.jit, static_argnames="cfg")
def _decoded(p: Any, codes_nr: jax.Array, *, cfg: ImageTokensConfig) -> jax.Array:
    return image_tokens.image(p, codes_nr, cfg)


def save(path: str | os.PathLike, codes: np.ndarray, names: Sequence[str]) -> None:
    """Writes codes i32 [n, r] and the images' names into an .npz file. Raises AtomError when it cannot be written."""
    try:
        with replaced(path) as part:
            np.savez_compressed(part, codes=codes, names=np.array(names))
    except OSError as e:
        raise AtomError(f"{path}: the codes cannot be written ({e.strerror})") from None


def within(found: Offers, error: float) -> np.ndarray:
    """i32 [n], as `lengths.within`: of each image the offer with the fewest tokens within this error."""
    return np.array(lengths.within(found.tokens, found.errors, error))


def at_most(found: Offers, tokens: int) -> np.ndarray:
    """i32 [n]: of each image the offer with the most tokens, up to so many, of several the one with the smallest
    error. Raises AtomError where there is none."""
    fits = found.tokens <= tokens
    if not fits.any(axis=0).all():
        raise AtomError(f"tokens is {tokens}: this tokenizer offers {found.tokens.min()} to {found.tokens.max()}")
    return np.array(lengths.cheapest(np.where(fits, -found.tokens, np.iinfo(np.int32).max), found.errors))


def threshold(found: Offers, mean: float) -> float:
    """The smallest error that `within` can ask of these images for at most `mean` tokens each, on average."""
    errors = np.unique(found.errors)
    low, high = 0, len(errors) - 1
    while low < high:
        middle = (low + high) // 2
        enough = tokens_of(found, within(found, errors[middle])).mean() <= mean
        low, high = (low, middle) if enough else (middle + 1, high)
    return float(errors[low])


def by_gain(found: Offers, mean: float) -> np.ndarray:
    """i32 [n]: offers of at most `mean` tokens on average. All images begin with their smallest offer, and the next
    tokens go again and again to where they lower the error most, each. Raises AtomError where these offers are too
    many already."""
    at = np.array(lengths.cheapest(found.tokens, found.errors))
    left = mean * len(at) - tokens_of(found, at).sum()
    if left < 0:
        least = tokens_of(found, at).mean()
        raise AtomError(f"tokens is {mean:g}: the fewest that these images can have are {least:.4g} on average")
    steps = []
    for n, start in enumerate(at):
        tokens, errors, now, last = found.tokens[:, n], found.errors[:, n], start, np.inf
        while (better := np.flatnonzero((errors < errors[now]) & (tokens > tokens[now]))).size:
            gains = (errors[now] - errors[better]) / (tokens[better] - tokens[now])
            best = better[gains.argmax()]
            # Rounding must not put a step before the one that it follows.
            last = min(last, gains.max())
            steps.append((-last, n, tokens[best] - tokens[now], best))
            now = best
    full = set()
    # Of one image gains fall from step to step, so that its steps come in order.
    for _, n, price, best in sorted(steps, key=lambda step: step[0]):
        if n not in full and price <= left:
            at[n], left = best, left - price
        else:
            full.add(n)
    return at


def tokens_of(found: Offers, at: np.ndarray) -> np.ndarray:
    """i32 [n]: tokens of the chosen offers."""
    return found.tokens[at, np.arange(len(at))]


def errors_of(found: Offers, at: np.ndarray) -> np.ndarray:
    """f32 [n]: errors of the chosen offers."""
    return found.errors[at, np.arange(len(at))]
