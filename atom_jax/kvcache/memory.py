"""The one protocol between models and their memory: policies, the layers that they make, and the tree of a model.

A policy is a frozen, registered configuration (`policy.Policy`) whose `init` makes `Layer`s: the memory of one
attention layer, or of several equal ones stacked on a leading axis inside a `Stack`. A model's memory is one tree of
`Memory` nodes, which hold layers (and the states of recurrent ones), and whatever else the model keeps of every row;
what is asked of all of it is written here once. Adding a policy is one file and one line in `kvcache/policies.py`.

States are immutable: the memory of before is a fork, where it is not donated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import params
from atom_jax.kvcache.rows import put_rows
from atom_jax.nn.attention import Tokens

# Tokens for which, at least, there is room twice over once a memory grows whose layers differ in size.
SPARE = 32


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
        """bool [b]: rows of these lengths whose next `more` tokens, one after another, might not fit."""
        raise NotImplementedError

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

    def held(self, length_b: jax.Array) -> jax.Array:
        """i32 [b, h]: entries stored."""
        raise NotImplementedError

    def read(self, length_b: jax.Array) -> jax.Array:
        """f32 [b, h]: entries that a query reads now (page statistics count as the entries they cost)."""
        return self.held(length_b).astype(jnp.float32)


@struct.dataclass
class Stack:
    """States of several equal layers (attention's or recurrent ones), stacked on a leading axis."""

    states: Any


@struct.dataclass
class Memory:
    """A node of a model's memory.

    layers: any pytree whose leaves are Stacks, Layers or states of recurrent layers (arrays [b, ...]). length: i32
    [b], tokens (or units) that every row has seen here. parts: whatever else is kept of every row, arrays [b, ...]
    and further nodes. fresh: nothing is stored yet. reading: how often the tokens that come were read before, which a
    policy with several `passes` asks for. Both are static.
    """

    layers: Any
    length: jax.Array
    parts: Any = ()
    fresh: bool = struct.field(pytree_node=False, default=False)
    reading: int = struct.field(pytree_node=False, default=0)


def stack_layers(layer: Any, n: int) -> Any:
    """n copies of an empty layer, on a new leading axis."""
    return jax.tree.map(lambda x: jnp.repeat(x[None], n, axis=0), layer)


def nodes(memory: Memory) -> list[Memory]:
    """This node and all inside it."""
    inside = [x for x in jax.tree.leaves(memory.parts, is_leaf=_is_memory) if _is_memory(x)]
    return [memory, *(node for x in inside for node in nodes(x))]


def each(fn: Callable[..., Memory], memory: Memory, *rest: Memory) -> Memory:
    """The tree with `fn` of every node (and of the same node of `rest`) in its place, the innermost first."""
    deep = lambda x, *others: each(fn, x, *others) if _is_memory(x) else x  # noqa: E731
    parts = jax.tree.map(deep, memory.parts, *(x.parts for x in rest), is_leaf=_is_memory)
    return fn(memory.replace(parts=parts), *rest)


def layers(memory: Memory) -> list[Layer]:
    """The attention layers of all nodes, stacked ones as they are."""
    return [_layer(x) for node in nodes(memory) for x in _states(node)]


def map_layers(fn: Callable[[Layer], Layer], memory: Memory) -> Memory:
    """The tree with `fn` of every attention layer, or stacked ones, in their place."""
    return each(lambda node: _with_layers(fn, node), memory)


def full(memory: Memory, more: int = 1) -> jax.Array:
    """bool [b]: rows whose next `more` tokens, one after another, might not fit somewhere."""
    found = [jnp.any(one, axis=0) for node in nodes(memory) for one in _ask(node, "full", more)]
    return functools.reduce(jnp.logical_or, found, jnp.zeros(memory.length.shape, bool))


def grow(memory: Memory, more: int | Sequence[int] = 1, singly: bool = False) -> Memory:
    """The same memory with room for `more` further tokens per row in every node, or for a number of its own in each
    of `nodes`, which then lie one inside the other: larger only where that is needed, and smaller where a policy can
    make it so. singly: they are read one after another. Runs on the host."""
    numbers = iter([more] * len(nodes(memory)) if isinstance(more, int) else reversed(more))

    def larger(node: Memory) -> Memory:
        length, more = np.asarray(node.length), next(numbers)
        # Every set of sizes is compiled for: layers that hold different numbers of entries grow together, and seldom.
        uneven = any(_shrinks(x) and bool(full.any()) for x, full in zip(_states(node), _ask(node, "full", more)))

        def one(layer: Layer) -> Layer:
            most = 2 * max(more, SPARE) if uneven and _shrinks(layer) else more
            return layer.grow_singly(length, most) if singly else layer.grow(length, most)

        return _with_layers(one, node)

    return each(larger, memory)


def fit(memory: Memory, more: int) -> Memory:
    """The memory with room for `more` further tokens per row, which are read one after another, and no more than that
    where a policy evicts: before it is copied (`rows`, `fork`). Runs on the host."""
    return each(lambda node: _with_layers(lambda x: x.fit(np.asarray(node.length), more), node), memory)


def trim(memory: Memory) -> Memory:
    """The memory no larger than what is retained, and some tokens more: of every layer alone where they are apart."""
    return map_layers(lambda layer: layer.trim(), memory)


def rows(memory: Memory, index_b: jax.Array) -> Memory:
    """The memory of these rows, i32 [n], some perhaps repeatedly. Runs on the host."""
    pick = lambda a, axis: jnp.take(a, index_b, axis=axis)  # noqa: E731
    return _map_rows(memory, pick, lambda layer, length_b, axis: layer.rows(index_b, axis))


def fork(memory: Memory, n: int, one: Callable[[Layer, jax.Array, int], Layer]) -> Memory:
    """n copies of every row, one beside the other; those of a layer are made by `one` (layer, tokens i32 [b] in it,
    axis of its rows)."""
    return _map_rows(memory, lambda a, axis: jnp.repeat(a, n, axis=axis), one)


def _map_rows(memory: Memory, array: Callable, layer: Callable[[Layer, jax.Array, int], Layer]) -> Memory:
    """The tree with `layer` of every layer, as in `fork`, and `array` (array, axis of its rows) of all else."""

    def state(x: Any, length_b: jax.Array, axis: int = 0) -> Any:
        if isinstance(x, Stack):
            return Stack(state(x.states, length_b, 1))
        return layer(x, length_b, axis) if isinstance(x, Layer) else jax.tree.map(lambda a: array(a, axis), x)

    def of(node: Memory) -> Memory:
        deep = lambda x: x if _is_memory(x) else state(x, node.length)  # noqa: E731
        parts = jax.tree.map(deep, node.parts, is_leaf=lambda x: _is_memory(x) or is_state(x))
        layers = jax.tree.map(lambda x: state(x, node.length), node.layers, is_leaf=is_state)
        return node.replace(layers=layers, length=array(node.length, 0), parts=parts)

    return each(of, memory)


def put(memory: Memory, index_b: np.ndarray, other: Memory) -> Memory:
    """The memory whose rows `index_b`, i32 [n], are those of `other`, which has n of them; see
    `Layer.put`. Uses `memory` up. Runs on the host."""

    def state(x: Any, y: Any, axis: int = 0) -> Any:
        if isinstance(x, Stack):
            return Stack(state(x.states, y.states, 1))
        return x.put(index_b, y, axis) if isinstance(x, Layer) else put_rows(x, y, index_b, axis)

    def of(node: Memory, new: Memory) -> Memory:
        keep = lambda x, y: x if _is_memory(x) else state(x, y)  # noqa: E731
        parts = jax.tree.map(keep, node.parts, new.parts, is_leaf=lambda x: _is_memory(x) or is_state(x))
        layers = jax.tree.map(state, node.layers, new.layers, is_leaf=is_state)
        return node.replace(layers=layers, length=put_rows(node.length, new.length, index_b, 0), parts=parts)

    return each(of, memory, other)


def use(memory: Memory) -> tuple[jax.Array, jax.Array]:
    """Entries that each row holds, and that its latest token read: float32 [b] each, averaged over all attention
    layers and their key/value heads; 0 without such layers."""
    out = []
    for what in ("held", "read"):
        found = [x.astype(jnp.float32).mean(-1) for node in nodes(memory) for x in _ask(node, what)]
        nothing = jnp.zeros((1, *memory.length.shape), jnp.float32)
        out.append(jnp.concatenate(found or [nothing]).mean(0))
    return out[0], out[1]


def unstack(memory: Memory) -> Memory:
    """The same memory with a tuple of states in place of every Stack."""
    apart = lambda x: params.unstack(x.states) if isinstance(x, Stack) else x  # noqa: E731
    return each(lambda node: node.replace(layers=jax.tree.map(apart, node.layers, is_leaf=is_state)), memory)


def part(memory: Memory) -> int | None:
    """Prompts are read in parts of at most so many tokens; None: whole."""
    return min((p.part for p in policies(memory) if p.part is not None), default=None)


def passes(memory: Memory) -> int:
    """How often a prompt is read."""
    return max((p.passes for p in policies(memory)), default=1)


def _is_memory(x: Any) -> bool:
    return isinstance(x, Memory)


def is_state(x: Any) -> bool:
    """Whether a leaf of `Memory.layers` is a layer, or equal ones that are stacked."""
    return isinstance(x, Stack | Layer)


def _layer(x: Any) -> Layer | None:
    """The layer, or stacked layers, that a leaf of `Memory.layers` is; None for recurrent states."""
    x = x.states if isinstance(x, Stack) else x
    return x if isinstance(x, Layer) else None


def policy_in(x: Any) -> Any:
    """The policy of a leaf of `Memory.layers`; None where it has none."""
    return None if (layer := _layer(x)) is None else layer.policy


def policies(memory: Memory) -> Iterator[Any]:
    """The policy of every layer, or stack of layers, that has one."""
    return (layer.policy for layer in layers(memory) if layer.policy is not None)


def _with_layers(fn: Callable[[Layer], Layer], node: Memory) -> Memory:
    def of(x: Any) -> Any:
        layer = _layer(x)
        return x if layer is None else Stack(fn(layer)) if isinstance(x, Stack) else fn(layer)

    return node.replace(layers=jax.tree.map(of, node.layers, is_leaf=is_state))


def _states(node: Memory) -> list[Any]:
    """Layers of a node, those that are stacked as one."""
    return [x for x in jax.tree.leaves(node.layers, is_leaf=is_state) if _layer(x) is not None]


def _shrinks(x: Any) -> bool:
    return (policy := policy_in(x)) is not None and policy.shrinks


def _ask(node: Memory, what: str, *how: int) -> list[jax.Array]:
    """What every attention layer of a node answers, [layers, b, ...] for each leaf."""
    out = []
    for x in _states(node):
        ask = lambda one: getattr(one, what)(node.length, *how)  # noqa: E731
        out.append(jax.vmap(ask)(_layer(x)) if isinstance(x, Stack) else ask(x)[None])
    return out
