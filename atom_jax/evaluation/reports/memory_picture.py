"""Which tokens of a text the learned evictors of a model keep, head by head: numbers and a picture."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np

from atom_jax import picture
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.reports.units import visible
from atom_jax.evaluation.tasks import planted
from atom_jax.evaluation.tasks.needle import Haystack
from atom_jax.inference.score import to_batch
from atom_jax.kvcache.policy import policies_of
from atom_jax.models import registry
from atom_jax.tokenizers.bytes import to_utf8
from atom_jax.typing import LM, AtomError, Batch

# Tokens that are read where nothing else is said, and rows of the summary's lists.
_LONGEST = 2048
_TOKENS, _HEADS = 20, 3
_KEPT, _WAITS, _GONE, _FACT = "#0072B2", "#B9D6EA", "#FFFFFF", "#D55E00"


@dataclasses.dataclass(frozen=True)
class Memory:
    """What was decided about a text of t tokens in l layers with h key/value heads.

    labels: the tokens' texts. evict: bool [l, h, t], whether the key is evicted once `window` tokens have followed.
    total: tokens of the whole text, of which t were read. answers: bool [t], tokens of what planted facts say; None
    where none are planted.
    """

    labels: tuple[str, ...]
    evict: np.ndarray
    window: int
    total: int
    answers: np.ndarray | None = None

    @property
    def gone(self) -> np.ndarray:
        """bool [l, h, t]: keys that have left the memory when the last token was read."""
        t = self.evict.shape[2]
        return self.evict & (np.arange(t) < t - 1 - self.window)

    @property
    def held(self) -> np.ndarray:
        """i32 [l, h]: entries in the memory when the last token was read."""
        return np.sum(~self.gone, axis=2, dtype=np.int32)

    def over_time(self) -> np.ndarray:
        """i32 [l, h, t]: entries in the memory when each token was read, its own included."""
        t = self.evict.shape[2]
        left = np.cumsum(self.evict, axis=2, dtype=np.int32)
        # When token i is read, keys before i - window that were to go are gone.
        late = np.pad(left, [(0, 0), (0, 0), (self.window + 1, 0)])[:, :, :t]
        return np.arange(1, t + 1, dtype=np.int32) - late


def read(lm: LM, text: str | bytes, length: int = 0, facts: int = 0) -> Memory:
    """Decisions about the keys of a text; of a long one about its first `length` tokens (0: what the model was made
    for, but no more than 2048). facts: so many are planted in these (`evaluation.tasks.planted`), evenly spread.

    Raises AtomError for models without learned evictors or tokenizer, when there is no text, and when it is too short
    for the facts.
    """
    memory = registry.of(lm.config).memory(lm.config)
    learned = [p for p in policies_of(memory) if p.learns and p.to_hf(lm.family)]
    if not learned:
        raise AtomError("the model has no learned evictors, so it keeps every token")
    if lm.tokenizer is None:
        raise AtomError("the checkpoint has no tokenizer, so it cannot read a text")
    data = to_utf8(text)
    if not data:
        raise AtomError("the text is empty, so there is nothing to remember")
    ids, spans = lm.tokenizer.spans(text)
    labels = ["".join(visible(data[a:b]).splitlines()) for a, b in spans]
    first = lm.tokenizer.front
    total, answers = len(first) + len(ids), None
    n = min(total, length or min(lm.config.max_length, _LONGEST))
    if facts:
        encoder = Encoder(lm.tokenizer, 1 << 20, False)
        chosen = planted.facts((), facts, np.random.default_rng(0))
        stream = planted.plant(Haystack.of(data, encoder), chosen, n - len(first), encoder)
        ids, answers = stream.ids, np.pad(stream.wanted, (len(first), 0))
        labels = ["".join(visible(lm.tokenizer.decode_bytes([i])).splitlines()) for i in ids.tolist()]
    ids, labels = np.concatenate([np.array(first, np.int32), ids]), [*["<front>"] * len(first), *labels]
    evict = _evict(lm.params, to_batch(lm, ids[None, :n]), cfg=lm.config)
    return Memory(tuple(labels[:n]), np.asarray(evict)[:, 0], learned[0].window, total, answers)


@functools.partial(jax.jit, static_argnames="cfg")
def _evict(params: Any, batch: Batch, *, cfg: Any) -> jax.Array:
    return registry.of(cfg).hidden(params, batch, cfg=cfg)[2]["evict"]


def summary(memory: Memory) -> str:
    """The decisions in lines of text."""
    held, t = memory.held, memory.evict.shape[2]
    heads = held.shape[1]
    order = np.argsort(held, axis=None, kind="stable")
    name = lambda i: f"layer {i // heads} head {i % heads}: {held.flat[i]:,}"  # noqa: E731
    few = min(_HEADS, len(order))
    lines = [
        f"{t:,} tokens read" + (f", the first of {memory.total:,}" if t < memory.total else ""),
        f"entries per head: min {held.min():,}, mean {held.mean():,.1f}, max {held.max():,}"
        f" ({t / held.mean():.2f} times fewer than all)",
        "most retentive:  " + "; ".join(name(i) for i in order[::-1][:few]),
        "least retentive: " + "; ".join(name(i) for i in order[:few]),
    ]
    old = max(0, t - 1 - memory.window)
    if not old:
        return "\n".join([*lines, f"every token is still within the window of {memory.window} tokens"])
    keep = np.sum(~memory.evict[:, :, :old], axis=(0, 1))
    if memory.answers is not None and memory.answers[:old].any():
        said, others = (100 * keep[of].mean() / held.size for of in (memory.answers[:old], ~memory.answers[:old]))
        lines.append(
            f"what planted facts say, {memory.answers[:old].sum():,} tokens beyond the window: kept by {said:.0f}% of"
            f" the heads on average, other tokens by {others:.0f}%"
        )
    best = np.argsort(-keep, kind="stable")[:_TOKENS]
    lines.append(f"kept by most of the {held.size} heads, beyond the window of {memory.window}:")
    return "\n".join(lines + [f"  {keep[i]:>4}  position {i:>5}  {memory.labels[i]}" for i in best.tolist()])


def draw(memory: Memory, path: str | os.PathLike) -> None:
    """Writes a PNG: the keys that every head keeps (rows: layer by layer, heads from top to bottom), and the entries
    that the heads of a layer hold on average as the text goes on.

    Raises AtomError when the file cannot be written.
    """
    from matplotlib import colors
    from matplotlib.patches import Patch

    layers, heads, t = memory.evict.shape
    height = min(14.0, max(2.0, 0.09 * layers * heads))
    sizes = {"figsize": (12, height + 4), "height_ratios": (height, 3)}
    with picture.drawn(path, nrows=2, sharex=True, **sizes) as (_, (top, bottom)):
        state = np.where(memory.gone, 0, np.where(memory.evict, 1, 2)).reshape(layers * heads, t)
        shades = colors.ListedColormap([_GONE, _WAITS, _KEPT])
        extent = (0, t, layers * heads, 0)
        top.imshow(state, cmap=shades, vmin=0, vmax=2, aspect="auto", interpolation="nearest", extent=extent)
        every = max(1, layers // 16)
        top.set_yticks(np.arange(0, layers, every) * heads + heads / 2, [f"{i}" for i in range(0, layers, every)])
        for i in range(1, layers):
            top.axhline(i * heads, color="grey", linewidth=0.4)
        top.set_ylabel(f"layer ({heads} heads each)")
        names = ((_KEPT, "kept"), (_WAITS, "leaves with the window"), (_GONE, "evicted"))
        handles = [Patch(facecolor=c, edgecolor="grey", label=text) for c, text in names]
        if memory.answers is not None:
            at = np.flatnonzero(memory.answers) + 0.5
            marks = {"color": _FACT, "markersize": 4, "clip_on": False, "label": "what facts say"}
            handles += top.plot(at, np.zeros(len(at)), "v", **marks)
        top.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, frameon=False)
        held = memory.held
        top.set_title(f"{held.mean():,.0f} of {t:,} entries per head ({held.min():,} to {held.max():,})", loc="left")
        _curves(bottom, memory)


def _curves(ax: Any, memory: Memory) -> None:
    """Entries held over the position, one line per layer."""
    from matplotlib import cm, colors

    layers, _, t = memory.evict.shape
    scale = cm.ScalarMappable(colors.Normalize(0, max(1, layers - 1)), "viridis")
    x = np.arange(t) + 0.5
    ax.plot(x, np.arange(1, t + 1), color="grey", linestyle=":", linewidth=1)
    ax.annotate("all", (t, t), xytext=(-4, 0), textcoords="offset points", ha="right", va="top", color="grey")
    for i, line in enumerate(memory.over_time().mean(axis=1)):
        ax.plot(x, line, color=scale.to_rgba(i), linewidth=1)
    ax.set(xlabel="position (tokens)", ylabel="entries held", xlim=(0, t), ylim=(0, None))
    ax.grid(alpha=0.25)
    ax.figure.colorbar(
        scale, ax=ax, label="layer", ticks=np.unique(np.linspace(0, layers - 1, min(layers, 5)).astype(int))
    )
