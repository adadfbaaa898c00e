"""Optimisers: which parameters learn, at what rate, and with which rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from atom_jax import params as params_lib
from atom_jax.fields import Expression
from atom_jax.params import ParamSpec, Tree
from atom_jax.training.config import OptimConfig
from atom_jax.typing import AtomError

# Axes along which a parameter is many matrices.
_SEPARATE = ("layers", "parts")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation at learning rate 1, and what scales its updates.

    factors: learning-rate factor of every parameter by path; 0 = frozen.
    schedule: step (from 0) -> learning rate.
    """

    transform: optax.GradientTransformation
    schedule: Callable[[Any], jax.Array]
    factors: dict[str, float]

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(parameters that learn, frozen parameters), each a tree without the other's leaves."""
        leaves = params_lib.flatten(params)
        learn = {k: v for k, v in leaves.items() if self.factors[k]}
        rest = {k: v for k, v in leaves.items() if not self.factors[k]}
        return params_lib.unflatten(learn), params_lib.unflatten(rest)

    def update(self, grads: Tree, opt: Any, params: Tree, step: jax.Array) -> tuple[Tree, Any]:
        """New values of the parameters that learn, and the new state."""
        updates, opt = self.transform.update(grads, opt, params)
        rate = self.schedule(step)
        new = {
            k: p + (self.factors[k] * rate * u).astype(p.dtype)
            for (k, p), u in zip(params_lib.flatten(params).items(), jax.tree.leaves(updates), strict=True)
        }
        return params_lib.unflatten(new), opt


def merge(learn: Tree, frozen: Tree) -> Tree:
    """The inverse of `Optimizer.split`."""
    return params_lib.unflatten(params_lib.flatten(learn) | params_lib.flatten(frozen))


def make(cfg: OptimConfig, spec: Tree, steps: int) -> Optimizer:
    """The optimiser of a run of `steps` steps over the parameters that `spec` describes."""
    factors = _factors(cfg, spec)
    learn = {k: s for k, s in params_lib.flatten(spec).items() if factors[k]}
    if not learn:
        raise AtomError("optim.groups: every parameter is frozen")
    matrices = params_lib.unflatten({k: is_matrix(s) for k, s in learn.items()})
    if cfg.optimizer == "muon":
        dims = params_lib.unflatten({k: _muon_dims(s) if is_matrix(s) else None for k, s in learn.items()})
        # consistent_rms gives updates the size of Adam's, so that one learning rate suits both rules.
        rule = muon(
            1.0, eps=cfg.eps, weight_decay=cfg.weight_decay, adam_b1=cfg.b1, adam_b2=cfg.b2,
            muon_weight_dimension_numbers=dims, consistent_rms=0.2,
        )  # fmt: skip
    else:
        decayed = matrices
        if cfg.decay_pattern:
            hits = _matching(cfg.decay_pattern, learn, "decay_pattern")
            decayed = params_lib.unflatten({k: k in hits for k in learn})
        rule = optax.adamw(1.0, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decayed)
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    return Optimizer(optax.chain(clip, rule), make_schedule(cfg, steps), factors)


def make_schedule(cfg: OptimConfig, steps: int) -> Callable[[Any], jax.Array]:
    """Learning rate as a function of the step, from 0; the warm-up's first step is already above zero."""
    peak, warmup = cfg.learning_rate, min(cfg.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    rise = optax.linear_schedule(peak / (warmup + 1), peak, max(warmup, 1))
    if cfg.schedule == "cosine":
        parts, joints = [rise, optax.cosine_decay_schedule(peak, rest, cfg.final_fraction)], [warmup]
    elif cfg.schedule == "wsd":
        decay = max(min(round(cfg.decay_fraction * steps), rest), 1)
        fall = optax.linear_schedule(peak, cfg.final_fraction * peak, decay)
        parts, joints = [rise, optax.constant_schedule(peak), fall], [warmup, steps - decay]
    else:
        parts, joints = [rise, optax.constant_schedule(peak)], [warmup]
    schedule = optax.join_schedules(parts, joints)
    return lambda step: jnp.asarray(schedule(step), jnp.float32)


def is_matrix(s: ParamSpec) -> bool:
    """True for a linear map between activations: rank two or more per layer, without an axis of a vocabulary or of
    the taps of a convolution."""
    axes = [a for a in s.axes if a not in _SEPARATE]
    return len(axes) >= 2 and not {"vocab", "taps"} & set(axes)


def _muon_dims(s: ParamSpec) -> MuonDimensionNumbers:
    """One side is the model width, the other all the rest (heads and head size are one side together); layers, and
    the parts of a fused projection, are separate matrices. Which side is the input doesn't matter: the rule commutes
    with transposition."""
    axes = [i for i, a in enumerate(s.axes) if a not in _SEPARATE]
    width = [i for i in axes if s.axes[i] == "embed"][:1] or axes[:1]
    return MuonDimensionNumbers(tuple(width), tuple(i for i in axes if i not in width))


def _factors(cfg: OptimConfig, spec: Tree) -> dict[str, float]:
    factors = dict.fromkeys(params_lib.flatten(spec), 1.0)
    for group in reversed(cfg.groups):
        factors.update(dict.fromkeys(_matching(group.pattern, factors, "groups"), group.factor))
    return factors


def _matching(pattern: str, paths: Iterable[str], field: str) -> set[str]:
    """The paths that a regular expression matches as a whole; AtomError when there are none."""
    known = Expression(pattern, f"optim.{field}")
    hits = {k for k in paths if known.matches(k)}
    if not hits:
        raise AtomError(f"optim.{field}: {pattern!r} matches none of {', '.join(paths)}")
    return hits
