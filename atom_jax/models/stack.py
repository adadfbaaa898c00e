"""Isotropic stacks: layers spelled by a layout string, the parts that hierarchical models are made of.

A layout such as "T1m4" lists runs of equal layers (H-Net, Hwang et al. 2025, section 2 and its released code); the
letters are those of `mixers`. A stack of pre-norm layers ends with a norm.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import params
from atom_jax.kvcache.layer import stack_layers
from atom_jax.kvcache.memory import Stack
from atom_jax.kvcache.policy import policy_of
from atom_jax.models import attention, layers
from atom_jax.models.attention import Attention, Context
from atom_jax.models.mixers import MIXERS, Mixer, Width
from atom_jax.nn.linear import project
from atom_jax.nn.norm import rms_norm
from atom_jax.params import ParamSpec, Tree, normal, ones
from atom_jax.sharding import constrain, share
from atom_jax.typing import AtomError


@dataclasses.dataclass(frozen=True)
class Part:
    """A run of equal letters of a layout, and the kind of each of its layers (`Mixer.kind`). first: number of the
    first one among the model's attention layers, in the order in which they are computed."""

    letter: str
    kinds: tuple
    first: int = 0

    @property
    def mixer(self) -> Mixer:
        """How these layers work."""
        return MIXERS[self.letter]


def parse(layout: str) -> tuple[tuple[str, int], ...]:
    """("T", 1), ("m", 4) for "T1m4"; AtomError for anything else than letters of the table of mixers with counts
    below 10000."""
    letters = "".join(MIXERS)
    if not re.fullmatch(rf"([{letters}]\d{{1,4}})*", layout):
        raise AtomError(f"layout {layout!r}: expected letters of {letters!r}, each with a count, such as 'T1m4'")
    return tuple((letter, int(n)) for letter, n in re.findall(r"(\w)(\d+)", layout) if int(n))


def height(layout: str) -> int:
    """Number of additions to the residual stream."""
    return sum(n * (2 if MIXERS[letter].mlp else 1) for letter, n in parse(layout))


def parts(layouts: Iterable[str], widths: Iterable[Width], memory: Any) -> tuple[tuple[Part, ...], ...]:
    """The runs of all stacks of a model, in the order in which they are computed. memory: the cache policy of layers
    whose queries see all (or one for every layer), or None."""
    number, out = 0, []
    for layout, width in zip(layouts, widths, strict=True):
        runs, sees = [], "full" if width.window < 0 else "sliding"
        for letter, n in parse(layout):
            mixer = MIXERS[letter]
            # Layers of other kinds have no number of their own.
            counts = isinstance(mixer.kind(width, None), Attention)
            chosen = (policy_of(memory, number + i, sees) if counts else None for i in range(n))
            kinds = tuple(mixer.kind(width, policy) for policy in chosen)
            if attention.evidence(kinds, 1, 1) is not None:
                raise AtomError("memory: layers of a stack of several kinds pass no evidence on; make shared 0")
            runs.append(Part(letter, kinds, number))
            number += n * counts
        out.append(tuple(runs))
    return tuple(out)


def stack_spec(runs: tuple[Part, ...], width: Width, out_scale: float) -> Tree:
    """Parameters: one stacked tree per run ("0", "1", ...), and the final norm.

    out_scale: factor on the initial values of the matrices that write to the residual stream.
    """
    tree = {str(i): params.stack(_layer_spec(run, width, out_scale), len(run.kinds)) for i, run in enumerate(runs)}
    return tree if _whole(runs) else tree | {"norm": ParamSpec((width.d,), (None,), ones)}


def _whole(runs: tuple[Part, ...]) -> bool:
    return any(run.mixer.whole for run in runs)


