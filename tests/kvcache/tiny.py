"""Policies for which short texts are too long."""

import dataclasses

from atom_jax.kvcache.policy import Policy


def small(kind: type[Policy], budget: int = 3, **more) -> Policy:
    """A policy of this kind that keeps about `budget` tokens. more: further fields, of the kinds that have them."""
    fields = {
        "budget": budget, "window": budget // 2, "sinks": 1, "page": 2, "least": budget // 3, "beta": 3,
        "floor": 0.4, "future": 5, "eps": 0.01, "offset": 0.0, "scale": 1.0,
        "every": budget + 1, "share": 0.8,
    } | more  # fmt: skip
    return kind(**{f.name: fields[f.name] for f in dataclasses.fields(kind) if f.name in fields})
