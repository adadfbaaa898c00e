"""A model's memory: one tree of `Memory` nodes, which hold layers (and the states of recurrent ones), and whatever
else the model keeps of every row. What is asked of all of it is written here once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import params
from atom_jax.kvcache.layer import Layer
from atom_jax.kvcache.rows import put_rows

# Tokens for which, at least, there is room twice over once a memory grows whose layers differ in size.
SPARE = 32


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


def nbytes(memory: Memory) -> int:
    """Bytes of the buffers of all layers and recurrent states, or of their shapes."""
    return sum(params.nbytes(node.layers) for node in nodes(memory))


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
