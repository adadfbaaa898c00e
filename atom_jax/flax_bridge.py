"""The models as Flax modules, for code that is built on them: `LinenLM` (flax.linen) and `NnxLM` (flax.nnx).

Both hold the parameters as the same tree that `models.registry` describes, under one name, and compute what the
functions compute. Parameters go in and out without a copy:

    variables = to_linen(lm.params);  params = from_linen(variables)
    module = NnxLM(lm.config, lm.params);  params = module.tree()
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from atom_jax import params
from atom_jax.models import registry
from atom_jax.typing import AtomError, Batch, Output

_NAME = "lm"


class LinenLM(linen.Module):
    """A model as a linen module: variables {"params": {"lm": tree}}.

    config: a model configuration, for example models.transformer.TransformerConfig.
    """

    config: Any

    @linen.compact
    def __call__(self, batch: Batch | jax.Array, mask: jax.Array | None = None) -> Output:
        """Output with logits float32 [b, t, v].

        batch: a Batch, or ids i32 [b, t], where mask bool [b, t] is True at real positions (None: all are).
        """
        spec = registry.of(self.config).spec(self.config)
        tree = self.param(_NAME, lambda key: params.init(key, spec))
        return registry.of(self.config).apply(tree, as_batch(batch, mask), cfg=self.config)[0]


def to_linen(tree: params.Tree) -> dict[str, Any]:
    """The variables of a LinenLM with these parameters."""
    return {"params": {_NAME: tree}}


def from_linen(variables: dict[str, Any]) -> params.Tree:
    """The parameters in the variables of a LinenLM. Raises AtomError when they belong to another module."""
    try:
        return variables["params"][_NAME]
    except (KeyError, TypeError):
        raise AtomError(f"these variables are not a LinenLM's: they have no params/{_NAME}") from None


class NnxLM(nnx.Module):
    """A model as an nnx module; every parameter is an nnx.Param, found at `module.lm`."""

    def __init__(self, config: Any, tree: params.Tree | None = None, *, rngs: nnx.Rngs | None = None):
        """Holds the parameters `tree`, or initial ones drawn from the stream `rngs.params`.

        Raises AtomError when neither is given, or when the parameters don't fit the configuration.
        """
        spec = registry.of(config).spec(config)
        if tree is None:
            if rngs is None:
                raise AtomError("NnxLM needs parameters, or rngs to draw them from")
            tree = params.init(rngs.params(), spec)
        if jax.tree.map(jnp.shape, tree) != jax.tree.map(jnp.shape, params.abstract(spec)):
            raise AtomError(f"the parameters don't have the names and shapes that this {type(config).__name__} needs")
        self.config = config
        self.lm = nnx.data(jax.tree.map(nnx.Param, tree))

    def tree(self) -> params.Tree:
        """The parameters as the plain tree that the functions take."""
        return jax.tree.map(lambda p: p[...], self.lm, is_leaf=lambda x: isinstance(x, nnx.Variable))

    def __call__(self, batch: Batch | jax.Array, mask: jax.Array | None = None) -> Output:
        """As LinenLM."""
        return registry.of(self.config).apply(self.tree(), as_batch(batch, mask), cfg=self.config)[0]


def as_batch(batch: Batch | jax.Array, mask: jax.Array | None = None) -> Batch:
    """A Batch from ids i32 [b, t] and a mask bool [b, t] (True: real); a Batch is returned as it is."""
    if isinstance(batch, Batch):
        return batch
    real = jnp.ones(batch.shape, bool) if mask is None else mask
    positions = jnp.maximum(jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1, 0)
    return Batch(ids=batch, positions=positions, segments=real.astype(jnp.int32))