def _layer_spec(run: Part, width: Width, out_scale: float) -> Tree:
    d, mixer = width.d, attention.with_learned(run.mixer.spec(width, out_scale), run.kinds)
    if run.mixer.whole:
        return mixer
    layer = {"norm1": ParamSpec((d,), (None,), ones), "mixer": mixer}
    if run.mixer.mlp:
        f = -(-width.f // 128) * 128
        layer["norm2"] = ParamSpec((d,), (None,), ones)
        layer["mlp"] = {
            "fc1": ParamSpec((d, 2, f), ("embed", "parts", "mlp"), normal(width.std)),
            "fc2": ParamSpec((f, d), ("mlp", "embed"), normal(width.std * out_scale)),
        }
    return layer


def init_states(stacks: tuple[tuple[Part, ...], ...], width: Width, b: int, capacity: int, dtype: Any) -> tuple:
    """Empty memory of every run of a stage's stacks, with room for `capacity` positions of b rows."""
    ranks = iter(attention.ranks(kind for runs in stacks for run in runs for kind in run.kinds))

    def of(run: Part) -> tuple:
        mine = [next(ranks) for _ in run.kinds]

        def empty(kind: Any, numbers: tuple[int, ...]) -> Stack:
            if isinstance(kind, Attention):
                return kind.empty([mine[n] for n in numbers], b, capacity, dtype)
            return Stack(stack_layers(run.mixer.empty(width, b, capacity, dtype), len(numbers)))

        return layers.states(run.kinds, empty)

    return tuple(tuple(map(of, runs)) for runs in stacks)


def apply_stack(
    p: Tree, runs: tuple[Part, ...], width: Width, x_btd: jax.Array, states: tuple | None, context: Context
) -> tuple[jax.Array, tuple | None, dict[str, Any]]:
    """Runs the layers over x [b, t, d]: the result has its dtype. `states` is None without memory. Returns the states
    afterwards too, and what layers reported, by name, run by run."""
    dtype, new, reports = x_btd.dtype, [], {}
    if not _whole(runs):
        x_btd = x_btd.astype(jnp.float32)
    for i, run in enumerate(runs):
        key = None if context.key is None else jax.random.fold_in(context.key, run.first)
        here, others = dataclasses.replace(context, key=key).over(run.kinds, run.first)
        layer = functools.partial(_layer, run.mixer, width, here, dtype)
        x_btd, state, said = layers.run_layers(
            layer, run.kinds, p[str(i)], x_btd, None if states is None else states[i], others, context.remat
        )
        new.append(state)
        reports |= {name: (*reports.get(name, ()), value) for name, value in said.items()}
    if "norm" in p:
        x_btd = rms_norm(x_btd, p["norm"], width.eps)
    x_btd = constrain(x_btd.astype(dtype), "batch", "length", None)
    return x_btd, None if states is None else tuple(new), reports


def _layer(
    mixer: Mixer, width: Width, context: Context, dtype: Any,
    kind: Any, p: Tree, x: jax.Array, state: Any, others: tuple,
) -> tuple[jax.Array, Any, dict[str, Any]]:  # fmt: skip
    p = p if mixer.exact else params.cast(p, dtype)
    if mixer.whole:
        return mixer.apply(p, x, x, state, kind, width, context, others)
    y = constrain(rms_norm(x, p["norm1"], width.eps).astype(dtype), "batch", "length", None)
    y, state, report = mixer.apply(p["mixer"], x, y, state, kind, width, context, others)
    x = x + share(y).astype(x.dtype)
    if mixer.mlp:
        y = constrain(rms_norm(x, p["norm2"], width.eps).astype(dtype), "batch", "length", None)
        up, gate = (both[:, :, 0] for both in jnp.split(project(y, p["mlp"]["fc1"]), 2, axis=2))
        y = project(constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp"), p["mlp"]["fc2"])
        x = x + share(y).astype(x.dtype)
    return constrain(x, "batch", "stored_length", None), state, report


def laid_out(p: Tree, runs: tuple[Part, ...], unroll: bool) -> Tree:
    """Parameters of a stack for generation; unroll: of separate layers."""
    out = {str(i): layers.laid_out(run.kinds, p[str(i)], _lay, unroll) for i, run in enumerate(runs)}
    return out | {name: x for name, x in p.items() if name not in out}


def _lay(kind: Any, p: Tree) -> Tree:
    return {**p, "mixer": attention.laid_out(kind, p["mixer"])} if isinstance(kind, Attention) else p
