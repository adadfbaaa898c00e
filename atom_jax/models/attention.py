"""The attention block of every model: projections, norms, RoPE, what its memory does on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import params
from atom_jax.kvcache import policies
from atom_jax.kvcache.layer import Call, Sizes
from atom_jax.kvcache.memory import Stack
from atom_jax.kvcache.policy import Heads, Mode, Policy
from atom_jax.nn import rope
from atom_jax.nn.attention import Tokens
from atom_jax.nn.linear import project
from atom_jax.nn.norm import rms_norm
from atom_jax.nn.self_attention import self_attend
from atom_jax.params import ParamSpec, Tree
from atom_jax.sharding import constrain
from atom_jax.typing import AtomError

# What a layer without a policy has in its place.
PLAIN = Policy()

# (parameters of the layer's attention, what it knows before RoPE, its Call) -> a pytree of arrays.
Probe = Callable[[Tree, Heads, Call], Any]


@dataclasses.dataclass(frozen=True)
class Attention:
    """What sets an attention layer apart from others.

    n, h: query heads, key/value heads. k: size of a head. rotary: channels of every head that RoPE turns, with these
    (theta, scaling). window: positions that a query sees, its own included (None: all before it). eps: of norms.
    policy: what is kept of keys and values; None: all that queries may still see.
    """

    n: int
    h: int
    k: int
    rotary: int
    rope: tuple
    window: int | None
    eps: float
    policy: Policy | None

    def empty(self, ranks: list[tuple[int, int]], b: int, capacity: int, dtype: Any) -> Stack:
        """Empty memories of layers with these `ranks`, with room for `capacity` positions of b rows."""
        sizes = Sizes(ranks[0][0], b, self.h, self.n // self.h, self.k, dtype, self.rope)
        return policies.empty(self.policy, sizes, capacity, tuple(number for _, number in ranks), self.window)


@dataclasses.dataclass
class Context:
    """What the layers of one call share.

    tokens: where the positions stand. length: i32 [b], positions that the memory holds already; None without memory.
    fresh: nothing is stored yet. reading: how often the positions were read before. ids: i32 [b, t], of the tokens;
    where positions are units, those at their marks (`chunking.Plan.ids`). mode: how decisions are made without
    memory, with a leading layer axis; None: as policies draw them with `key`, or, without one, hard. probe: called in
    every layer without memory, its results are reported as "probe". tentative: memory is read as it is, and in place
    of a new one layers return what is to be stored. shared: parameters that all layers have in common. remat:
    activations are computed again in the backward pass. tables, modes: see `over`.
    """

    tokens: Tokens
    length: jax.Array | None = None
    fresh: bool = False
    reading: int = 0
    ids: jax.Array | None = None
    mode: Mode | None = None
    key: jax.Array | None = None
    probe: Probe | None = None
    tentative: bool = False
    shared: Any = None
    remat: bool = False
    tables: dict[tuple, tuple[jax.Array, jax.Array]] = dataclasses.field(default_factory=dict)
    modes: dict[Policy, Mode] = dataclasses.field(default_factory=dict)

    def over(self, kinds: tuple, first: int = 0) -> tuple[Context, tuple]:
        """The context of a stack of layers, with RoPE's cosines and sines and the modes of policies; and what each
        layer needs besides, with the layers in front: its number, from `first` on, and the noise of the modes."""
        attentions = [kind for kind in kinds if isinstance(kind, Attention)]
        turns = dict.fromkeys((a.rotary, a.rope) for a in attentions if a.rotary)
        tables = {(r, of): rope.tables(self.tokens.positions, r, *of) for r, of in turns}
        modes, (b, t) = {}, self.tokens.positions.shape
        for policy, h in {a.policy: a.h for a in attentions if a.policy is not None}.items():
            drawn = Mode() if self.key is None else policy.mode(self.key, len(kinds), b, h, t)
            modes[policy] = drawn if self.mode is None else self.mode
        others = first + jnp.arange(len(kinds), dtype=jnp.int32), tuple(mode.noise for mode in modes.values())
        return dataclasses.replace(self, tables=tables, modes=modes), others

    def mode_of(self, policy: Policy, noise: tuple) -> Mode:
        """How a policy decides in the layer with this noise of all modes."""
        mode = self.modes.get(policy)
        return Mode() if mode is None else mode.replace(noise=noise[list(self.modes).index(policy)])


def ranks(kinds: Iterable[Any]) -> list[tuple[int, int]]:
    """Of every layer how many there are of its policy, and its number among these."""
    seen: list[Any] = [kind.policy if isinstance(kind, Attention) else None for kind in kinds]
    return [(seen.count(policy), seen[:i].count(policy)) for i, policy in enumerate(seen)]


def evidence(kinds: Iterable[Any], b: int, t: int) -> jax.Array | None:
    """What the lowest layer of a stack is told, as its policies have it. Raises AtomError where two of them tell."""
    every = dict.fromkeys(kind.policy for kind in kinds if isinstance(kind, Attention) and kind.policy)
    found = [told for policy in every if (told := policy.evidence(b, t)) is not None]
    if len(found) > 1:
        raise AtomError("memory: layers pass on evidence by two different policies; one may")
    return found[0] if found else None


def attention(
    p: Tree, x_btd: jax.Array, y_btd: jax.Array, state: Any, kind: Attention, context: Context, others: tuple,
    told: jax.Array | None = None,
) -> tuple[jax.Array, Any, dict[str, Any], jax.Array | None]:  # fmt: skip
    """Attention of one layer: outputs [b, t, d], the memory afterwards, what is to be reported, by name, and what the
    layer above is told.

    p: "q", "k", "v" [d, heads, k], or all of them as "qkv" [d, 3, n, k], as H-Nets have it, and "o" [n, k,
      d]; "q_norm" and "k_norm", of a head's size or of all heads' together; parameters that the policy has learned,
      under `Policy.learned_as`.
    x_btd: the residual stream at the layer's input. y_btd: what the projections read. others: see `Context.over`.
    told: evidence of the layers below, in stacks whose policies have any.
    """
    policy, tokens, (number, noise) = kind.policy or PLAIN, context.tokens, others
    mode = context.mode_of(policy, noise)
    learned = p.get(policy.learned_as)
    if learned is not None:
        p = policy.projections(separate(p), mode)
    q, k, v = _projections(p, y_btd, kind)
    heads = Heads(x_btd, q, k, v, tokens, context.ids, number, kind.eps)
    plain, table = k, context.tables.get((kind.rotary, kind.rope))
    q, k, v, said = policy.prepare(heads, learned, lambda x: x if table is None else rope.rotate(x, *table), mode)
    b, t, n, size = q.shape
    passes_on = told is not None and policy.evidence(b, t) is not None
    q = q.reshape(b, t, kind.h, -1, size).transpose(0, 2, 3, 1, 4)
    plain, k, v = (a.transpose(0, 2, 1, 3) for a in (plain, k, v))
    call = Call(
        q, k, v, tokens, jnp.zeros(b, jnp.int32) if state is None else context.length,
        k_plain=plain, ids=context.ids, said=said, evidence=told if passes_on else None, learned=learned,
        derived=p["derived"] if "derived" in p else policy.derive(separate(p)), layer=number, mode=mode,
        window=kind.window, fresh=context.fresh, reading=context.reading, rope=kind.rope,
        rotary=kind.rotary,
    )  # fmt: skip
    report = {}
    if state is None:
        seen = policy.train(call)
        report |= seen.aux
        told = seen.evidence if passes_on else told
        if context.probe is not None:
            report["probe"] = context.probe(p, heads, call)
        out = self_attend(
            q, seen.k, seen.v, tokens, window=kind.window, keep_bht=seen.keep, keep_window=seen.keep_window,
            bias_bht=seen.bias, newest=seen.newest,
        )  # fmt: skip
    elif passes_on:
        out, after, told = state.passing(call)
        state = call if context.tentative else after
    elif context.tentative:
        out, state = state.attend(call), call
    else:
        out, state = state.extend(call)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, size)
    return project(out, p["o"], inputs=2), state, report, told


def _projections(p: Tree, x_btd: jax.Array, kind: Attention) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [b, t, n, k], keys and values [b, t, h, k], normalised where there are weights for it."""
    if "qkv" not in p:
        q, k, v = (constrain(project(x_btd, p[name]), "batch", "length", "heads", None) for name in "qkv")
    else:
        qkv = constrain(project(x_btd, p["qkv"]), "batch", "length", None, "heads", None)
        q, k, v = (a[:, :, 0] for a in jnp.split(qkv, 3, axis=2))
    return _normalise(q, p.get("q_norm"), kind.eps), _normalise(k, p.get("k_norm"), kind.eps), v


