"""The picture of token reduction: which tokens of an image went together, and how much of it each one stands for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from atom_jax import picture

_DROPPED = "#d9d9d9"


def draw(
    image_bhwc: np.ndarray, grid: tuple[int, int], slots: Mapping[str, np.ndarray], path: str | os.PathLike
) -> None:
    """Writes a PNG with a row for every image and a column for every method, after that of the images themselves.

    slots: by method, i32 [b, p], the token into which every token of the grid has gone, or -1: dropped (gray). What
    went together has one colour, by its share of the image, and a line around it.
    Raises AtomError when the file cannot be written.
    """
    down, across = len(image_bhwc), len(slots) + 1
    most = max((float(areas(slot).max()) for slot in slots.values()), default=1.0)
    layout = {"nrows": down, "ncols": across, "figsize": (1.25 * across + 0.6, 1.25 * down + 0.4), "squeeze": False}
    with picture.drawn(path, dpi=130, **layout) as (figure, axes):
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
        for ax, image in zip(axes[:, 0], image_bhwc):
            ax.imshow(image[..., 0] if image.shape[-1] == 1 else image[..., :3], cmap="gray_r", vmin=0, vmax=1)
        axes[0, 0].set_title("image", fontsize=7)
        shown = None
        for column, (name, slot_bp) in zip(axes.T[1:], slots.items()):
            column[0].set_title(name.replace(":", "\n").replace(", ", "\n"), fontsize=7)
            for ax, slot, area in zip(column, slot_bp, areas(slot_bp)):
                shown = _map(ax, slot.reshape(grid), area.reshape(grid), most)
        if shown is not None:
            figure.colorbar(shown, ax=axes, shrink=0.6, label="share of the image per token left")


def areas(slot_bp: np.ndarray) -> np.ndarray:
    """f64 [b, p]: the share of all tokens that are where each one is; 0 where it was dropped."""
    same = (slot_bp[:, :, None] == slot_bp[:, None, :]).mean(2)
    return np.where(slot_bp < 0, 0.0, same)


def _map(ax: Any, slot_hw: np.ndarray, area_hw: np.ndarray, most: float) -> Any:
    """One map; returns what the colour bar is made for."""
    ax.set_facecolor(_DROPPED)
    area = np.ma.masked_where(slot_hw < 0, area_hw)
    drawn = ax.imshow(area, cmap="viridis", vmin=0, vmax=most)
    height, width = slot_hw.shape
    line = {"colors": "white", "linewidth": 0.8}
    y, x = np.nonzero(slot_hw[:, 1:] != slot_hw[:, :-1])
    ax.vlines(x + 0.5, y - 0.5, y + 0.5, **line)
    y, x = np.nonzero(slot_hw[1:] != slot_hw[:-1])
    ax.hlines(y + 0.5, x - 0.5, x + 0.5, **line)
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return drawn
