"""Stacks of layers with parameters of one form, taken apart into runs that are scanned.

Parameters lie stacked over all layers of a stack (as in checkpoints), or as `laid_out` puts them: a tuple of runs,
each a tuple over the places in its period, each a `Stack` of parameters or a tuple of them. So does memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import params
from atom_jax.kvcache.memory import Stack, is_state
from atom_jax.params import Tree

# Layers that one step of a scan may have.
LONGEST = 8


class Run(NamedTuple):
    """`repeats` times the same `period` layers, of which the first is number `first` of the stack."""

    first: int
    period: int
    repeats: int

    @property
    def end(self) -> int:
        """Number of the first layer after these."""
        return self.first + self.period * self.repeats

    def numbers(self, i: int) -> tuple[int, ...]:
        """Numbers of the layers in place i of the period."""
        return tuple(range(self.first + i, self.end, self.period))


@functools.cache
def runs(kinds: tuple[Hashable, ...]) -> tuple[Run, ...]:
    """Takes a stack apart, of whose layers the kinds are given; from each layer on the run that goes furthest."""
    out, at = [], 0
    while at < len(kinds):
        found = [Run(at, p, _repeats(kinds[at:], p)) for p in range(1, LONGEST + 1)]
        out.append(max((r for r in found if r.repeats > 1 or r.period == 1), key=lambda r: (r.end, -r.period)))
        at = out[-1].end
    return tuple(out)


def _repeats(kinds: tuple[Hashable, ...], period: int) -> int:
    same = next((i for i, kind in enumerate(kinds) if kind != kinds[i % period]), len(kinds))
    return same // period


def states(kinds: tuple[Hashable, ...], empty: Callable[[Any, tuple[int, ...]], Stack]) -> tuple:
    """The memory of a stack: `empty` (kind, numbers of the layers) gives that of equal layers."""
    return tuple(tuple(empty(kinds[run.first + i], run.numbers(i)) for i in range(run.period)) for run in runs(kinds))


def run_layers(
    layer: Callable[..., tuple[Any, Any, dict[str, Any]]],
    kinds: tuple[Hashable, ...],
    layers: Any,
    x: Any,
    states: tuple | None,
    others: Any = None,
    remat: bool = False,
) -> tuple[Any, tuple | None, dict[str, Any]]:
    """Runs x, an array or a pytree of arrays, through all layers of a stack.

    Args:
      layer: (kind, parameters, x, state or None, others) -> x, state, and what is to be reported, by name.
      layers: the parameters, in one of the forms above. states: the memory, or None.
      others: arrays with the layers in front. remat: compute each step again in the backward pass.
    Returns: x after all layers, the states in the same form, and what was reported, stacked over the layers that
    reported it, in their order.
    """
    new, reports = [], []
    for number, run in enumerate(runs(kinds)):
        mine = _grouped(layers, run, number)
        step = functools.partial(_step, layer, kinds[run.first : run.first + run.period])
        step = jax.checkpoint(step) if remat else step
        memory = None if states is None else states[number]
        x, after, said = _run(step, run, mine, x, memory, _cut(_within(others, run), run))
        new.append(after)
        reports += [(run.numbers(i), one) for i, one in enumerate(said)]
    return x, None if states is None else tuple(new), _joined(reports)


def _step(layer: Any, kinds: tuple, x: Any, inputs: tuple) -> tuple[Any, tuple[tuple, tuple]]:
    """The layers of one period. inputs: parameters, states and others of each; parameters or others that are grouped
    [period, ...] are taken apart here, which costs a scan nothing."""
    layers, states, others = inputs
    new, said = [], []
    for i, kind in enumerate(kinds):
        p = layers[i] if isinstance(layers, tuple) else _pick(layers, i)
        x, state, report = layer(kind, p, x, None if states is None else states[i], _pick(others, i))
        new.append(state)
        said.append(report)
    return x, (tuple(new), tuple(said))


def _run(step: Any, run: Run, layers: Any, x: Any, memory: Any, others: Any) -> tuple[Any, tuple | None, tuple]:
    unrolled = isinstance(layers, tuple) and isinstance(layers[0], tuple)
    if not unrolled and run.repeats > 1:
        inputs = _unmarked(layers), None if memory is None else _unmarked(memory), others
        x, (states, said) = jax.lax.scan(step, x, inputs)
        return x, None if memory is None else tuple(map(Stack, states)), said
    new, reports = [], []
    for j in range(run.repeats):
        one = lambda tree, j=j: _pick(tree.states, j) if isinstance(tree, Stack) else tree[j]  # noqa: E731
        mine = tuple(map(one, layers)) if isinstance(layers, tuple) else _pick(layers, j)
        states = None if memory is None else tuple(map(one, memory))
        x, (after, said) = step(x, (mine, states, _pick(others, j)))
        new.append(after)
        reports.append(said)
    said = jax.tree.map(lambda *a: jnp.stack(a), *reports)
    if memory is None:
        return x, None, said
    stacked = lambda old, *a: Stack(jax.tree.map(lambda *b: jnp.stack(b), *a)) if isinstance(old, Stack) else a  # noqa: E731
    return x, tuple(map(stacked, memory, *new)), said


def _grouped(layers: Any, run: Run, number: int) -> Any:
    """The parameters of a run. Of a period of one layer they lie as the stack has them: for an axis of length 1, XLA
    on a CPU writes all of them into a second array before every scan."""
    if isinstance(layers, tuple):
        return layers[number]
    mine = _within(layers, run)
    return (Stack(mine),) if run.period == 1 else _cut(mine, run)


def _within(tree: Any, run: Run) -> Any:
    """[all layers, ...] to [layers of a run, ...]."""
    return jax.tree.map(lambda a: a if (run.first, run.end) == (0, len(a)) else a[run.first : run.end], tree)


def _cut(tree: Any, run: Run) -> Any:
    """[layers of a run, ...] to [repeats, period, ...]."""
    return jax.tree.map(lambda a: a.reshape(run.repeats, run.period, *a.shape[1:]), tree)


def _pick(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda a: a[i], tree)


def _unmarked(tree: Any) -> Any:
    return tuple(one.states for one in tree) if isinstance(tree, tuple) else tree


def _joined(reports: Sequence[tuple[tuple[int, ...], dict[str, Any]]]) -> dict[str, Any]:
    out = {}
    for name in dict.fromkeys(name for _, said in reports for name in said):
        numbers, values = zip(*((numbers, said[name]) for numbers, said in reports if name in said))
        order = np.argsort(np.concatenate(numbers))
        join = lambda *a, order=order: a[0] if len(a) == 1 else jnp.concatenate(a)[order]  # noqa: E731
        out[name] = jax.tree.map(join, *values)
    return out


def ask(kinds: tuple[Hashable, ...], states: tuple, question: Callable[[Any], jax.Array]) -> jax.Array:
    """What every layer's memory answers, [layers, ...]."""
    reports = []
    for run, places in zip(runs(kinds), states, strict=True):
        for i, one in enumerate(places):
            apart = not isinstance(one, Stack)
            answers = jnp.stack([question(x) for x in one]) if apart else jax.vmap(question)(one.states)
            reports.append((run.numbers(i), {"": answers}))
    return _joined(reports)[""]


