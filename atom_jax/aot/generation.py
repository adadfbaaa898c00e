"""What generation needs on chips that nobody has to have: its programs are compiled as `generate` does, and not
executed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from atom_jax import checkpoint, sharding
from atom_jax import params as params_lib
from atom_jax.aot.report import Chips, Report
from atom_jax.aot.topology import per_chip
from atom_jax.checkpoint import adapters
from atom_jax.kvcache.dense import bucket
from atom_jax.models import lora, registry
from atom_jax.session import decode, reading, sampling
from atom_jax.session.session import LEAST, ROOM
from atom_jax.sharding import MeshConfig
from atom_jax.training import start
from atom_jax.typing import LM, AtomError, Suffix


class Loaded(Chips):
    """Chips with a model's parameters in its compute dtype.

    lm: its parameters are not looked at. topology, mesh, errors: as of `Chips`; and AtomError for a model that looks
    at subwords without its tokenizer.
    """

    def __init__(self, lm: LM, topology: str | None, mesh: MeshConfig | None = None):
        super().__init__(topology, mesh)
        self.codec = registry.of(lm.config).codec(lm.config)
        self.beside = self.codec.beside(lm.tokenizer)
        if self.codec.looks and not self.beside:
            raise AtomError("--compile_only: the model looks at subwords, and their tokenizer is not there")
        self.spec = registry.of(lm.config).spec(lm.config)
        self.params = at(_shapes(lm.config), sharding.shardings(self.spec, self.mesh))

    def rows(self, tree: Any) -> Any:
        """Shapes of arrays whose rows are spread as those of a batch."""
        return jax.tree.map(lambda x: at(x, sharding.batch_sharding(self.mesh)), tree)

    def whole(self, tree: Any) -> Any:
        """Shapes of arrays of which every chip has all."""
        return jax.tree.map(lambda x: at(x, NamedSharding(self.mesh, P())), tree)

    def ints(self, *shape: int) -> jax.ShapeDtypeStruct:
        """int32 on every chip."""
        return self.whole(jax.ShapeDtypeStruct(shape, jnp.int32))

    def suffix(self, rows: int, length: int) -> Suffix | None:
        """The subwords of a batch, for models that look at them."""
        return Suffix(self.ints(rows, length), self.ints(rows)) if self.codec.looks else None

    def done(self, what: str) -> Report:
        """All programs so far. what: they compute."""
        return self.report(params_lib.count(self.spec), per_chip(self.params), what)


def at(shapes: Any, places: Any) -> Any:
    """Shapes of arrays that lie at `places`."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def described(path: str | None, reference: str | None, adapter: str | None = None) -> LM:
    """The model of a checkpoint, or of a configuration file (FILE.py:variant), with shapes for its parameters; with
    the evictors of an adapter."""
    if (path is None) == (reference is None):
        raise AtomError("--compile_only: expected either --checkpoint or --config")
    if path is not None:
        cfg, tokenizer = checkpoint.load_config(path, adapter)
    else:
        exp = start.configure(reference, [])
        looks = registry.of(exp.model).codec(exp.model).looks
        cfg, tokenizer = lora.without(exp.model), start.tokenizer(exp) if looks else None
        for one in adapters.listed(adapter):
            cfg = adapters.described(cfg, one)
    return LM(cfg, _shapes(cfg), tokenizer)


def generation(lm: LM, rows: int, length: int, topology: str | None, mesh: MeshConfig | None = None) -> Report:
    """What reading prompts and making tokens needs.

    lm: its parameters are not looked at. rows, length: of the batch; a prompt's length in tokens. topology: as in
    `topology.devices`. Memory that is compacted while it reads is taken to keep what its policy expects. Errors: as
    of `Loaded`.
    """
    cfg = lm.config
    if min(rows, length) < 1 or length + 1 > cfg.max_length:
        raise AtomError(f"expected at least one row of 1 to {cfg.max_length - 1} tokens, got {rows} of {length}")
    chips = Loaded(lm, topology, mesh)
    what = f"{rows} rows with prompts of {length:,} tokens"
    with jax.set_mesh(chips.mesh):
        params = chips.params | chips.whole(chips.beside)
        if (size := reading.plan(cfg).part) is None:
            padded = bucket(length)
            suffix = chips.suffix(rows, padded)
            prompt = reading.read_prompt.lower(
                params, chips.ints(rows, padded), chips.ints(rows), suffix,
                cfg=cfg, capacity=bucket(length + ROOM, LEAST),
            )  # fmt: skip
            (_, cache), _ = prompt.out_info
            places = chips.compile("prompt", prompt).places
            cache = chips.whole(cache) if places is None else at(cache, places[0][1])
        else:
            kept = max(length if a.policy is None else a.policy.expected(length) for a in cfg.attentions)
            what += f", of which every head keeps {kept:,}"
            before = _cache(chips, cfg, rows, kept + size)
            last_bd = chips.whole(jax.ShapeDtypeStruct((rows, cfg.d_model), jnp.dtype(cfg.dtype)))
            part = chips.ints(rows, size)
            prompt = reading.part_in_place.lower(params, part, chips.ints(rows), last_bd, before, cfg=cfg)
            chips.compile(f"{size} of a prompt", prompt)
            cache = _cache(chips, cfg, rows, kept + ROOM)
        begun = jax.ShapeDtypeStruct((rows,), jnp.int32)
        state = decode.State(cache, *chips.whole((begun, jax.ShapeDtypeStruct((rows,), jnp.bool_), begun)))
        choice = chips.whole(jax.eval_shape(lambda: decode.Choice(
            sampling.row_keys(jax.random.key(0), rows), sampling.sampler(), jnp.zeros(8, jnp.int32), chips.codec,
        ).each))  # fmt: skip
        chips.compile("token", decode.decode.lower(params, state, choice, np.int32(1), cfg=cfg))
    return chips.done(what)


def _shapes(cfg: Any) -> Any:
    dtype, spec = jnp.dtype(cfg.dtype), registry.of(cfg).spec(cfg)
    return params_lib.map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), spec)


def _cache(chips: Loaded, cfg: Any, rows: int, capacity: int) -> Any:
    """A memory that holds something already."""
    cache = jax.eval_shape(lambda: registry.of(cfg).init_cache(cfg, rows, capacity))
    return chips.whole(cache.replace(fresh=False))
