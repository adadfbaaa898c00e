"""A small network that predicts where units end.

Dynamic token pooling (Nawrot et al., 2023, section 3): trained end to end through a relaxed Bernoulli variable, or
supervised by ends that the data supplies, or by spikes of the model's own entropy. MAGNET (Ahia et al., 2024): one
network, and one wanted rate, per script.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.chunking import scripts
from atom_jax.chunking.types import END, Boundary, Seen, Tree, ids_of, previous
from atom_jax.nn.attention import Tokens
from atom_jax.params import ParamSpec, constant, normal, zeros
from atom_jax.typing import AtomError

KIND = END
HAS_P = True


@config.register
@dataclasses.dataclass(frozen=True)
class Predictor:
    """Ends a unit where the predicted probability exceeds 1/2; see `calibrated` for "gumbel", which draws while it
    trains. (The official code draws whenever it is called.)"""

    # What it learns from: "gumbel" (the model's loss and a prior on the rate of marks), "marks" (`Seen.marks`) or
    # "entropy" (`late_loss`, once the model's entropies are known).
    supervision: str = "gumbel"
    # Marks per position that the prior expects ("gumbel").
    prior: float = 0.2
    # Of the relaxed Bernoulli variable ("gumbel").
    temperature: float = 0.5
    # Without noise, end units at the likeliest positions, as many as the prior expects ("gumbel"): above a threshold
    # that is learned along. False: at those likelier than 1/2, which in a young model are often none at all.
    calibrated: bool = True
    # Width of the hidden layer; 0 = twice the width of the states.
    hidden: int = 0
    # Factor on the rule's loss.
    weight: float = 1.0
    # Supervised losses take the probability for a logit, as the official code has it.
    double_sigmoid: bool = False
    # Names in `scripts.PREFIXES`: a predictor for each, chosen by the script of the latest letter.
    scripts: tuple[str, ...] = ()
    # `prior` of each script.
    priors: tuple[float, ...] = ()

    def __post_init__(self):
        rate = (0, 1)
        config.check(self, prior=rate, priors=rate, temperature=(0, 1e6), hidden=(0, 2**24), weight=(0, 1e6))
        if self.supervision not in ("gumbel", "marks", "entropy"):
            raise AtomError(f"supervision: expected gumbel, marks or entropy, got {self.supervision!r}")
        if self.temperature <= 0:
            raise AtomError(f"temperature: expected more than 0, got {self.temperature}")
        scripts.check(self.scripts)
        if len(self.priors) != len(self.scripts):
            raise AtomError(f"priors: expected one for each of {len(self.scripts)} scripts, got {len(self.priors)}")
        for prior in (self.prior, *self.priors):
            if not 0 < prior < 1:
                raise AtomError(f"prior: expected a rate between 0 and 1, got {prior}")

    def rates(self) -> tuple[float, ...]:
        """The prior of every predictor."""
        return self.priors or (self.prior,)


def spec(cfg: Predictor, d: int) -> Tree:
    """The networks of all c = max(1, scripts) predictors, side by side."""
    c, f = len(cfg.rates()), cfg.hidden or 2 * d
    start = zeros
    if cfg.supervision == "gumbel":
        # At the wanted rate from the first step: at 1/2, most marks would not fit the chunks there is room for.
        start = _per_script(tuple(math.log(a / (1 - a)) for a in cfg.rates()))
    tree = {"threshold": ParamSpec((c,), (None,), start)} if cfg.supervision == "gumbel" and cfg.calibrated else {}
    return tree | {
        "hidden": ParamSpec((c, d, f), (None, "embed", "mlp"), normal(0.02)),
        "hidden_bias": ParamSpec((c, f), (None, "mlp"), zeros),
        "out": ParamSpec((c, f), (None, "mlp"), normal(0.02)),
        "out_bias": ParamSpec((c,), (None,), start),
    }


def _per_script(values: tuple[float, ...]) -> Any:
    if len(set(values)) == 1:
        return constant(values[0])
    return lambda key, shape, dtype: jnp.asarray(values, dtype).reshape(shape)


def init_state(cfg: Predictor, d: int, b: int) -> Any:
    """The script of every row's latest letter; nothing without scripts."""
    return scripts.ScriptState.empty(b) if cfg.scripts else ()


def apply(p: Tree, seen: Seen, state: Any, *, cfg: Predictor) -> tuple[Boundary, Any]:
    """END marks, their probabilities and logits before noise (float32), and the loss of "gumbel" and "marks".

    `hard`, with the gradient of the relaxed variable, is set for "gumbel" only. Raises AtomError when scripts are
    to be told apart in a stage without ids, or "marks" has none while training.
    """
    real = seen.tokens.segments > 0
    script = jnp.zeros(real.shape, jnp.int32)
    if cfg.scripts:
        script, state = scripts.scripts_of(ids_of(seen, "Predictor with scripts"), seen.tokens, state, cfg.scripts)
    logit = _logits(p, seen.h, script)
    prob = jax.nn.sigmoid(logit)
    if cfg.supervision == "gumbel":
        if seen.key is not None:
            soft = relax(logit, jax.random.uniform(seen.key, logit.shape), cfg.temperature)
        else:
            above = logit - jax.lax.stop_gradient(p["threshold"])[script] if cfg.calibrated else logit
            soft = relax(above, None, cfg.temperature)
        mark = real & (soft > 0.5)
        hard = jnp.where(real, soft + jax.lax.stop_gradient(mark - soft), 0.0)
        loss = cfg.weight * binomial_loss(hard, real, script, cfg.rates())
        if cfg.calibrated:
            loss += quantile_loss(p["threshold"], jax.lax.stop_gradient(logit), real, script, cfg.rates())
        return Boundary(mark, p=prob, logit=logit, hard=hard, loss=loss), state
    boundary = Boundary(real & (prob > 0.5), p=prob, logit=logit)
    if cfg.supervision == "marks" and seen.marks is not None:
        return boundary.replace(loss=_supervised(boundary, seen.marks, real, cfg)), state
    if cfg.supervision == "marks" and seen.key is not None:
        raise AtomError("supervision: 'marks' needs unit ends from the data while training, and the batch has none")
    return boundary, state


