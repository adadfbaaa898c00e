"""The innermost network of a model, whose layers have the entries of a memory, and what stands around it: the layers
that make its units (of a model without units of its own nothing)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.chunking import rules
from atom_jax.chunking.types import START
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.dense import DenseLayer, widen
from atom_jax.kvcache.lasting.layer import moved
from atom_jax.kvcache.layer import Layer
from atom_jax.kvcache.memory import Memory, Stack, is_state
from atom_jax.kvcache.window import WindowLayer
from atom_jax.models import registry
from atom_jax.models.attention import Attention
from atom_jax.models.family import Node
from atom_jax.models.layers import runs
from atom_jax.typing import AtomError

# Positions outside of the innermost network stay below twice this, or what their layers need.
NEAR = 128
# Units of the least part: a text may begin with some that hold nothing.
LEAST = 8


@dataclasses.dataclass(frozen=True)
class Inside:
    """What reading and prompts need to know of a model.

    cfg: its configuration. nodes: of its memory (`Family.nodes`). kinds: of the attention layers of the innermost
    network, in their order. places: of every leaf of that one's layers, which of these it stacks; None: states of
    other layers.
    """

    cfg: Any
    nodes: tuple[Node, ...]
    kinds: tuple[Attention, ...]
    places: tuple[np.ndarray | None, ...]

    @property
    def full(self) -> np.ndarray:
        """Numbers of the attention layers that see everything before them, which have entries."""
        return np.flatnonzero([kind.window is None for kind in self.kinds])

    @property
    def sliding(self) -> np.ndarray:
        """Numbers of the others, which have their window."""
        return np.flatnonzero([kind.window is not None for kind in self.kinds])

    @property
    def kind(self) -> Attention:
        """What the layers with entries are like."""
        return self.kinds[self.full[0]]

    @property
    def limit(self) -> int:
        """Positions of the innermost network."""
        return self.nodes[-1].max_length

    @property
    def units(self) -> bool:
        """Whether its positions are units, and not tokens."""
        return len(self.nodes) > 1

    @property
    def starts(self) -> bool:
        """Whether a unit is there as soon as it begins; else when it has ended."""
        return self.units and rules.of(self.nodes[-2].rule).KIND == START

    @property
    def late(self) -> int:
        """How many tokens later than it ends that is known of a unit."""
        return int(self.units and rules.looks_ahead(self.nodes[0].rule))

    @property
    def near(self) -> int:
        """Positions of tokens stay below this (`nearer`); 0 without units."""
        return 2 * self._steps[0] if self.units else 0

    @functools.cached_property
    def _steps(self) -> tuple[int, ...]:
        """Of every node around, the positions by multiples of which it may be moved."""
        found = []
        for node in self.nodes[:-1]:
            windows = (k.window for kinds in node.stacks for k in kinds if isinstance(k, Attention))
            step = math.lcm(rules.period(node.rule), *windows)
            found.append(step * -(-NEAR // step))
        return tuple(found)

    def empty(self) -> Memory:
        """The model's memory, one row, that has read nothing; windows around have their whole size."""

        def whole(layer: Layer) -> Layer:
            if not isinstance(layer, WindowLayer):
                return layer
            return layer.replace(k=widen(layer.k, layer.window), v=widen(layer.v, layer.window))

        return memory_lib.map_layers(whole, registry.of(self.cfg).init_cache(self.cfg, 1, 1))

    def with_layers(self, around: Memory, layers: Layer, length: int, ring: Layer | None = None) -> Memory:
        """The memory `around` with these stacked layers for all attention layers of the innermost network, whose next
        position is `length`. ring: those of the sliding layers, where `layers` are those of the full ones alone."""
        slides = np.isin(np.arange(len(self.kinds)), self.sliding)
        rank = np.where(slides, np.cumsum(slides), np.cumsum(~slides)) - 1

        def stack(numbers: np.ndarray) -> Stack:
            of, at = (layers, numbers) if ring is None else (ring if slides[numbers[0]] else layers, rank[numbers])
            whole = len(at) == len(of.k) and (at == np.arange(len(at))).all()
            return Stack(of if whole else jax.tree.map(lambda x, at=at: x[at], of))

        def node(node: Memory) -> Memory:
            b = layers.k.shape[1]
            return _with_stacks(self, node, stack).replace(length=jnp.full(b, length, jnp.int32), fresh=False)

        return at_innermost(node, around)

    def layers_of(self, memory: Memory, numbers: np.ndarray) -> Any:
        """These of the attention layers of the innermost network, ascending, which are equal."""
        node = memory_lib.nodes(memory)[-1]
        leaves = zip(jax.tree.leaves(node.layers, is_leaf=is_state), self.places)
        found = [(x.states, at) for x, at in leaves if at is not None and at[0] in numbers]
        order = np.argsort(np.concatenate([at for _, at in found]))
        if len(found) == 1:
            return found[0][0]
        return jax.tree.map(lambda *x: jnp.concatenate(x)[order], *(x for x, _ in found))

    def nearer(self, memory: Memory) -> Memory:
        """The memory with lower positions around the innermost network where they are high, which changes nothing:
        there only distances matter, and where a text begins."""
        inwards = iter([None, *reversed([*zip(self.nodes, self._steps)])])

        def node(node: Memory) -> Memory:
            here = next(inwards)
            if here is None:
                return node
            about, step = here
            by_b = jnp.maximum(node.length // step - 1, 0) * step
            kinds = iter([kind for kind, _ in _leaves(about.stacks)])

            def state(x: Any) -> Any:
                kind = next(kinds)
                if not isinstance(kind, Attention):
                    return x
                layer = x.states
                k = jax.vmap(lambda k: moved(k, -by_b[:, None], kind.rotary, kind.rope))(layer.k)
                return Stack(layer.replace(k=k))

            layers = jax.tree.map(state, node.layers, is_leaf=is_state)
            parts = node.parts.replace(rule=rules.nearer(node.parts.rule, by_b, cfg=about.rule))
            return node.replace(layers=layers, length=node.length - by_b, parts=parts)

        return memory_lib.each(node, memory)

    def rest(self, memory: Memory) -> dict[str, np.ndarray]:
        """All of a memory but the attention layers of the innermost network and its length, by name."""
        paths, _ = jax.tree_util.tree_flatten_with_path(self._without(memory))
        return {_name(path): np.asarray(x) for path, x in paths}

    def restored(self, arrays: dict[str, np.ndarray], where: str) -> Memory:
        """The memory of which `rest` gave these arrays, as `with_layers` takes it. AtomError, which begins with
        `where`, for what is none of this model's."""
        like = memory_lib.each(lambda node: node.replace(fresh=False), self.empty())
        paths, tree = jax.tree_util.tree_flatten_with_path(self._without(like))
        check(arrays, {_name(path): x for path, x in paths}, where)
        found = jax.tree.unflatten(tree, [jnp.asarray(arrays[_name(path)]) for path, _ in paths])

        def node(node: Memory) -> Memory:
            return _with_stacks(self, node, lambda numbers: Stack(())).replace(length=jnp.zeros(1, jnp.int32))

        return at_innermost(node, found)

    def _without(self, memory: Memory) -> Memory:
        return at_innermost(lambda node: _with_stacks(self, node, lambda at: Stack(())).replace(length=()), memory)


@functools.cache
def of(cfg: Any) -> Inside:
    """Of the model with this configuration, which has no cache policy. AtomError where its innermost network has no
    layers that see everything before them, or layers that a memory can't stand in front of."""
    family = registry.of(cfg)
    nodes, places, kinds = family.nodes(cfg), [], {}
    cache = jax.eval_shape(lambda: family.init_cache(cfg, 1, 1))
    if sum(node.rule is None for node in nodes) > 1:
        raise AtomError(f"a lasting memory stands before one network, and a {cfg.family} has several")
    fits = True
    for node, about in zip(memory_lib.nodes(cache), nodes):
        inner, (dense, window) = about.rule is None, (DenseLayer, WindowLayer)
        for x, (kind, numbers) in zip(jax.tree.leaves(node.layers, is_leaf=is_state), _leaves(about.stacks)):
            layer = x.states
            if isinstance(layer, Layer):
                fits &= isinstance(kind, Attention) and type(layer) in ((dense, window) if inner else (window,))
            if inner:
                places.append(numbers if isinstance(kind, Attention) else None)
                kinds |= {int(n): kind for n in numbers if isinstance(kind, Attention)}
    if not fits or all(kind.window is not None for kind in kinds.values()):
        raise AtomError(
            "a lasting memory is for innermost layers that see everything before them and have positions in their"
            " keys, beside sliding and recurrent layers alone; this"
            f" {cfg.family} model has layers of other kinds, or none of these"
        )
    order = {n: i for i, n in enumerate(sorted(kinds))}
    ranks = tuple(None if at is None else np.array([order[int(n)] for n in at]) for at in places)
    return Inside(cfg, nodes, tuple(kinds[n] for n in sorted(kinds)), ranks)


def check_part(cfg: Any, part: int, sinks: int) -> None:
    """AtomError where a model can't read in such parts."""
    inside = of(cfg)
    what = "units" if inside.units else "tokens"
    if inside.units and part < LEAST:
        raise AtomError(f"part: of a model with units of its own it has at least {LEAST} of them, got {part}")
    if sinks + 2 * part > inside.limit:
        need = f"{sinks} sinks and two parts of {part} {what}"
        raise AtomError(f"part: {need} exceed the {inside.limit} positions of the model")


def at_innermost(fn: Callable[[Memory], Memory], memory: Memory) -> Memory:
    """The tree with `fn` of its innermost node in the place of that."""
    return memory_lib.each(lambda node: fn(node) if len(memory_lib.nodes(node)) == 1 else node, memory)


def check(arrays: dict[str, np.ndarray], like: dict[str, Any], where: str) -> None:
    """AtomError, which begins with `where`, unless these names are there with the shapes and dtypes of `like`."""
    for name, x in like.items():
        if name not in arrays or arrays[name].shape != x.shape or arrays[name].dtype != x.dtype:
            raise AtomError(f"{where}: the tensor 'window.{name}' is not of this model's shape and dtype")


def _leaves(stacks: tuple[tuple, ...]) -> list[tuple[Any, np.ndarray]]:
    """The kind and the numbers (among all layers of the node) of every leaf of a node's layers."""
    found, first = [], 0
    for kinds in stacks:
        for run in runs(kinds):
            found += [(kinds[run.first + i], first + np.array(run.numbers(i))) for i in range(run.period)]
        first += len(kinds)
    return found


def _with_stacks(inside: Inside, node: Memory, stack: Callable[[np.ndarray], Stack]) -> Memory:
    """The innermost node with `stack` (numbers) in the place of attention layers."""
    places = iter(inside.places)

    def state(x: Any) -> Any:
        at = next(places)
        return x if at is None else stack(at)

    return node.replace(layers=jax.tree.map(state, node.layers, is_leaf=is_state))


def _name(path: Any) -> str:
    return "rest." + jax.tree_util.keystr(path, simple=True, separator=".")
