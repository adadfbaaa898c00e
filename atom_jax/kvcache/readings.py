"""Prompts that are read once or several times, and what policies decide once they are."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.layer import stack_layers
from atom_jax.kvcache.memory import Memory, Stack, each, is_state, policy_in


def once_more(memory: Memory) -> Memory:
    """The memory that reads its prompt another time, at the positions after it."""
    return each(lambda node: node.replace(reading=node.reading + 1), memory)


def settle(memory: Memory, reread: Memory | None = None) -> Memory:
    """The memory once a prompt is read: each policy may decide about all its layers of a node together.

    reread: the memory after further passes, of which only the layers of policies that asked for them are taken.
    """

    def of(node: Memory, again: Memory) -> Memory:
        def newest(x: Any, y: Any) -> Any:
            return y if (policy := policy_in(x)) is not None and policy.passes > 1 else x

        layers = jax.tree.map(newest, node.layers, again.layers, is_leaf=is_state)
        leaves, shape = jax.tree.flatten(layers, is_leaf=is_state)
        for policy in dict.fromkeys(filter(None, map(policy_in, leaves))):
            mine = [i for i, x in enumerate(leaves) if policy_in(x) == policy]
            for i, x in zip(mine, _settled(policy, [leaves[i] for i in mine], node.length)):
                leaves[i] = x
        return node.replace(layers=jax.tree.unflatten(shape, leaves))

    return each(of, memory, memory if reread is None else reread)


def agree(states: Any) -> Any:
    """The layers of a node after further tokens: those of one policy hear what all of them say (`Policy.tells`)."""
    leaves, shape = jax.tree.flatten(states, is_leaf=is_state)
    for policy in dict.fromkeys(p for p in map(policy_in, leaves) if p is not None and p.agrees):
        mine = [i for i, x in enumerate(leaves) if policy_in(x) == policy]
        told = [
            jax.vmap(policy.tells)(x.states) if isinstance(x, Stack) else policy.tells(x)[None]
            for x in (leaves[i] for i in mine)
        ]
        hears = functools.partial(policy.hears, told_lbc=jnp.concatenate(told))
        for i in mine:
            x = leaves[i]
            leaves[i] = Stack(jax.vmap(hears)(x.states)) if isinstance(x, Stack) else hears(x)
    return jax.tree.unflatten(shape, leaves)


def _settled(policy: Any, states: list[Any], length_b: jax.Array) -> list[Any]:
    """Stacks and layers of one policy after its `settle`."""
    stacked = [x.states if isinstance(x, Stack) else stack_layers(x, 1) for x in states]
    counts = [x.k.shape[0] for x in stacked]
    whole = stacked[0] if len(stacked) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *stacked)
    whole = policy.settle(whole, length_b)
    ends = np.cumsum(counts)
    pieces = [jax.tree.map(lambda a, n=n, end=end: a[end - n : end], whole) for n, end in zip(counts, ends)]
    return [
        Stack(new) if isinstance(old, Stack) else jax.tree.map(lambda a: a[0], new)
        for old, new in zip(states, pieces)
    ]