def _normalise(x_btnk: jax.Array, weight: jax.Array | None, eps: float) -> jax.Array:
    """RMS normalisation over a head or over all heads, by the size of `weight`; none without one."""
    if weight is None:
        return x_btnk
    if weight.shape[0] == x_btnk.shape[-1]:
        return rms_norm(x_btnk, weight, eps)
    return rms_norm(x_btnk.reshape(*x_btnk.shape[:2], -1), weight, eps).reshape(x_btnk.shape)


def separate(p: Tree) -> Tree:
    """The same parameters with "q", "k" and "v" [d, heads, k] in place of "qkv" [d, 3, n, k]."""
    if "qkv" not in p:
        return p
    parts = {name: p["qkv"][:, i] for i, name in enumerate("qkv")}
    return {**{name: x for name, x in p.items() if name != "qkv"}, **parts}


def laid_out(kind: Attention, p: Tree) -> Tree:
    """Parameters of one attention layer for generation: as its policy has them, or, where that changes nothing, as
    they are."""
    if kind.policy is None:
        return p
    parts = separate(p)
    out = kind.policy.laid_out(parts)
    return p if out is parts else out


def with_learned(attn: Tree, kinds: Iterable[Any]) -> Tree:
    """ParamSpecs of an attention layer, and of what the policies of a stack with these kinds of layers learn in it:
    stacked layers have equal parameters, used or not. Raises AtomError where policies ask for different ones."""
    qkv = attn.get("qkv")
    projections = attn
    if qkv is not None:
        part = ParamSpec((qkv.shape[0], *qkv.shape[2:]), (qkv.axes[0], *qkv.axes[2:]), qkv.init, qkv.dtype)
        projections = {**attn, **dict.fromkeys("qkv", part)}
    learned: Tree = {}
    for policy in dict.fromkeys(k.policy for k in kinds if isinstance(k, Attention) and k.policy):
        spec = policy.spec(projections)
        name = policy.learned_as
        if spec and name in learned and _shapes(learned[name]) != _shapes(spec):
            raise AtomError(f"memory: the layers' {name} policies have different parameters")
        learned |= {name: spec} if spec else {}
    return attn | learned


def _shapes(spec: Tree) -> dict[str, tuple[int, ...]]:
    return {name: one.shape for name, one in params.flatten(spec).items()}
