"""Hypernetworks for embeddings: the row of any token is made from the source model's rows of the pieces that its
bytes are cut into (Minixhofer et al., 2024, "Zero-Shot Tokenizer Transfer", 2405.07883).

Dimension letters: v rows of the source's table, n planes (input; output, where that is another table), d width, m
tokens, l pieces of a token ("surface"), c width inside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config, params
from atom_jax.nn.linear import project
from atom_jax.nn.norm import layer_norm
from atom_jax.params import ParamSpec, Tree, normal, ones, zeros
from atom_jax.typing import AtomError

# Tokens whose rows are made at once.
_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Hypernet:
    """What all kinds have in common. n, d: planes and width of the source's table. length: most pieces of a token."""

    n: int
    d: int
    length: int = 7

    def __post_init__(self):
        size = (1, 2**31 - 1)
        sizes = ("n", "d", "length", "n_layers", "widen", "width", "heads", "d_ff", "positions")
        config.check(self, **dict.fromkeys(sizes, size), extra=(0, size[1]), alpha=(0, 1e6))

    def spec(self) -> Tree:
        """ParamSpecs."""
        raise NotImplementedError

    def apply(self, p: Tree, table_vnd: jax.Array, surface: jax.Array, real: jax.Array) -> jax.Array:
        """Rows f32 [m, n, d]. surface: i32 [m, l] of source tokens; real: bool [m, l], pieces that there are."""
        raise NotImplementedError

    def begun(self, p: Tree, table: np.ndarray) -> Tree:
        """Initial parameters with scales that fit the source's table, f32 [v, n, d]."""
        raise NotImplementedError

    def rows(self, p: Tree, table: np.ndarray, surface: np.ndarray, real: np.ndarray) -> np.ndarray:
        """As `apply`, block by block, on the host."""
        make, device = jax.jit(self.apply), jnp.asarray(table, jnp.float32)
        out = [np.zeros((0, self.n, self.d), np.float32)]
        for at in range(0, len(surface), _BLOCK):
            part, there = surface[at : at + _BLOCK], real[at : at + _BLOCK]
            pad = ((0, min(_BLOCK, len(surface)) - len(part)), (0, 0))
            made = make(p, device, np.pad(part, pad), np.pad(there, pad))
            out.append(np.asarray(made)[: len(part)])
        return np.concatenate(out)


@config.register
@dataclasses.dataclass(frozen=True)
class Projector(Hypernet):
    """tokenkit's network, and the one that is trained here: MLPs over each piece, whose mean (or first) is added to
    that of the pieces themselves, `alpha` / sqrt(d) times. Before training it is that mean, so FVT.

    n_layers, widen: MLPs, and how much wider than the rows (planes side by side) they are inside. mean: pieces are
    averaged; else the first counts. The branch with attention is left out: as published it can't be run. Between the
    scales of input and output, which are frozen, rows have a deviation of sqrt(2 / d) in every channel.
    """

    n_layers: int = 1
    widen: int = 2
    mean: bool = True
    alpha: float = 1.0

    def spec(self) -> Tree:
        """See Hypernet."""
        c, inner = self.n * self.d, self.widen * self.n * self.d
        layer = {"up": _dense(c, inner), "down": _dense(inner, c), "norm": _norm(c)}
        return {
            "in_scale": _scale(self.n, self.d),
            "positions": ParamSpec((self.length, c), (None, None), normal(c**-0.5)),
            "layers": params.stack(layer, self.n_layers),
            "out": _dense(c, c, zeros),
            "out_scale": _scale(self.n, self.d),
        }

    def apply(self, p: Tree, table_vnd: jax.Array, surface: jax.Array, real: jax.Array) -> jax.Array:
        """See Hypernet."""
        x_mlnd = _scaled(p["in_scale"], table_vnd[surface])
        x_mlc = x_mlnd.reshape(*surface.shape, self.n * self.d)

        def layer(h: jax.Array, q: Tree) -> tuple[jax.Array, None]:
            y = _through(q["down"], jax.nn.gelu(_through(q["up"], h), approximate=False))
            return layer_norm(h + y, **q["norm"], eps=1e-12), None

        h_mlc, _ = jax.lax.scan(layer, x_mlc + _wide(p["positions"], x_mlc), p["layers"])
        made = self._pooled(x_mlc, real) + self.alpha * self.d**-0.5 * _through(p["out"], self._pooled(h_mlc, real))
        return _scaled(p["out_scale"], made.reshape(-1, self.n, self.d))

    def begun(self, p: Tree, table: np.ndarray) -> Tree:
        """See Hypernet."""
        mean, deviation = table.mean(0), np.maximum(table.std(0), 1e-8)
        w = math.sqrt(2 / self.d) / deviation
        scales = {"in_scale": (w, -mean * w), "out_scale": (1 / w, mean)}
        return p | {name: {"w": jnp.asarray(w), "b": jnp.asarray(b)} for name, (w, b) in scales.items()}

    def _pooled(self, x_mlc: jax.Array, real: jax.Array) -> jax.Array:
        if not self.mean:
            return x_mlc[:, 0]
        total = jnp.sum(jnp.where(real[..., None], x_mlc, 0.0), axis=1)
        return total / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)


