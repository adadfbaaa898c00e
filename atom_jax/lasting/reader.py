"""Reading a text of any length in parts, each with the part before in view, and what every position is worth."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting.layer import PartLayer
from atom_jax.kvcache.lasting.score import Seen
from atom_jax.kvcache.layer import stack_layers
from atom_jax.kvcache.memory import Memory
from atom_jax.lasting import inside as inside_lib
from atom_jax.lasting.codec import half
from atom_jax.lasting.store import Model, Window
from atom_jax.models import registry
from atom_jax.models.fingerprint import identity
from atom_jax.nn import scoring
from atom_jax.session import laid_out, reading
from atom_jax.typing import LM, Batch

# Arrays of a layer from which reading goes on, as files name them.
_KEPT = ("sink_k", "sink_v", "k", "v", "own_most", "own_total")
# Tokens of a call for every unit of a part, where positions are units; and those that a call has room for besides.
TOKENS, ROOM = 4, 8


@dataclasses.dataclass(frozen=True)
class State:
    """Where the reading of a source stands. Positions are those of the model's innermost network: tokens, or units.

    memory: of the model, one row. x_1d: final state of the latest token. nll: f32 [w], nats of the latest part's
    positions, of units those of their tokens together. ends: i32 [w + 1], the token behind each of them, after the
    first one's. late: f32 [n], nats of tokens behind these that were read. window: where the latest part stands.
    tokens: of the source that were read. nats, x_td: of the tokens of the latest call of `Reader.read`, and their
    final states (where the form of tokens is decided late, those before them); None before that.
    """

    memory: Memory
    x_1d: Any
    nll: np.ndarray
    ends: np.ndarray
    late: np.ndarray
    window: Window
    tokens: int = 0
    nats: float = 0.0
    x_td: Any = None


class Reader:
    """Reads sources in parts of `part` positions, the last of which may be short. sinks: the first positions of a
    source that stay in view, and are no entries."""

    def __init__(self, lm: LM, part: int, sinks: int):
        self.part, self.sinks, self.inside = part, sinks, inside_lib.of(lm.config)
        self._cfg, self._params = lm.config, laid_out.scanned(lm)
        kinds, kind, dtype = self.inside.kinds, self.inside.kind, jnp.dtype(lm.config.dtype)
        self._every = np.arange(len(kinds))
        empty = stack_layers(PartLayer.empty(1, kind.h, sinks, part, kind.k, dtype), len(kinds))
        memory = memory_lib.each(lambda node: node.replace(fresh=False), self.inside.empty())
        self._empty = self.inside.with_layers(memory, empty, 0)
        self._size = TOKENS * part if self.inside.units else part

    def begin(self, source: int) -> State:
        """Nothing is read yet of a source."""
        x_1d = _state.eval_shape(self._params, self._empty, cfg=self._cfg)
        nll, ends = np.zeros(self.part, np.float32), np.zeros(self.part + 1, np.int32)
        return State(self._empty, jnp.zeros(x_1d.shape, x_1d.dtype), nll, ends, nll[:0], Window(source))

    def read(self, state: State, ids: np.ndarray) -> tuple[State, Seen | None]:
        """Reads the next part of a source, whose tokens are `ids`, i32 [n]; and what leaves the window, the part
        before. Units that aren't finished wait for the part in which they end."""
        start, most = self.inside.starts, self.part
        memory, x_1d, tokens = self._next(state), state.x_1d, state.tokens
        marks, nats, full, states = np.zeros(0, np.int32), [state.late], False, []
        while tokens < len(ids) and not full:
            given = ids[tokens : tokens + self._size]
            found, left = self._marks(memory, given, tokens), most - len(marks)
            full = len(found) > left if start else len(found) >= left
            if full:
                given = given[: found[left] - tokens if start else found[left - 1] + 1 + self.inside.late - tokens]
            if len(given):
                x_1d, x_td, memory, nll = self._call(memory, x_1d, given, tokens)
                nats.append(nll)
                states.append(x_td)
            marks, tokens = np.append(marks, found[:left]), tokens + len(given)
        nats, old, n = np.concatenate(nats), state.window, len(marks)
        read = float(nats[len(state.late) :].sum(dtype=np.float64))
        x_td = np.concatenate(states)
        if not n:
            same = dataclasses.replace(state, memory=memory, x_1d=x_1d, tokens=tokens, nats=read, x_td=x_td)
            return same, None
        first, behind = state.ends[old.count], np.append(marks[1:], tokens) if start else marks + 1
        ends = np.append(first, np.append(behind, np.repeat(behind[-1:], most - n))).astype(np.int32)
        total = np.append(0.0, np.cumsum(nats, dtype=np.float64))
        nll = np.diff(total[ends - first]).astype(np.float32)
        late = nats[ends[n] - first :][: self.inside.late]
        window = Window(old.source, old.first + old.count, n)
        new = State(memory, x_1d, nll, ends, late, window, tokens, read, x_td)
        layers = self.inside.layers_of(memory, self._every)
        return new, self._leaving(state, layers.most, layers.total, nll[0])

    def end(self, state: State) -> Seen | None:
        """The latest part, which nothing follows: what is known of it is what its own part paid it."""
        layers = self.inside.layers_of(state.memory, self._every)
        return self._leaving(state, layers.own_most, layers.own_total, 0.0)

    def _next(self, state: State) -> Memory:
        """The memory for the part after the window; a text's first has none before it."""
        window = state.window
        place = min(window.first, self.sinks) + self.part if window.count else 0
        at = jnp.full(1, place, jnp.int32)
        memory = inside_lib.at_innermost(lambda node: node.replace(length=at), state.memory)
        return _nearer(memory, of=self._cfg) if self.inside.units else memory

    def _marks(self, memory: Memory, given: np.ndarray, tokens: int) -> np.ndarray:
        """The tokens of a source, i32 [n], at whose marks units begin (or end, as `Inside.starts` says) once these
        tokens from `tokens` on are read; before the first one's those of units that hold nothing."""
        if not self.inside.units:
            return np.arange(tokens, tokens + len(given), dtype=np.int32)
        ids, n = self._padded(given), len(given)
        run = lambda cfg: _marks(self._params, ids, n, memory, cfg=cfg)  # noqa: E731
        marks, units = jax.device_get(reading.exactly(run, self._cfg))
        # A rule that looks ahead goes on with the token that it has left undecided.
        found = tokens - (self.inside.late if tokens else 0) + np.flatnonzero(marks)
        nothing = np.full(units - len(found), 0 if self.inside.starts else -1)
        return np.append(nothing, found).astype(np.int32)

    def _call(self, memory: Memory, x_1d: Any, given: np.ndarray, tokens: int) -> tuple[Any, Any, Memory, np.ndarray]:
        """As of `_read`, with the nats of these tokens alone; 0 for a text's first, which nothing foretells."""
        ids, n = self._padded(given), len(given)
        run = lambda cfg: _read(self._params, ids, n, memory, x_1d, cfg=cfg)  # noqa: E731
        x_1d, x_td, memory, nll = reading.exactly(run, self._cfg)
        nll = np.array(nll[:n])
        if not tokens:
            nll[0] = 0.0
        # Cut on the host: a slice on the device is compiled for every length.
        return x_1d, np.asarray(x_td)[:n], memory, nll

    def _padded(self, given: np.ndarray) -> np.ndarray:
        ids = np.zeros((1, self._size + ROOM * self.inside.units), np.int32)
        ids[0, : len(given)] = given
        return ids

    def _leaving(self, state: State, most: Any, total: Any, following: float) -> Seen | None:
        window, skip = state.window, max(self.sinks - state.window.first, 0)
        if window.count <= skip:
            return None
        layers, cut = self.inside.layers_of(state.memory, self._every), slice(skip, window.count)
        full = self.inside.full
        k, v = (half(np.asarray(x)[full, 0, :, cut]) for x in _halved(layers.k, layers.v))
        most, total = (np.asarray(x)[full, 0, :, cut] for x in (most, total))
        nll = state.nll[cut]
        place = np.arange(window.first + skip, window.first + window.count, dtype=np.int32)
        after, ends = np.append(nll[1:], np.float32(following)), state.ends[skip : window.count + 1]
        return Seen(k, v, most, total, nll, after, window.source, place, ends)

    def arrays(self, state: State) -> dict[str, np.ndarray]:
        """What a file holds of a state, apart from its window and its number of tokens."""
        layers = self.inside.layers_of(state.memory, self._every)
        kept = {name: np.asarray(getattr(layers, name)) for name in _KEPT}
        kept |= {"nll": state.nll, "x": np.asarray(state.x_1d)} | self.inside.rest(state.memory)
        return kept | {"ends": state.ends, "late": state.late} if self.inside.units else kept

    def state(self, arrays: dict[str, np.ndarray], window: Window, tokens: int, where: str) -> State:
        """The state of `arrays`. AtomError, which begins with `where`, for what is none of this model's."""
        empty, first = self.inside.layers_of(self._empty, self._every), self.begin(0)
        like = {name: getattr(empty, name) for name in _KEPT} | {"nll": first.nll, "x": first.x_1d}
        ends, late = window.first + np.arange(self.part + 1, dtype=np.int32), first.late
        if self.inside.units:
            like |= {"ends": first.ends, "late": np.zeros(self.inside.late, np.float32)}
        inside_lib.check(arrays, like, where)
        if self.inside.units:
            ends, late = arrays["ends"], arrays["late"]
        count = jnp.full_like(empty.count, window.count)
        layers = empty.replace(count=count, **{name: jnp.asarray(arrays[name]) for name in _KEPT})
        memory = self.inside.with_layers(self.inside.restored(arrays, where), layers, 0)
        return State(memory, jnp.asarray(arrays["x"]), arrays["nll"], ends, late, window, tokens)