def relax(logit: jax.Array, uniform: jax.Array | None, temperature: float) -> jax.Array:
    """A relaxed Bernoulli variable (Maddison et al., 2017) in (0, 1) from uniform noise in [0, 1); with None the
    noise that leaves the more likely side more likely: above 1/2 where the logit is above 0."""
    noise = jnp.zeros((), jnp.float32)
    if uniform is not None:
        eps = jnp.finfo(jnp.float32).eps
        uniform = jnp.clip(uniform, eps, 1 - eps)
        noise = jnp.log(uniform) - jnp.log1p(-uniform)
    return jax.nn.sigmoid((logit + noise) / temperature)


def binomial_loss(
    hard_bt: jax.Array, real_bt: jax.Array, script_bt: jax.Array, rates: tuple[float, ...]
) -> jax.Array:
    """Minus the log probability, per position, of as many marks as there are under Binomial(n, rate); f32 [].

    n and the marks are counted per row over real positions and, with several rates, per script; a row's log
    probability is divided by its number of real positions, and rows with any are averaged.
    """
    total, lgamma = jnp.zeros(hard_bt.shape[0], jnp.float32), jax.lax.lgamma
    for i, rate in enumerate(rates):
        mine = (real_bt & (script_bt == i)).astype(jnp.float32)
        n, k = jnp.sum(mine, axis=1), jnp.sum(hard_bt * mine, axis=1)
        ways = lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
        total += ways + k * math.log(rate) + (n - k) * math.log1p(-rate)
    length = jnp.sum(real_bt, axis=1, dtype=jnp.float32)
    return -jnp.sum(total / jnp.maximum(length, 1)) / jnp.maximum(jnp.sum(length > 0), 1)


def quantile_loss(
    threshold_c: jax.Array, logit_bt: jax.Array, real_bt: jax.Array, script_bt: jax.Array, rates: tuple[float, ...]
) -> jax.Array:
    """f32 [], least where a share `rates[i]` of the logits at real positions of script i is above `threshold_c[i]`:
    the check function of quantile regression (Koenker and Bassett, 1978), averaged over these positions; scripts are
    added up."""
    total = jnp.float32(0)
    for i, rate in enumerate(rates):
        mine = (real_bt & (script_bt == i)).astype(jnp.float32)
        above = logit_bt - threshold_c[i]
        loss = jnp.maximum((1 - rate) * above, -rate * above)
        total += jnp.sum(loss * mine) / jnp.maximum(jnp.sum(mine), 1)
    return total


def spikes(entropy_bt: jax.Array, tokens: Tokens) -> jax.Array:
    """bool [b, t]: entropy (any unit) above that of the one and of the two positions before, as far as they exist in
    the document and in this call; a document's first position always is one."""
    spike = tokens.segments > 0
    index = jnp.arange(entropy_bt.shape[1])[None]
    earlier = entropy_bt
    for back in (1, 2):
        earlier = previous(earlier, earlier[:, 0])
        spike &= (entropy_bt > earlier) | (jnp.minimum(tokens.positions, index) < back)
    return spike


def late(cfg: Predictor) -> str:
    """Supervision "entropy" waits for the model's output."""
    return "supervision: 'entropy'" if cfg.supervision == "entropy" else ""


def late_loss(boundary: Boundary, entropy_bt: jax.Array, tokens: Tokens, *, cfg: Predictor) -> jax.Array:
    """The weighted loss f32 [] of supervision "entropy": `entropy_bt` are the entropies of the model's own next-token
    distributions after each position, whose spikes the predictor is to find. No gradient reaches them."""
    return _supervised(boundary, spikes(entropy_bt, tokens), tokens.segments > 0, cfg)


def _supervised(boundary: Boundary, marks_bt: jax.Array, real_bt: jax.Array, cfg: Predictor) -> jax.Array:
    x = boundary.p if cfg.double_sigmoid else boundary.logit
    loss = jax.nn.softplus(x) - jnp.where(marks_bt, x, 0.0)
    return cfg.weight * jnp.sum(jnp.where(real_bt, loss, 0.0)) / jnp.maximum(jnp.sum(real_bt), 1)


def _logits(p: Tree, h_btd: jax.Array, script_bt: jax.Array) -> jax.Array:
    """f32 [b, t]. All predictors run everywhere and one is chosen: a few small products next to the model's own."""
    b, t, d = h_btd.shape
    h_nd = h_btd.astype(jnp.float32).reshape(b * t, d)

    def one(p: Tree) -> jax.Array:
        # Accelerators multiply float32 matrices in bfloat16 unless told otherwise; that flips decisions near 1/2.
        with jax.default_matmul_precision("highest"):
            x_nf = h_nd @ p["hidden"].astype(jnp.float32)
            x_nf = jax.nn.gelu(x_nf + jnp.broadcast_to(p["hidden_bias"][None], x_nf.shape), approximate=False)
            return (x_nf @ p["out"].astype(jnp.float32) + p["out_bias"]).reshape(b, t)

    logit_cbt = jax.lax.map(one, p)
    return jnp.take_along_axis(logit_cbt, script_bt[None], axis=0)[0]