def store(states: tuple, calls: tuple, count_b: jax.Array) -> tuple:
    """The memory of a stack after the first `count_b`, i32 [b], of the tokens of its layers' calls."""

    def one(state: Any, call: Any) -> Any:
        if isinstance(state, Stack):
            stored = jax.lax.map(lambda both: both[0].store(both[1].first(count_b)), (state.states, call.states))
            return Stack(stored)
        return state.store(call.first(count_b))

    return jax.tree.map(one, states, calls, is_leaf=is_state)


def laid_out(
    kinds: tuple[Hashable, ...],
    layers: Tree,
    lay: Callable[[Any, Tree], Tree],
    unroll: bool,
    dtype: str | None = None,
) -> tuple:
    """The parameters of a stack for generation.

    lay: (kind, parameters of a layer) -> what generation reads of the layer. unroll: the layers apart, on one CPU,
    where what is neither cast nor laid out anew is the stack's own memory (`params.apart`); else they lie stacked.
    dtype: what they are cast to first; None: they are not.
    """
    layers = layers if dtype is None else params.cast(layers, dtype)
    apart, out = params.apart(layers) if unroll else (), []
    for run in runs(kinds):
        places = []
        for i in range(run.period):
            kind, numbers = kinds[run.first + i], run.numbers(i)
            if unroll:
                places.append(tuple(lay(kind, apart[n]) for n in numbers))
            else:
                cut = slice(numbers[0], numbers[-1] + 1, run.period)
                mine = layers if len(numbers) == len(kinds) else jax.tree.map(lambda a, cut=cut: a[cut], layers)
                places.append(Stack(jax.vmap(functools.partial(lay, kind))(mine)))
        out.append(tuple(places))
    return tuple(out)
