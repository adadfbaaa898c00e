"""Kinds of layers that have a memory of their own (see `mixers`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from atom_jax.kvcache.knn import KnnLayer
from atom_jax.kvcache.landmark import LandmarkLayer
from atom_jax.kvcache.policy import Policy
from atom_jax.models.flops import keys
from atom_jax.models.mixer import Heads, Mixer, SelfAttention, Width
from atom_jax.nn import fast_weights, knn_attention, landmark, neural_memory, ngrams, product_keys, slots
from atom_jax.params import ParamSpec, Tree, normal
from atom_jax.typing import AtomError


class Landmark(SelfAttention):
    """l and L. every: positions of a block; nearest: blocks that are read besides the own one, 0: all."""

    def __init__(self, mlp: bool = False, every: int = landmark.EVERY, nearest: int = 0):
        super().__init__(mlp)
        self.every, self.nearest = every, nearest

    def check(self, width: Width, where: str) -> None:
        """As of attention, without a window."""
        super().check(width, where)
        if width.window >= 0:
            raise AtomError(f"window: landmark attention in {where} has none, got {width.window}")

    def spec(self, width: Width, out_scale: float) -> Tree:
        """With a projection to the keys of landmarks."""
        d, n, k = width.d, width.heads, width.head_dim
        mark = ParamSpec((d, n, k), ("embed", "heads", None), normal(width.std))
        return super().spec(width, out_scale) | {"mark": mark}

    def kind(self, width: Width, policy: Policy | None) -> None:
        """All layers are alike, and have no cache policy."""
        return None

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> LandmarkLayer:
        """Keys and values of all before, and landmarks."""
        return LandmarkLayer.empty(b, width.heads, capacity, width.head_dim, self.every, self.nearest, dtype)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `landmark.layer`."""
        y_btd, state = landmark.layer(
            p, y_btd, context.tokens, state, context.length, rotary=width.rotary, eps=width.eps, every=self.every,
            nearest=self.nearest,
        )  # fmt: skip
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """Those of attention, and scores of landmarks."""
        return super().operations(width, positions) * (1 + 0.5 / self.every)

    def describe(self, width: Width) -> str:
        """Heads, and what they read."""
        read = f", of which {self.nearest} are read" if self.nearest else ""
        return f"{width.heads} heads with landmarks of blocks of {self.every}{read}"


class Slots(SelfAttention):
    """s and S. near: newest positions that are seen as they are; slots: means of older ones; alike: the cosine from
    which on a key joins one."""

    def __init__(
        self, mlp: bool = False, near: int = slots.NEAR, count: int = slots.SLOTS, alike: float = slots.ALIKE
    ):
        super().__init__(mlp)
        self.near, self.count, self.alike = near, count, alike

    def check(self, width: Width, where: str) -> None:
        """As of attention, without a window."""
        super().check(width, where)
        if width.window >= 0:
            raise AtomError(f"window: layers of slots in {where} have their own, got {width.window}")

    def kind(self, width: Width, policy: Policy | None) -> None:
        """All layers are alike, and have no cache policy."""
        return None

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> slots.SlotState:
        """States of a fixed size."""
        return slots.SlotState.empty(b, width.heads, width.head_dim, self.near, self.count, dtype)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `slots.layer`."""
        y_btd, state = slots.layer(
            p, y_btd, context.tokens, state, rotary=width.rotary, eps=width.eps, near=self.near, slots=self.count,
            alike=self.alike,
        )  # fmt: skip
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """Scores and weighted sums, and cosines of the newest positions with all slots."""
        return positions * width.d * (4 * (self.near + self.count) + 2 * (self.near + 1) * self.count)

    def describe(self, width: Width) -> str:
        """Heads, and what they see."""
        return f"{width.heads} heads that see {self.near} positions and {self.count} slots"


class KnnAttention(SelfAttention):
    """e and E. near: newest positions that are seen as they are; size: older ones in memory; nearest: those of them
    that a query reads."""

    def __init__(
        self, mlp: bool = False, near: int = knn_attention.NEAR, size: int = knn_attention.SIZE,
        nearest: int = knn_attention.NEAREST,
    ):  # fmt: skip
        super().__init__(mlp)
        self.near, self.size, self.nearest = near, size, nearest

    def check(self, width: Width, where: str) -> None:
        """As of attention, without a window."""
        super().check(width, where)
        if width.window >= 0:
            raise AtomError(f"window: layers of kNN attention in {where} have their own, got {width.window}")

    def spec(self, width: Width, out_scale: float) -> Tree:
        """With the gates and factors of heads."""
        return super().spec(width, out_scale) | knn_attention.layer_spec(width.heads)

    def kind(self, width: Width, policy: Policy | None) -> None:
        """All layers are alike, and have no cache policy."""
        return None

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> KnnLayer:
        """A ring of keys and values."""
        sizes = (b, width.heads, capacity, width.head_dim)
        return KnnLayer.empty(*sizes, dtype, self.near + self.size, self.near, self.nearest)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `knn_attention.layer`."""
        y_btd, state = knn_attention.layer(
            p, y_btd, context.tokens, state, context.length, rotary=width.rotary, eps=width.eps, near=self.near,
            size=self.size, nearest=self.nearest, fresh=context.fresh,
        )  # fmt: skip
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """Scores and weighted sums of the newest positions and of neighbours, and scores of all in memory."""
        near, all_seen = (keys(positions, n) for n in (self.near, self.near + self.size))
        read = keys(positions, self.near + self.nearest)
        return positions * width.d * (4 * read + 2 * (all_seen - near))

    def describe(self, width: Width) -> str:
        """Heads, and what they see."""
        older = f"the {self.nearest} nearest of {self.size:,} older ones"
        return f"{width.heads} heads that see {self.near} positions and {older}"


