"""What a cache policy offers to a model: `Policy`, whose hooks all have defaults, and a choice for every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import struct

from atom_jax import config
from atom_jax.fields import Fields
from atom_jax.kvcache.layer import Call, Layer, Sizes
from atom_jax.naming import Rule
from atom_jax.nn.attention import Tokens
from atom_jax.nn.self_attention import Newest
from atom_jax.params import Tree
from atom_jax.tokenizers import Tokenizer
from atom_jax.typing import AtomError


@struct.dataclass
class Mode:
    """How decisions are made in a pass without a memory.

    kind: "hard": as they are; "relaxed": with noise and a gradient; "off": nothing is evicted; "given": `noise` is
        added to the scores of keys beyond the window.
    noise: of "relaxed", f32 [l, b, h, t] (of one layer [b, h, t]), or None for none.
    fade: f32 [], what is left of a borrowed channel inside attention: 1 at the start of a retrofit, 0 in the end.
    cool: f32 [], a factor on the temperature of relaxed decisions, or None.
    """

    kind: str = struct.field(pytree_node=False, default="hard")
    noise: Any = None
    fade: Any = None
    cool: Any = None


@struct.dataclass
class Heads:
    """What an attention layer knows before RoPE.

    x_btd: the residual stream at its input. q_btnk, k_bthk, v_bthk: queries, keys and values after their norms.
    tokens: where they stand. ids: i32 [b, t], or None. layer: i32 [], number of the layer. eps: of the model's norms,
    static.
    """

    x_btd: jax.Array
    q_btnk: jax.Array
    k_bthk: jax.Array
    v_bthk: jax.Array
    tokens: Tokens
    ids: Any = None
    layer: Any = 0
    eps: float = struct.field(pytree_node=False, default=1e-5)


@struct.dataclass
class Seen:
    """What attention without a memory is to see of a layer: keys and values [b, h, t, k]; keep: f32 [b, h, t], added
    to the scores of the key at t by queries more than `keep_window` (static) after it, or None; bias: f32 [b, h, t],
    added to those by all queries, or None; newest: other keys and values, of the newest places (`Newest`), or None:
    `keep_window` is 0 then; aux: what is to be reported, by name; evidence: for the layer above, as in `Call`."""

    k: jax.Array
    v: jax.Array
    keep: Any = None
    keep_window: int = struct.field(pytree_node=False, default=0)
    bias: Any = None
    newest: Newest | None = None
    aux: dict[str, jax.Array] = struct.field(default_factory=dict)
    evidence: Any = None


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of all policies' configurations. A model calls these hooks, of which `init` alone has no default.

    name: of the policy. part: prompts are read in parts of at most so many tokens; None: whole. passes: how often a
    prompt is read, each time at the positions after the time before. shrinks: its memory can be smaller after a
    prompt than while that is read. stepwise: reading several tokens in one call is not reading them one after
    another. slides: it also serves layers whose queries see a window only. fields: of config.json that `from_hf`
    knows.
    """

    name: ClassVar[str] = ""
    part: ClassVar[int | None] = None
    passes: ClassVar[int] = 1
    stepwise: ClassVar[bool] = False
    slides: ClassVar[bool] = False
    fields: ClassVar[frozenset[str]] = frozenset()
    shrinks: ClassVar[bool] = False

    def fitted(self, tokenizer: Tokenizer) -> Policy:
        """The policy for a model with this tokenizer."""
        return self

    def over(self, own: tuple[Policy, ...]) -> Policy:
        """The policy for a model that has these so far. Raises AtomError where it needs what they don't have."""
        return self

    @property
    def learned_as(self) -> str:
        """Name of what it learns inside a layer's attention parameters."""
        return self.name

    def spec(self, projections: Tree) -> Tree:
        """ParamSpecs of what one layer learns, whose projections are "q" [d, n, k], "k" [d, h, k] and so on."""
        return {}

    def projections(self, p: Tree, mode: Mode) -> Tree:
        """The parameters of an attention layer as they are used in a pass of this mode."""
        return p

    def laid_out(self, p: Tree) -> Tree:
        """The parameters of an attention layer for decoding, with what `derive` made of them under "derived"."""
        derived = self.derive(p)
        return p if derived is None else {**p, "derived": derived}

    def derive(self, p: Tree) -> Any:
        """Arrays computed once per model from the parameters of an attention layer, or None; see `Call.derived`."""
        return None

    def prepare(
        self, heads: Heads, learned: Tree, rotate: Callable[[jax.Array], jax.Array], mode: Mode
    ) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """Queries [b, t, n, k], keys and values [b, t, h, k] as attention reads them, and what is said of every
        token, arrays [b, h, t, ...] or None. rotate: RoPE of the layer. learned: the policy's parameters of it."""
        return rotate(heads.q_btnk), rotate(heads.k_bthk), heads.v_bthk, None

    def evidence(self, b: int, t: int) -> jax.Array | None:
        """What the lowest layer is told about tokens, f32 [b, t, c], by policies whose layers pass on what they find
        (`Call.evidence`; `Seen.evidence`, or `Layer.passing` where there is a memory); None: they pass on nothing.
        What the t places are about, the policy says."""
        return None

    def mode(self, key: jax.Array, layers: int, b: int, h: int, t: int) -> Mode:
        """How decisions are made in training, drawn with this key."""
        return Mode()

    def train(self, call: Call) -> Seen:
        """What attention sees where there is no memory; keys and values may be rewritten."""
        return Seen(call.k, call.v)

    @property
    def learns(self) -> bool:
        """Whether it acts where there is no memory, and so can be trained."""
        return type(self).train is not Policy.train

    def init(self, sizes: Sizes, capacity: int, numbers: tuple[int, ...]) -> Layer:
        """The empty memory of a run of layers, stacked [n, ...], to which a prompt of up to `capacity` tokens per row
        can be given in one call. numbers: those of its n layers among the `sizes.layers` that have this policy."""
        raise NotImplementedError

    def settle(self, layers: Layer, length_b: jax.Array) -> Layer:
        """All layers of the policy, stacked, once prompts of these lengths are read as often as `passes` says."""
        return layers

    def tells(self, layer: Layer) -> jax.Array | None:
        """What a layer says of its entries to the others, [b, c], whenever further tokens are read; None: nothing.
        Such layers hold the same entries in the same places."""
        return None

    def hears(self, layer: Layer, told_lbc: jax.Array) -> Layer:
        """A layer, once all layers of the policy have said what they say."""
        return layer

    @property
    def agrees(self) -> bool:
        """Whether its layers decide together, so that tokens can only be read one after another."""
        return type(self).tells is not Policy.tells

    def expected(self, length: int) -> int:
        """Entries per head to expect of a text of so many tokens."""
        return length

    def describe(self) -> str:
        """The policy in a line of `info`."""
        return self.name

    def rules(self) -> tuple[Rule, ...]:
        """Published names, within a layer's attention, of what it learns; paths as in `spec`."""
        return ()

    def to_hf(self, family: str) -> dict[str, Any]:
        """Fields of the config.json of a model of this family. None for a policy that only says how models run."""
        return {}

    @classmethod
    def from_hf(cls, fields: Fields) -> Policy | None:
        """The policy that a config.json describes, or None. Raises AtomError for what makes no sense."""
        return None