@config.register
@dataclasses.dataclass(frozen=True)
class Zett(Hypernet):
    """The network of the paper: an encoder as RoBERTa's over the pieces, whose first state becomes the row, by a head
    for either plane.

    width, n_layers, heads, d_ff: of the encoder. extra: rows of its own, of pieces beyond the source's table.
    biased: it makes a bias of the logit too (`bias`). positions: rows of the table of positions.
    """

    width: int = 512
    n_layers: int = 3
    heads: int = 8
    d_ff: int = 1024
    extra: int = 0
    biased: bool = False
    positions: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            raise AtomError(f"width {self.width} does not divide by {self.heads} heads")

    def spec(self) -> Tree:
        """See Hypernet."""
        c, wide = self.width, self.n * self.d
        block = {"up": _dense(c, 2 * c), "down": _dense(2 * c, c), "norm": _norm(c)}
        layer = {name: _dense(c, c) for name in ("q", "k", "v", "o")}
        layer |= {"attn_norm": _norm(c), "up": _dense(c, self.d_ff), "down": _dense(self.d_ff, c), "norm": _norm(c)}
        heads = {f"plane_{i}": {"block": block, "out": _dense(c, self.d)} for i in range(self.n)}
        out = {
            "in_scale": _scale(self.n, self.d),
            "own": ParamSpec((max(self.extra, 1), wide), (None, None), normal(0.02)),
            "project": {"in": _dense(wide, c), "block": block},
            "positions": ParamSpec((self.positions, c), (None, None), normal(0.02)),
            "kind": ParamSpec((1, c), (None, None), normal(0.02)),
            "embed_norm": _norm(c),
            "layers": params.stack(layer, self.n_layers),
            "heads": heads,
            "out_scale": _scale(self.n, self.d),
        }
        return out | ({"bias": _dense(c, 1)} if self.biased else {})

    def apply(self, p: Tree, table_vnd: jax.Array, surface: jax.Array, real: jax.Array) -> jax.Array:
        """See Hypernet."""
        h_mc = self._first(p, table_vnd, surface, real)
        planes = [_through(q["out"], _block(q["block"], h_mc)) for _, q in sorted(p["heads"].items())]
        return _scaled(p["out_scale"], jnp.stack(planes, axis=1))

    def bias(self, p: Tree, table_vnd: jax.Array, surface: jax.Array, real: jax.Array) -> jax.Array:
        """What is added to the logits of tokens, f32 [m]; with `biased`."""
        return _through(p["bias"], self._first(p, table_vnd, surface, real))[:, 0]

    def begun(self, p: Tree, table: np.ndarray) -> Tree:
        """The scale of the output is set as what is made of 2,048 tokens needs it."""
        deviation = np.maximum(table.std(0), 1e-8)
        p = p | {
            "in_scale": {"w": jnp.asarray(0.02 / deviation), "b": jnp.asarray(-table.mean(0) * 0.02 / deviation)}
        }
        at = np.linspace(0, len(table) - 1, min(len(table), 2048)).astype(np.int32)
        surface = np.pad(at[:, None], ((0, 0), (0, self.length - 1)))
        made = self.rows(p, table, surface, np.arange(self.length)[None] < np.ones((len(at), 1)))
        w = table.std(0) / (made.std(0) + 1e-8)
        return p | {"out_scale": {"w": jnp.asarray(w), "b": jnp.asarray(table.mean(0) - (made * w).mean(0))}}

    def _first(self, p: Tree, table_vnd: jax.Array, surface: jax.Array, real: jax.Array) -> jax.Array:
        """The encoder's state f32 [m, c] at the first piece."""
        v, wide = len(table_vnd), self.n * self.d
        x_mlc = _scaled(p["in_scale"], table_vnd[jnp.minimum(surface, v - 1)]).reshape(*surface.shape, wide)
        own_mlc = p["own"][jnp.clip(surface - v, 0, len(p["own"]) - 1)]
        x_mlc = jnp.where((surface >= v)[..., None], own_mlc, x_mlc)
        x_mlc = _block(p["project"]["block"], _through(p["project"]["in"], x_mlc))
        x_mlc = x_mlc + _wide(p["positions"][: surface.shape[1]], x_mlc) + _wide(p["kind"], x_mlc)
        x_mlc = layer_norm(x_mlc, **p["embed_norm"], eps=1e-5)
        masked = jnp.where(real, 0.0, -jnp.inf)[:, None, None]
        h_mlc, _ = jax.lax.scan(lambda h, q: (self._layer(q, h, masked), None), x_mlc, p["layers"])
        return h_mlc[:, 0]

    def _layer(self, q: Tree, h_mlc: jax.Array, masked: jax.Array) -> jax.Array:
        cut = (*h_mlc.shape[:2], self.heads, self.width // self.heads)
        query, key, value = (_through(q[name], h_mlc).reshape(cut) for name in ("q", "k", "v"))
        scores = jnp.einsum("mlhk,mshk->mhls", query, key) * cut[-1] ** -0.5
        mixed = jnp.einsum("mhls,mshk->mlhk", jax.nn.softmax(scores + masked, axis=-1), value).reshape(h_mlc.shape)
        h_mlc = layer_norm(h_mlc + _through(q["o"], mixed), **q["attn_norm"], eps=1e-5)
        inner = jax.nn.gelu(_through(q["up"], h_mlc), approximate=False)
        return layer_norm(h_mlc + _through(q["down"], inner), **q["norm"], eps=1e-5)


def surfaces(cuts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of pieces, the first `length` of each, as (i32 [m, length], bool [m, length], those that there are)."""
    surface = np.zeros((len(cuts), length), np.int32)
    sizes = np.array([min(len(cut), length) for cut in cuts], np.int64)
    for row, cut in zip(surface, cuts):
        row[: min(len(cut), length)] = cut[:length]
    return surface, np.arange(length)[None] < sizes[:, None]


def _dense(inputs: int, outputs: int, init: Any = None) -> Tree:
    w = ParamSpec((inputs, outputs), (None, None), init or normal(inputs**-0.5))
    return {"w": w, "b": ParamSpec((outputs,), (None,), zeros)}


def _norm(c: int) -> Tree:
    return {"weight": ParamSpec((c,), (None,), ones), "bias": ParamSpec((c,), (None,), zeros)}


def _scale(n: int, d: int) -> Tree:
    return {"w": ParamSpec((n, d), (None, None), ones), "b": ParamSpec((n, d), (None, None), zeros)}


def _wide(x: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.broadcast_to(x, like.shape)


def _scaled(q: Tree, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) * _wide(q["w"], x) + _wide(q["b"], x)


def _through(q: Tree, x: jax.Array) -> jax.Array:
    y = project(x, q["w"])
    return y + _wide(q["b"], y)


def _block(q: Tree, x: jax.Array) -> jax.Array:
    """Two layers with a bypass."""
    gelu = functools.partial(jax.nn.gelu, approximate=True)
    return layer_norm(gelu(_through(q["down"], gelu(_through(q["up"], x)))) + x, **q["norm"], eps=1e-6)