def model_of(lm: LM) -> Model:
    """What a memory says of the model that it belongs to; its layers are those that have entries."""
    inside = inside_lib.of(lm.config)
    return Model(lm.family, identity(lm), lm.config.dtype, len(inside.full), inside.kind.h, inside.kind.k)


def _batch(ids_1t: jax.Array, count: jax.Array, memory: Memory) -> Batch:
    offsets = jnp.arange(ids_1t.shape[1], dtype=jnp.int32)[None]
    return Batch(ids_1t, memory.length[:, None] + offsets, (offsets < count).astype(jnp.int32))


@functools.partial(jax.jit, static_argnames="cfg")
def _state(params: Any, memory: Memory, *, cfg: Any) -> jax.Array:
    """A final state, [1, d]. Compiled it is traced once for all sources, though only its shape is asked for."""
    batch = _batch(jnp.zeros((1, 1), jnp.int32), jnp.int32(1), memory)
    return registry.of(cfg).hidden(params, batch, cfg=cfg, cache=memory)[0][:, 0]


@functools.partial(jax.jit, static_argnames="cfg")
def _read(
    params: Any, ids_1t: jax.Array, count: jax.Array, memory: Memory, x_1d: jax.Array, *, cfg: Any
) -> tuple[tuple[jax.Array, jax.Array, Memory, jax.Array], Any]:
    """The final state of the last of `count` tokens and those of all, the memory after them, and the nats of every
    token, f32 [t]; and how many units were lost."""
    model, codec = registry.of(cfg), registry.of(cfg).codec(cfg)
    x_1td, memory, aux = model.hidden(params, _batch(ids_1t, count, memory), cfg=cfg, cache=memory)
    # Where the form of tokens is decided late, states are those before the tokens.
    before = x_1td if codec.pending else jnp.concatenate([x_1d[:, None], x_1td[:, :-1]], axis=1)
    head = lambda x_btd: codec.merge(model.logits(params, x_btd, cfg=cfg))  # noqa: E731
    nll = scoring.score(head, before, codec.plain(ids_1t))["nats"][0]
    x_1d = jax.lax.dynamic_index_in_dim(x_1td, count - 1, axis=1, keepdims=False)
    return (x_1d, x_1td[0], memory, nll), aux.get("lost")


@functools.partial(jax.jit, static_argnames="cfg")
def _marks(
    params: Any, ids_1t: jax.Array, count: jax.Array, memory: Memory, *, cfg: Any
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """Where the innermost network's units have their marks among `count` tokens, bool [t], and how many units there
    are with those that hold nothing; and how many were lost. The compiler leaves out all that this doesn't need."""
    before = memory_lib.nodes(memory)[-1].length[0]
    _, memory, aux = registry.of(cfg).hidden(params, _batch(ids_1t, count, memory), cfg=cfg, cache=memory)
    return (aux["boundaries"][-1][0], memory_lib.nodes(memory)[-1].length[0] - before), aux["lost"]


@functools.partial(jax.jit, static_argnames="of")
def _nearer(memory: Memory, *, of: Any) -> Memory:
    return inside_lib.of(of).nearer(memory)


@jax.jit
def _halved(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(x.astype(jnp.float16) for x in arrays)
