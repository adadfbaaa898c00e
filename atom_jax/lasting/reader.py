"""Reading a text of any length in parts, each with the part before in view, and what every token is worth."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.dense import DenseLayer
from atom_jax.kvcache.lasting.layer import PartLayer
from atom_jax.kvcache.lasting.score import Seen
from atom_jax.kvcache.memory import Layer, Memory, Stack, stack_layers
from atom_jax.kvcache.window import WindowLayer
from atom_jax.lasting.codec import half
from atom_jax.lasting.store import Model, Window
from atom_jax.models import registry
from atom_jax.models.fingerprint import identity
from atom_jax.models.layers import runs
from atom_jax.nn import scoring
from atom_jax.typing import LM, AtomError, Batch

# Arrays of a layer from which reading goes on, as files name them.
_KEPT = ("sink_k", "sink_v", "k", "v", "own_most", "own_total")


@dataclasses.dataclass(frozen=True)
class State:
    """Where the reading of a source stands. memory: of the model, one row. x_1d: final state of the latest token.
    nll: f32 [w], nats of the latest part's tokens. window: where that part stands. x_wd: their final states; None
    where they were read in an earlier session."""

    memory: Memory
    x_1d: Any
    nll: np.ndarray
    window: Window
    x_wd: Any = None


class Reader:
    """Reads sources in parts, the last of which may be short. sinks: the first tokens of a source that stay in view,
    and are no entries."""

    def __init__(self, lm: LM, part: int, sinks: int):
        self.lm, self.part, self.sinks = lm, part, sinks
        self._full = full_layers(lm)
        kind = lm.config.attentions[0]
        empty = PartLayer.empty(1, kind.h, sinks, part, kind.k, jnp.dtype(lm.config.dtype))
        self._empty = with_layers(lm, stack_layers(empty, lm.config.n_layers), 0)

    def begin(self, source: int) -> State:
        """Nothing is read yet of a source."""
        x_1d = jnp.zeros((1, self.lm.config.d_model), jnp.dtype(self.lm.config.dtype))
        return State(self._empty, x_1d, np.zeros(self.part, np.float32), Window(source))

    def read(self, state: State, ids: np.ndarray) -> tuple[State, Seen | None]:
        """Reads the next part, i32 [n]; and what leaves the window, the part before."""
        old = state.window
        window = Window(old.source, old.first + old.count, len(ids))
        padded = np.zeros((1, self.part), np.int32)
        padded[0, : len(ids)] = ids
        x_1d, x_wd, memory, nll = _read(
            self.lm.params, padded, len(ids), state.memory, state.x_1d, cfg=self.lm.config
        )
        nll = np.array(nll)
        if window.first == 0:
            nll[0] = 0.0
        memory = memory.replace(length=jnp.full(1, self._place(window), jnp.int32))
        new = layers_of(self.lm, memory)
        return State(memory, x_1d, nll, window, x_wd), self._leaving(state, new.most, new.total, nll[0])

    def end(self, state: State) -> Seen | None:
        """The latest part, which nothing follows: what is known of it is what its own part paid it."""
        layers = layers_of(self.lm, state.memory)
        return self._leaving(state, layers.own_most, layers.own_total, 0.0)

    def _place(self, window: Window) -> int:
        """Where the part after a whole one begins."""
        return min(window.first, self.sinks) + self.part

    def _leaving(self, state: State, most: Any, total: Any, following: float) -> Seen | None:
        window, skip = state.window, max(self.sinks - state.window.first, 0)
        if window.count <= skip:
            return None
        layers, cut = layers_of(self.lm, state.memory), slice(skip, window.count)
        k, v = (half(np.asarray(x)[self._full, 0, :, cut]) for x in _halved(layers.k, layers.v))
        most, total = (np.asarray(x)[self._full, 0, :, cut] for x in (most, total))
        nll = state.nll[cut]
        place = np.arange(window.first + skip, window.first + window.count, dtype=np.int32)
        return Seen(k, v, most, total, nll, np.append(nll[1:], np.float32(following)), window.source, place)

    def arrays(self, state: State) -> dict[str, np.ndarray]:
        """What a file holds of a state, apart from its window."""
        layers = layers_of(self.lm, state.memory)
        kept = {name: np.asarray(getattr(layers, name)) for name in _KEPT}
        return {**kept, "nll": state.nll, "x": np.asarray(state.x_1d)}

    def state(self, arrays: dict[str, np.ndarray], window: Window, where: str) -> State:
        """The state of `arrays`. AtomError, which begins with `where`, for what is none of this model's."""
        empty = layers_of(self.lm, self._empty)
        wanted = {name: getattr(empty, name) for name in _KEPT}
        first = self.begin(0)
        wanted |= {"nll": first.nll, "x": first.x_1d}
        for name, like in wanted.items():
            if name not in arrays or arrays[name].shape != like.shape or arrays[name].dtype != like.dtype:
                raise AtomError(f"{where}: the tensor 'window.{name}' is not of this model's shape and dtype")
        layers = empty.replace(**{name: jnp.asarray(arrays[name]) for name in _KEPT})
        memory = with_layers(self.lm, layers, self._place(window))
        return State(memory, jnp.asarray(arrays["x"]), arrays["nll"], window)


