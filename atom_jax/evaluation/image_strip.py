"""A picture of images, of what comes of them with more and more tokens, and of how many they got."""

from __future__ import annotations

import os

import numpy as np

from atom_jax import picture
from atom_jax.inference.image_tokens import Offers, tokens_of

# Images that are shown, and lengths of each.
MOST, LENGTHS = 8, 7


def draw(images: np.ndarray, found: Offers, at: np.ndarray, path: str | os.PathLike) -> None:
    """Writes a PNG: of the first images (u8 [n, size, size, channels]) one row each, the image, what is decoded from
    1, 2, 4 ... tokens and, framed, from those chosen; under them a histogram of the tokens used.

    at: i64 [n], the offer chosen for each. Raises AtomError when the file cannot be written.
    """
    picture.check(path)
    rows = [_row(found, int(at[n]), n) for n in range(min(len(images), MOST))]
    columns = 1 + max(map(len, rows))
    size = (1.1 * columns, 1.25 * len(rows) + 1.6)
    heights = [1.0] * len(rows) + [1.2]
    with picture.drawn(path, nrows=len(rows) + 1, ncols=columns, figsize=size, squeeze=False,
                       gridspec_kw={"height_ratios": heights}) as (figure, axes):  # fmt: skip
        for ax in axes.flat:
            ax.axis("off")
        for n, (row, line) in enumerate(zip(rows, axes)):
            _show(line[0], images[n] / 255, "image" if n == 0 else "")
            for k, ax in zip(row, line[1:]):
                label = f"{found.tokens[k, n]} tokens" if found.tokens[k, n] != 1 else "1 token"
                _show(ax, found.images[k, n], f"{label}\n{found.errors[k, n]:.4f}", chosen=k == at[n])
        used = tokens_of(found, at)
        ax = figure.add_subplot(axes[-1, 0].get_gridspec()[-1, :])
        ax.bar(*np.unique(used, return_counts=True), color="tab:blue")
        ax.set_xlim(-0.6, found.tokens.max() + 0.6)
        ax.set_xlabel(f"tokens used by {len(used)} image{'s' if len(used) > 1 else ''}", fontsize=8)
        ax.tick_params(labelsize=7)


def _row(found: Offers, chosen: int, n: int) -> list[int]:
    """Offers to show for image n: those that have doubled the tokens since the one before, and the chosen one."""
    shown, last = {chosen}, 0
    for k in np.argsort(found.tokens[:, n], kind="stable"):
        if found.tokens[k, n] >= max(2 * last, 1) and len(shown) < LENGTHS:
            shown.add(int(k))
            last = found.tokens[k, n]
    return sorted(shown, key=lambda k: (found.tokens[k, n], k))


def _show(ax, image: np.ndarray, title: str, chosen: bool = False) -> None:
    gray = image.shape[-1] == 1
    ax.imshow(image[..., 0] if gray else image, cmap="gray" if gray else None, vmin=0, vmax=1)
    ax.set_title(title, fontsize=7)
    ax.axis("on")
    ax.set(xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set(visible=chosen, color="tab:red", linewidth=3)
