"""What fits in closed form share: a ridge regression on rows of text, and one threshold for all layers and heads.

What is predicted for every layer, key/value head and token, and from what, each fit says itself; a decision falls
where the prediction is under the threshold, so that layers and heads share the budget among themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.attention import Tokens
from atom_jax.typing import AtomError, Batch

TARGETS = ("attention", "loss", "output")
# Queries that a token needs after it (and its window) to count in the fit.
LEAST_QUERIES = 64
# Rows are as many of these tokens.
BLOCK = 128


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """target: "attention", log of the largest attention that a query after the window pays to the key; "loss", log of
        the squared change of log-likelihood (of tokens drawn from the model) with the key's weight in attention (both
        of evictors); "output", log of the squared error of attention's output (of merging, `dmc_fit`).
    windows: rows of text for the regression; 0: the decisions stay as they are, but for the threshold.
    calibration: rows for each adjustment of the threshold.
    ridge: regularisation as a share of the mean diagonal. steepness: decision logit per unit of what is predicted.
    entries: keys that a head should hold on average after a document, sinks and window included.
    """

    target: str = "attention"
    windows: int = 16
    calibration: int = 4
    ridge: float = 1e-3
    steepness: float = 4.0
    entries: int = 512
    seed: int = 0

    def __post_init__(self):
        config.check(
            self, windows=(0, 2**20), calibration=(1, 2**20), ridge=(0, 1e6), steepness=(0, 1e6),
            entries=(1, 2**31 - 1), seed=(0, 2**31 - 1),
        )  # fmt: skip
        if self.target not in TARGETS:
            raise AtomError(f"fit.target: expected one of {', '.join(TARGETS)}, got {self.target!r}")


def gathered(
    sums_of: Callable[[Batch, int], dict[str, jax.Array]],
    rows: Iterable[Batch],
    cfg: TransformerConfig,
    how: FitConfig,
    say: Callable[[str], None],
) -> dict[str, np.ndarray] | None:
    """The sums over `how.windows` rows, of what `sums_of` says of each and its number; None: no rows. Raises
    AtomError where no document is long enough for any token to count."""
    sums = None
    for number in range(how.windows):
        new = sums_of(take(rows), number)
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        say(f"fit: {number + 1} of {how.windows} rows")
    if sums is not None and not np.asarray(sums["xx"])[0, -1, -1]:
        least = cfg.memory.sinks + cfg.memory.window + LEAST_QUERIES
        raise AtomError(f"fit: no document of the data is longer than {least} tokens, as it takes")
    return jax.device_get(sums)


def solve(sums: dict[str, np.ndarray], ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of a prediction, float64, from sums over tokens for every layer: of the d features common to all heads
    (xx [l, d, d]; the last one is constant), of the f of single heads (oo [l, h, f, f]), of both (xo [l, h, d, f]),
    and with the target (xy [l, h, d], oy [l, h, f]). Returns those of the features: [l, d - 1, h], constant [l, h],
    [l, f, h]."""
    layers, heads, d = sums["xy"].shape
    out = np.zeros((layers, d + sums["oy"].shape[2], heads))
    for i in range(layers):
        for j in range(heads):
            xx, xo, oo = (
                np.asarray(sums[n][at], np.float64) for n, at in (("xx", i), ("xo", (i, j)), ("oo", (i, j)))
            )
            a = np.block([[xx, xo], [xo.T, oo]])
            b = np.concatenate([sums["xy"][i, j], sums["oy"][i, j]])
            out[i, :, j] = np.linalg.solve(a + ridge * np.trace(a) / len(a) * np.eye(len(a)), b)
    return out[:, : d - 1], out[:, d - 1], out[:, d:]


def thresholds(memory: Any, t: int) -> int:
    """How many thresholds are moved by rows of t tokens: that of all tokens, and that of those beyond
    `DMS.beyond`."""
    return 2 if 0 < getattr(memory, "beyond", 0) < t else 1