def model_of(lm: LM) -> Model:
    """What a memory says of the model that it belongs to; its layers are those that have entries."""
    n = len(full_layers(lm))
    kind = lm.config.attentions[0]
    return Model(lm.family, identity(lm), lm.config.dtype, n, kind.h, kind.k)


def full_layers(lm: LM) -> np.ndarray:
    """Numbers of the layers that see everything before them, which have entries; sliding layers have their window.
    AtomError for models with layers of other kinds, with units of their own, or with sliding layers alone."""
    cache = registry.of(lm.config).init_cache(lm.config, 1, 1)
    states = [getattr(x, "states", x) for x in jax.tree.leaves(cache.layers, is_leaf=_is_state)]
    if cache.parts == () and {type(x) for x in states} in ({DenseLayer}, {DenseLayer, WindowLayer}):
        return np.flatnonzero([kind.window is None for kind in lm.config.attentions])
    raise AtomError(
        "a lasting memory is for transformers with layers that see everything before them, and sliding ones beside"
        f" these; this {lm.family} model has layers of other kinds"
    )


def with_layers(lm: LM, layers: Layer, length: int, ring: Layer | None = None) -> Memory:
    """The model's memory with these stacked layers, whose next token stands at `length`. ring: those of the sliding
    layers, where `layers` are those of the full ones alone."""
    cache = registry.of(lm.config).init_cache(lm.config, 1, 1)
    sliding = np.array([kind.window is not None for kind in lm.config.attentions])
    rank = np.where(sliding, np.cumsum(sliding), np.cumsum(~sliding)) - 1
    stacks = []
    for numbers in _numbers(lm):
        of, at = (layers, numbers) if ring is None else (ring if sliding[numbers[0]] else layers, rank[numbers])
        whole = len(at) == len(of.k) and (at == np.arange(len(at))).all()
        stacks.append(Stack(of if whole else jax.tree.map(lambda x, at=at: x[at], of)))
    rest = iter(stacks)
    replaced = jax.tree.map(lambda _: next(rest), cache.layers, is_leaf=_is_state)
    return Memory(replaced, jnp.full(layers.k.shape[1], length, jnp.int32))


def layers_of(lm: LM, memory: Memory) -> Any:
    """All layers, in their order, of a memory that `with_layers` made of equal ones."""
    stacks = [x.states for x in jax.tree.leaves(memory.layers, is_leaf=_is_state)]
    if len(stacks) == 1:
        return stacks[0]
    order = np.argsort(np.concatenate(_numbers(lm)))
    return jax.tree.map(lambda *x: jnp.concatenate(x)[order], *stacks)


def _numbers(lm: LM) -> list[np.ndarray]:
    """Numbers of the layers of every stack of the model's memory, in order."""
    return [np.array(run.numbers(i)) for run in runs(lm.config.attentions) for i in range(run.period)]


@functools.partial(jax.jit, static_argnames="cfg")
def _read(
    params: Any, ids_1t: jax.Array, count: jax.Array, memory: Memory, x_1d: jax.Array, *, cfg: Any
) -> tuple[jax.Array, jax.Array, Memory, jax.Array]:
    """The final state of the last of `count` tokens and those of all, the memory after them, and the nats of every
    token, f32 [t]."""
    model, offsets = registry.of(cfg), jnp.arange(ids_1t.shape[1], dtype=jnp.int32)[None]
    batch = Batch(ids_1t, memory.length[:, None] + offsets, (offsets < count).astype(jnp.int32))
    x_1td, memory, _ = model.hidden(params, batch, cfg=cfg, cache=memory)
    before = jnp.concatenate([x_1d[:, None], x_1td[:, :-1]], axis=1)
    nll = scoring.score(functools.partial(model.logits, params, cfg=cfg), before, ids_1t)["nats"][0]
    return jax.lax.dynamic_index_in_dim(x_1td, count - 1, axis=1, keepdims=False), x_1td[0], memory, nll


@jax.jit
def _halved(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.astype(jnp.float16) for x in arrays)


def _is_state(x: Any) -> bool:
    return isinstance(x, Stack | Layer)