class FastWeights(Heads):
    """f and F."""

    def spec(self, width: Width, out_scale: float) -> Tree:
        """As of `fast_weights.layer`."""
        return fast_weights.layer_spec(width.d, width.heads, width.std, out_scale)

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> jax.Array:
        """A matrix per head."""
        return jnp.zeros((b, width.heads, width.head_dim, width.head_dim), jnp.float32)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `fast_weights.layer`."""
        y_btd, state = fast_weights.layer(p, y_btd, context.tokens, state)
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """Products inside a chunk, the triangular system, and those with the matrices."""
        chunk = min(fast_weights.CHUNK, positions)
        return positions * width.d * (7 * chunk + 6 * width.head_dim)

    def describe(self, width: Width) -> str:
        """Sizes of the matrices."""
        return f"{width.heads} fast weights of {width.head_dim} x {width.head_dim}"


class NeuralMemory(Heads):
    """n and N."""

    exact = True

    def spec(self, width: Width, out_scale: float) -> Tree:
        """As of `neural_memory.layer_spec`, with networks of two matrices."""
        return neural_memory.layer_spec(width.d, width.heads, width.std, out_scale)

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> neural_memory.NeuralState:
        """Weights of every row."""
        return neural_memory.NeuralState.empty(b, width.d, width.heads)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `neural_memory.layer`."""
        y_btd, state = neural_memory.layer(p, y_btd, context.tokens, state)
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """The networks for what is looked up, twice more, and for what is stored, with their gradients."""
        return positions * width.d * 4 * neural_memory.WIDER * width.head_dim * 5

    def describe(self, width: Width) -> str:
        """Sizes of the networks."""
        k = width.head_dim
        return f"{width.heads} neural memories of {k} x {neural_memory.WIDER * k}"


class ProductKeys(Mixer):
    """k. keys: per half; the table has the square of that. heads: what looks something up; nearest: how much each."""

    def __init__(
        self, keys: int = product_keys.KEYS, heads: int = product_keys.HEADS, nearest: int = product_keys.NEAREST
    ):
        super().__init__()
        self.keys, self.heads, self.nearest = keys, heads, nearest

    def spec(self, width: Width, out_scale: float) -> Tree:
        """As of `product_keys.layer_spec`."""
        return product_keys.layer_spec(width.d, width.std, out_scale, self.keys, self.heads)

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> jax.Array:
        """Nothing: positions are read by themselves."""
        return jnp.zeros((b, 0), dtype)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `product_keys.layer`."""
        return product_keys.layer(p, y_btd, self.nearest), state, {}

    def operations(self, width: Width, positions: int) -> float:
        """What is read of the table, in place of all of it, which counts among the matrices."""
        return positions * 2 * width.d * (self.heads * self.nearest - self.keys**2)

    def describe(self, width: Width) -> str:
        """Size of the table."""
        return f"a table of {self.keys**2:,} values, {self.heads * self.nearest} read by each position"


class Ngrams(Mixer):
    """h. tables: how many, and how large."""

    def __init__(self, tables: ngrams.Tables | None = None):
        super().__init__()
        self.tables = tables or ngrams.Tables()

    def spec(self, width: Width, out_scale: float) -> Tree:
        """As of `ngrams.layer_spec`."""
        return ngrams.layer_spec(width.d, self.tables, width.std, out_scale)

    def empty(self, width: Width, b: int, capacity: int, dtype: Any) -> ngrams.NgramState:
        """The latest ids, and inputs of the convolution."""
        return ngrams.NgramState.empty(b, width.d, self.tables, dtype)

    def apply(self, p, x_btd, y_btd, state, kind, width, context, others):
        """As of `ngrams.layer`; of units, by the ids at their marks. Raises AtomError for inputs without ids."""
        if context.ids is None:
            raise AtomError("layout: layers of hashed n-grams (h) read token ids, and this model's inputs have none")
        y_btd, state = ngrams.layer(p, y_btd, context.ids, context.tokens, state, self.tables, width.eps)
        return y_btd, state, {}

    def operations(self, width: Width, positions: int) -> float:
        """What is read of the tables, in place of all of them, which count among the matrices."""
        return positions * 2 * self.tables.channels * (self.tables.count - sum(self.tables.primes))

    def describe(self, width: Width) -> str:
        """Sizes of the tables."""
        t = self.tables
        return f"{t.count} tables of {t.size:,} rows for n-grams of 2 to {t.longest} ids"