def calibrate(
    params: Any, cfg: TransformerConfig, rows: Iterable[Batch], how: FitConfig, say: Callable[[str], None],
    first: int, rest: int, shifted: Callable[[Any, float], Any],
    weight: Callable[[np.ndarray], np.ndarray] = np.ones_like,
) -> Any:  # fmt: skip
    """Moves the threshold of all heads together until `how.entries` keys per head are left after a document, on
    average.

    Three times, because what is decided in one layer changes the decisions of those above. first, rest: tokens at the
    start and the end of a document about which nothing is decided. shifted: parameters whose decision logits are
    larger by a number, times the weight f64 [n] (0 or more) of the position i32 [n] of the token.
    """
    rows = iter(rows)
    for _ in range(3):
        logits, places, held = [], [], []
        # Of all documents: tokens that stay in any case, and those about which is decided.
        sure = open_ = documents = 0
        for _ in range(how.calibration):
            batch = next(rows)
            z, entries = _logits(params, batch, cfg=cfg)
            tokens = Tokens(batch.positions, batch.segments)
            real = np.asarray(tokens.segments) > 0
            decided = real & np.asarray((tokens.positions >= first) & (tokens.left >= rest))
            logits.append(np.moveaxis(np.asarray(z), 1, 2)[:, :, decided].reshape(-1, int(decided.sum())))
            places.append(np.asarray(tokens.positions)[decided])
            held.append(float(entries))
            documents += int(np.asarray(batch.segments).max(1).sum())
            open_ += int(decided.sum())
            sure += int(real.sum()) - int(decided.sum())
        kept = (how.entries * documents - sure) / max(open_, 1)
        if not 0 < kept < 1:
            window = f"a window of {cfg.memory.window} and " if cfg.memory.window else ""
            mean = (sure + open_) / max(documents, 1)
            raise AtomError(f"fit.entries: {how.entries} is impossible with {window}documents of {mean:.0f} tokens")
        move = _move(np.concatenate(logits, axis=1), weight(np.concatenate(places).astype(np.float64)), kept)
        params = shifted(params, move)
        say(f"fit: {np.sum(held) / documents:.0f} entries held, threshold moved by {move:.3f}")
    return params


def _move(logits: np.ndarray, weights: np.ndarray, kept: float) -> float:
    """What is added, times `weights` [t], to decision logits [n, t], so that a share `kept` of all is negative."""
    moved = weights > 0
    fixed = np.count_nonzero(logits[:, ~moved] <= 0)
    share = (kept * logits.size - fixed) / max(logits[:, moved].size, 1)
    if not 0 < share < 1:
        there = f"{fixed / logits.size:.0%} of the keys stay for which no slope counts"
        raise AtomError(f"fit.entries: {kept:.0%} of all keys would have to stay, but {there}")
    return -float(np.quantile(logits[:, moved] / weights[moved], share))


@jax.jit(static_argnames="cfg")
def _logits(params: Any, batch: Batch, *, cfg: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """Decision logits f32 [l, b, h, t] with decisions on, and the number of keys left at the ends of documents,
    summed over them and averaged over layers and heads."""
    _, _, aux = transformer.hidden(params, batch, cfg=cfg)
    return aux["evict_logits"], jnp.sum(jnp.mean(aux["occupancy"].astype(jnp.float32), axis=(0, 2)))


def learned(params: Any, cfg: TransformerConfig, new: dict[str, jax.Array]) -> Any:
    """Parameters in which `new` takes the place of what the policy has learned under these names."""
    attn, name = params["layers"]["attn"], cfg.memory.learned_as
    return {**params, "layers": {**params["layers"], "attn": {**attn, name: {**attn[name], **new}}}}


def take(rows: Any) -> Batch:
    """The next rows. Raises AtomError for those that blocks do not divide."""
    batch = next(rows)
    if batch.ids.shape[1] % BLOCK:
        raise AtomError(f"fit: rows of {batch.ids.shape[1]} tokens; expected a multiple of {BLOCK}")
    return batch
