"""What the library asks of a kind of model: one record (a `Kind`; of models of streams a `Family`), registered once
(`models.registry`), and what their ids mean (`Codec`), which generation, scoring and losses ask for alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache.memory import Memory
from atom_jax.models.published import Published
from atom_jax.params import Tree
from atom_jax.typing import TEXTS, Suffix


class Draw(Protocol):
    """One choice for each of b rows, as the user asked for it (`session.sampling.Draw`)."""

    cold: jax.Array  # bool [] or [b], whether the likeliest is taken

    def token(self, logits_bv: jax.Array) -> jax.Array:
        """Tokens i32 [b]."""
        ...

    def yes(self, log_odds_b: jax.Array) -> jax.Array:
        """bool [b], the likelier side, or drawn as the model has it whatever the temperature; independent of
        `token`."""
        ...


@dataclasses.dataclass(frozen=True)
class Codec:
    """What ids mean. Of this one every id is a token and nothing else; other families derive theirs from it.

    pending: whether the form of a prompt's last token is chosen (`begin`) before the first new token.
    unused: ids that are never made. looks: whether batches need `suffix` (`Suffix`).
    """

    pending: ClassVar[bool] = False
    unused: ClassVar[tuple[int, ...]] = ()
    looks: ClassVar[bool] = False

    def choose(self, logits_bv: jax.Array, draw: Draw) -> jax.Array:
        """The next token i32 [b] of every row."""
        if self.unused:
            logits_bv = logits_bv.at[:, jnp.array(self.unused)].set(-jnp.inf)
        return self.pick(logits_bv, draw)

    def pick(self, logits_bv: jax.Array, draw: Draw) -> jax.Array:
        """As `choose`, from logits in which unused ids are impossible."""
        return draw.token(logits_bv)

    def begin(self, logits_bv: jax.Array, token_b: jax.Array, first_b: jax.Array, draw: Draw) -> jax.Array:
        """The last token i32 [b] of prompts (bool first_b: which is also the text's first) in the form that is chosen
        for it from the logits before it. For codecs with `pending`."""
        raise NotImplementedError

    def forms(self, ids: np.ndarray) -> np.ndarray:
        """All ids that are one of these [n] in some form, ascending."""
        return np.unique(ids)

    def plain(self, ids: Any) -> Any:
        """Ids without their form, as `merge` numbers them."""
        return ids

    def merge(self, logits: jax.Array) -> jax.Array:
        """Logits [..., v] in which the forms of an id are one: log of the sum of their weights."""
        return logits

    def fuse(self, targets_bt: jax.Array, aux: dict[str, Any]) -> jax.Array:
        """Targets (each the next position's id) in the form that they have in this text. aux: what the model reported
        of the positions."""
        return targets_bt

    def beside(self, tokenizer: Any) -> dict[str, Any]:
        """What `step` needs beside the parameters, arrays by name; empty where the tokenizer lacks it."""
        return {}

    def suffix(self, tokenizer: Any, ids_bt: np.ndarray, mask_bt: np.ndarray) -> Suffix | None:
        """The `suffix` of a batch whose real positions the mask says, found on the host; None where the model needs
        none, or the tokenizer has none."""
        return None


class Node(NamedTuple):
    """What a node of a model's memory (`memory.Memory`) is about.

    stacks: of every stack of its layers, in their order, the kinds of these (`models.layers`). max_length: positions.
    rule: the configuration of what cuts them into the units of the node inside; None of the innermost one.
    """

    stacks: tuple[tuple, ...]
    max_length: int
    rule: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of model, whatever it is about.

    name: `cfg.family` of its configurations, of the type `config`.
    spec(cfg): ParamSpec tree.
    flops(cfg, length): operations (two per multiply-add) of the forward pass over one row of `length` tokens, per
        token. Matrix products, attention scores and state-space products count; norms, activations, gathers and the
        embedding don't. Learned units count as many chunks as are computed, used or not. Training costs three times
        as much (four with remat).
    describe(cfg): (label, text) of sizes, positions and memory, for `info`.
    examples(): small configurations by name, which together take every path; for tests.
    reads: what it is about: TEXTS, FRAMES or IMAGES of `atom_jax.typing`.
    parts(cfg): models within it that are trained before it, as configurations, by the name that their parameters have
        in its tree. `init_from` may be a run of one; whether that stays as it is is the objective's choice.
    """

    name: str
    config: type
    spec: Callable[[Any], Tree]
    flops: Callable[[Any, int], float]
    describe: Callable[[Any], list[tuple[str, str]]]
    examples: Callable[[], Mapping[str, Any]]
    reads: str = TEXTS
    parts: Callable[[Any], Mapping[str, Any]] = lambda cfg: {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Kind):
    """A kind of model of streams (texts, or the frames of a world), which it reads with a memory: its pure functions,
    and what else differs between kinds.

    batch: `typing.Batch` of ids, or `typing.Frames`.
    apply(p, batch, *, cfg, cache=None) -> (Output, cache); hidden(p, batch, *, cfg, cache=None, key=None) -> (final
        states [b, t, d], cache, aux); logits(p, x_btd, *, cfg) -> float32 [b, t, v].
    init_cache(cfg, batch_size, capacity, dtype=None) -> an empty `Memory` with room for so many tokens per row.
    nodes(cfg): what its nodes are about, the outermost first.
    step(p, batch, *, cfg, cache) -> (states [b, 1, d], cache, ready bool [b]): the next token of every row.
    commit(cache, pending, count_b): the cache after the first count_b of the tokens for which `hidden(...,
        tentative=True)` gave `pending` in its place; None where it can't try tokens.
    together(cfg): of models without `commit`: the configuration with which `hidden` reads several tokens in one call
        as `step` reads them one after another (where no layer has a cache policy, which may tell these apart), so
        that a draft can be tried and what stays of it read again; None where there is none.
    stale(p, batch, *, cfg, cache) -> (states [b, 1, d], cache): a guess at what `step` gives, by some of the layers;
        the cache, for further ones only, is at first `outer(cache)`, what they need of one in which no row waits.
        Both None where there is no such part.
    decode_params(p, cfg, unroll): parameters laid out for generation.
    roomier(cfg): the same model with room for more units, or None where it loses none.
    codec(cfg): what its ids mean.
    published: its config.json and tensor names; None where it has none.
    memory(cfg), with_memory(cfg, memory): its cache policies, as of `kvcache.policies.check`, and the same model with
        others.
    """

    apply: Callable[..., Any]
    hidden: Callable[..., Any]
    logits: Callable[..., jax.Array]
    init_cache: Callable[..., Memory]
    nodes: Callable[[Any], tuple[Node, ...]]
    step: Callable[..., Any]
    decode_params: Callable[[Tree, Any, bool], Tree]
    roomier: Callable[[Any], Any]
    codec: Callable[[Any], Codec] = lambda cfg: Codec()
    commit: Callable[..., Memory] | None = None
    together: Callable[[Any], Any] = lambda cfg: None
    stale: Callable[..., tuple[jax.Array, Memory]] | None = None
    outer: Callable[[Memory], Memory] | None = None
    published: Published | None = None
    memory: Callable[[Any], Any] = lambda cfg: cfg.memory
    with_memory: Callable[[Any, Any], Any] = lambda cfg, memory: dataclasses.replace(cfg, memory=memory)
