"""What a policy (`policy.Policy`) and a model's attention agree on: `Call`, the new tokens of a layer, and `Layer`,
the memory that reads them: that of one attention layer, or of several equal ones, stacked in a `memory.Stack`.

States are immutable: the memory of before is a fork, where it is not donated.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import params
from atom_jax.kvcache.rows import put_rows
from atom_jax.nn.attention import Tokens


class Sizes(NamedTuple):
    """Of a model and a batch: layers that have the policy, rows, key/value heads, query heads per key/value head,
    head size; the dtype of keys and values; and RoPE's (theta, scaling) in full-attention layers."""

    layers: int
    b: int
    h: int
    g: int
    k: int
    dtype: Any
    rope: tuple = (10000.0, None)


@struct.dataclass
class Call:
    """t new tokens of every row, for one layer.

    q: [b, h, g, t, k], k, v: [b, h, t, k], turned by RoPE. tokens: where they stand; padding (segment 0) comes last.
    length: i32 [b], tokens that the row had before.
    k_plain: [b, h, t, k], keys before RoPE. ids: i32 [b, t] or None. said: what the policy's `prepare` says of every
    token, a pytree of arrays [b, h, t, ...], or None. evidence: f32 [b, t, c], what the layers below found about
    tokens, or None (`Policy.evidence`). learned: the policy's parameters of this layer, or None.
    derived: what its `derive` made of the layer, or None. layer: i32 [], number of the layer in the model. mode: how
    decisions are made where there is no memory (`policy.Mode`).
    window: of a sliding layer, else None. fresh: nothing is stored yet. reading: how often the tokens were read
    before. rope: as in Sizes; rotary: channels of every head that it turns. All five are static.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    tokens: Tokens
    length: jax.Array
    k_plain: Any = None
    ids: Any = None
    said: Any = None
    evidence: Any = None
    learned: Any = None
    derived: Any = None
    layer: Any = 0
    mode: Any = None
    window: int | None = struct.field(pytree_node=False, default=None)
    fresh: bool = struct.field(pytree_node=False, default=False)
    reading: int = struct.field(pytree_node=False, default=0)
    rope: tuple = struct.field(pytree_node=False, default=(10000.0, None))
    rotary: int | None = struct.field(pytree_node=False, default=None)

    @property
    def real(self) -> jax.Array:
        """bool [b, t]: tokens that are not padding."""
        return self.tokens.segments > 0

    @property
    def after(self) -> jax.Array:
        """i32 [b]: tokens of every row once these are read."""
        return self.length + jnp.sum(self.real, axis=1, dtype=jnp.int32)

    def first(self, count_b: jax.Array) -> Call:
        """The same call in which only the first `count_b` tokens of every row are real."""
        offsets = jnp.arange(self.q.shape[3])[None]
        segments = jnp.where(offsets < count_b[:, None], self.tokens.segments, 0)
        return self.replace(tokens=self.tokens.replace(segments=segments))

    def one(self, i: jax.Array) -> Call:
        """The call with token i of every row alone, those before it being read."""
        cut = lambda axis: lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis)  # noqa: E731
        tokens, ids, evidence = jax.tree.map(cut(1), (self.tokens, self.ids, self.evidence))
        k, v, k_plain, said = jax.tree.map(cut(2), (self.k, self.v, self.k_plain, self.said))
        length = jnp.minimum(self.length + i, self.after)
        return self.replace(
            q=cut(3)(self.q), k=k, v=v, k_plain=k_plain, said=said, evidence=evidence, tokens=tokens, ids=ids,
            length=length, fresh=False,
        )  # fmt: skip


class Layer:
    """The memory of one attention layer: a pytree of arrays with rows in front, `k` [b, h, ...] among them.

    Methods that run on the host (`grow`, `rows`) take stacked layers, too; the others are for `jax.vmap`.
    """

    # The configuration that made it; None for the dense cache and the ring.
    policy: ClassVar[Any] = None
    # What free places hold, by array; 0 in others.
    free: ClassVar[dict[str, float]] = {}
    k: jax.Array

    def extend(self, call: Call) -> tuple[jax.Array, Layer]:
        """Attention [b, h, g, t, k] of the new tokens to what is stored and to each other (no future ones), and the
        memory afterwards. A padded token changes nothing; its output is meaningless."""
        raise NotImplementedError

    def passing(self, call: Call) -> tuple[jax.Array, Layer, jax.Array]:
        """As `extend`, with the evidence for the layer above; of policies whose layers pass any on."""
        raise NotImplementedError

    def attend(self, call: Call) -> jax.Array:
        """The outputs of reading the new tokens one after another; nothing changes."""
        return self._in_order(call)[0]

    def store(self, call: Call) -> Layer:
        """The memory after reading the new tokens one after another: `attend`, then this with the tokens that were
        accepted (`Call.first`), verifies drafts."""
        return self._in_order(call)[1]

    def _in_order(self, call: Call) -> tuple[jax.Array, Layer]:
        stepwise = self.policy is not None and self.policy.stepwise
        return self.one_by_one(call) if stepwise else self.extend(call)

    def one_by_one(self, call: Call) -> tuple[jax.Array, Layer]:
        """As `extend`, in as many calls as there are tokens."""

        def step(layer: Layer, i: jax.Array) -> tuple[Layer, jax.Array]:
            out, layer = layer.extend(call.one(i))
            return layer, out[..., 0, :]

        layer, out = jax.lax.scan(step, self, jnp.arange(call.q.shape[3]))
        return jnp.moveaxis(out, 0, 3), layer

    def full(self, length_b: jax.Array, more: int = 1) -> jax.Array:
        """bool [b]: rows of these lengths whose next `more` tokens, one after another, might not fit. By default of
        a layer with a slot for every token."""
        return length_b + more > self.k.shape[-2]

    def grow(self, length_b: np.ndarray, more: int) -> Layer:
        """The same memory with room for at least `more` further tokens per row: itself where there is room, unless
        the policy can make it smaller. Runs on the host; arrays may change their shapes."""
        raise NotImplementedError

    def grow_singly(self, length_b: np.ndarray, more: int) -> Layer:
        """As `grow`, for tokens that are read one after another."""
        return self.grow(length_b, more)

    def fit(self, length_b: np.ndarray, more: int) -> Layer:
        """As `grow_singly`; smaller where that is enough, since every copy takes as much. Runs on the host."""
        return self.grow_singly(length_b, more)

    def trim(self) -> Layer:
        """The same memory no larger than what is held and some tokens more, after a prompt. Runs on the host."""
        return self

    def rows(self, index_b: jax.Array, axis: int = 0) -> Layer:
        """The memory of these rows, i32 [n], some perhaps repeatedly. axis: 1 in stacked layers. Runs on the host."""
        return jax.tree.map(lambda x: jnp.take(x, index_b, axis=axis), self)

    def put(self, index_b: np.ndarray, other: Layer, axis: int = 0) -> Layer:
        """The memory whose rows `index_b`, i32 [n], are those of `other`, a memory of n rows in buffers of any
        size; a row of `other` whose index is none of this memory's is left out. Uses this memory up. axis: as for
        `rows`. Runs on the host."""
        return put_rows(self, other, index_b, axis, self.free)

    def sized(self, slots: int) -> Layer:
        """The same memory with so many slots, where it is one for every token and nothing else; by default as it is.
        Runs on the host."""
        return self

    def row_bytes(self, tokens: int) -> int:
        """Bytes that one row of so many tokens takes, of the shapes of a layer that was made for it, without the
        pages that rows share. Runs on the host."""
        return params.nbytes(self)

    def held(self, length_b: jax.Array) -> jax.Array:
        """i32 [b, h]: entries stored. By default every token."""
        return jnp.broadcast_to(length_b[:, None], self.k.shape[:2])

    def read(self, length_b: jax.Array) -> jax.Array:
        """f32 [b, h]: entries that a query reads now (page statistics count as the entries they cost)."""
        return self.held(length_b).astype(jnp.float32)


def stack_layers(layer: Any, n: int) -> Any:
    """n copies of an empty layer, on a new leading axis."""
    return jax.tree.map(lambda x: jnp.repeat(x[None], n, axis=0), layer)