@config.register
@dataclasses.dataclass(frozen=True)
class PerLayer:
    """A policy for every layer: `default`, and others (or None, the dense cache) at some layers.

    at: (layer, policy) pairs. Sliding layers keep their ring unless they are named.
    """

    default: Any = None
    at: tuple[Any, ...] = ()

    def __post_init__(self):
        if not isinstance(self.at, list | tuple) or any(
            not isinstance(pair, list | tuple) or len(pair) != 2 for pair in self.at
        ):
            raise AtomError(f"memory: expected pairs of a layer and a policy in at, got {self.at}")
        # JSON has lists, and policies as objects.
        read = lambda p: config.from_json(object, p, "memory.at") if isinstance(p, dict) else p  # noqa: E731
        object.__setattr__(self, "at", tuple((layer, read(policy)) for layer, policy in self.at))
        layers = [layer for layer, _ in self.at]
        if len(set(layers)) < len(layers) or any(type(n) is not int or n < 0 for n in layers):
            raise AtomError(f"memory: expected a different number from 0 on for every layer, got {layers}")

    def describe(self) -> str:
        """As of `Policy`."""
        say = lambda policy: "none" if policy is None else policy.describe()  # noqa: E731
        return ", ".join([say(self.default), *(f"layer {layer} {say(policy)}" for layer, policy in self.at)])


def policy_of(memory: Any, layer: int, kind: str = "full") -> Policy | None:
    """The policy of layer number `layer` of a model whose configuration has this `memory`; None: everything is kept,
    or, in a layer of kind "sliding", what its window shows. Raises AtomError for a policy that does not slide there.
    """
    if isinstance(memory, PerLayer) and (named := dict(memory.at).get(layer)) is not None:
        if kind == "sliding" and not named.slides:
            raise AtomError(f"memory: layer {layer} sees a window only, which {named.name} does not serve")
        return named
    if kind == "sliding":
        return None
    if isinstance(memory, PerLayer):
        return None if layer in dict(memory.at) else memory.default
    return memory


def policies_of(memory: Any) -> tuple[Policy, ...]:
    """All different policies that a configuration's `memory` names."""
    every = (memory.default, *(p for _, p in memory.at)) if isinstance(memory, PerLayer) else (memory,)
    return tuple(p for p in dict.fromkeys(every) if p is not None)


def fitted(memory: Any, tokenizer: Tokenizer | None, own: Any) -> Any:
    """A configuration's `memory` for a model with this tokenizer (None: without one), whose configuration has the
    memory `own` so far; see `Policy.fitted` and `Policy.over`."""
    if isinstance(memory, PerLayer):
        at = tuple((layer, fitted(policy, tokenizer, own)) for layer, policy in memory.at)
        return PerLayer(fitted(memory.default, tokenizer, own), at)
    if memory is None:
        return None
    memory = memory.over(policies_of(own))
    return memory if tokenizer is None else memory.fitted(tokenizer)
