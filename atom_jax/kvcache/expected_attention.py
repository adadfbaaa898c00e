"""Expected attention (Devoto et al., 2025): what queries to come will attend to, if like the past ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from atom_jax import config
from atom_jax.kvcache.budget import Budget, Entries
from atom_jax.kvcache.layer import Call
from atom_jax.nn import rope
from atom_jax.typing import AtomError
from pallas_kernels.dispatch import NEGATIVE


@config.register
@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Budget):
    """Score: expected attention under a normal distribution of queries before RoPE, fitted to the prompt's (without
    the sinks), at the mean rotation of the next `future` positions; plus eps, times the norm of the value. Tokens
    after the prompt stay, as in SnapKV."""

    name: ClassVar[str] = "expected_attention"
    sinks: int = 4
    future: int = 512
    eps: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.future < 1 or self.eps < 0:
            raise AtomError(f"memory {self.name}: expected future of at least 1 and eps of at least 0")

    def prompt(self, entries: Entries, call: Call) -> jax.Array:
        """Expected attention to every key, softmax over all but the sinks, mean over the group."""
        size, k = call.k.shape[-1], call.k.astype(jnp.float32)
        mean, cov = self.queries(call)
        valid = entries.pos >= self.sinks

        def expected(of: tuple[jax.Array, jax.Array]) -> jax.Array:
            mean_bhk, cov_bhkl = of
            spread = (jnp.einsum("bhsk,bhkl->bhsl", k, cov_bhkl) * k).sum(-1)
            scores = jnp.einsum("bhsk,bhk->bhs", k, mean_bhk) * size**-0.5 + spread / (2 * size)
            return jax.nn.softmax(jnp.where(valid, scores, NEGATIVE), axis=-1)

        heads = jax.lax.map(expected, (jnp.moveaxis(mean, 2, 0), jnp.moveaxis(cov, 2, 0)))
        return (heads.mean(0) + self.eps) * jnp.linalg.norm(call.v.astype(jnp.float32), axis=-1)

    def queries(self, call: Call) -> tuple[jax.Array, jax.Array]:
        """Mean [b, h, g, k] and covariance [b, h, g, k, k] of queries to come, float32, after RoPE."""
        t, size = call.q.shape[3:]
        turned, (theta, scaling) = size if call.rotary is None else call.rotary, call.rope
        factor = rope.frequencies(turned, theta, scaling)[1]
        cos, sin = (x[:, None, None, :, 0] for x in rope.tables(call.tokens.positions, turned, theta, scaling))
        q = rope.rotate(call.q.astype(jnp.float32), cos, -sin) / factor**2
        index = jnp.arange(t)[None]
        used = (call.real & (index >= self.sinks)).astype(jnp.float32)
        count = jnp.maximum(used.sum(1), 1.0)[:, None, None, None]
        mean = jnp.einsum("bhgtk,bt->bhgk", q, used) / count
        q = (q - mean[..., None, :]) * used[:, None, None, :, None]
        cov = jnp.einsum("bhgtk,bhgtl->bhgkl", q, q) / count[..., None]
        ahead = call.after[:, None] + jnp.arange(self.future)[None]
        turn = [x.mean(1)[:, None, None] for x in rope.tables(ahead, turned, theta, scaling)]
        mean = rope.rotate(mean[..., None, :], *turn)[..., 0, :]
        cov = rope.rotate(jnp.swapaxes(rope.rotate(cov, *turn), -1, -2), *turn)
        return mean, cov
