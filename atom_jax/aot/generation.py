"""What generation needs on chips that nobody has to have: its programs are compiled as `generate` does, and not
executed."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atom_jax import params as params_lib
from atom_jax import sharding
from atom_jax.aot.topology import Chip, Compiled, compiled, devices, per_chip
from atom_jax.checkpoint.adapters import load_adapter
from atom_jax.inference import decode, reading, sampling
from atom_jax.inference.generate import LEAST, ROOM
from atom_jax.kvcache.dense import bucket
from atom_jax.models import registry
from atom_jax.sharding import MeshConfig
from atom_jax.training import start
from atom_jax.typing import LM, AtomError, Suffix


@dataclasses.dataclass(frozen=True)
class Report:
    """Programs by name, the parameters that all of them read (GiB per chip), and where they would run."""

    title: str
    chip: Chip | None
    parameters: float
    programs: dict[str, Compiled]
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether all programs run on these chips, as far as is known."""
        return all(one.fits(self.chip) for one in self.programs.values())

    def __str__(self) -> str:
        lines = [self.title, f"{'parameters':<17}{self.parameters:9.3f} GiB per chip"]
        for name, one in self.programs.items():
            parts = ""
            if one.temporary is not None:
                other = max(one.arguments - self.parameters, 0.0) + one.new
                parts = f" (caches and other {other:.3f}, temporaries {one.temporary:.3f})"
            lines += [f"{name:<17}{one.verdict(self.chip)}{parts}"]
            if one.traffic is not None and one.traffic.total:
                lines += [f"{'  sent':<17}{one.traffic}"]
        if not self.fits:
            half = self.parameters > self.chip.memory / 2
            advice = "parameters take most of it: more chips on mesh.tensor" if half else "fewer or shorter rows"
            lines += [f"{'to do':<17}{advice}"]
        return "\n".join([*lines, f"compiled in {self.seconds:.0f} s"])


class Chips:
    """The chips of a topology with a model's parameters in its compute dtype; gathers what programs need there.

    mesh: how they are used; None: only one of them is. Raises AtomError when there is no such topology, for a mesh
    that does not fit it, and for a model that looks at subwords without its tokenizer.
    """

    def __init__(self, lm: LM, topology: str | None, mesh: MeshConfig | None = None):
        cfg, self.topology, self.began = lm.config, topology, time.monotonic()
        found, self.chip = devices(topology)
        self.mesh: Mesh = sharding.make_mesh(mesh or MeshConfig(), found if mesh else found[:1])
        self.programs: dict[str, Compiled] = {}
        self.tables = getattr(lm.tokenizer, "tables", None)
        if getattr(cfg, "subwords", 0) and self.tables is None:
            raise AtomError("--compile_only: the model looks at subwords, and their tokenizer is not there")
        spec = registry.of(cfg).spec(cfg)
        self.count = params_lib.count(spec)
        self.params = at(_shapes(cfg), sharding.shardings(spec, self.mesh))
        self.parameters = per_chip(self.params)

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
        return None if self.tables is None else Suffix(self.ints(rows, length), self.ints(rows))

    def compile(self, name: str, lowered: Any) -> Compiled:
        """Compiles what `jax.jit(...).lower(...)` returned."""
        self.programs[name] = compiled(lowered, self.topology)
        return self.programs[name]

    def report(self, what: str) -> Report:
        """All programs so far."""
        sizes = ", ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items())
        where = f"{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        title = f"{self.count:,} parameters on {where} ({sizes}), {what}"
        return Report(title, self.chip, self.parameters, self.programs, time.monotonic() - self.began)


def at(shapes: Any, places: Any) -> Any:
    """Shapes of arrays that lie at `places`."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def described(checkpoint: str | None, reference: str | None, adapter: str | None = None) -> LM:
    """The model of a checkpoint, or of a configuration file (FILE.py:variant), with shapes for its parameters; with
    the evictors of an adapter."""
    if (checkpoint is None) == (reference is None):
        raise AtomError("--compile_only: expected either --checkpoint or --config")
    if checkpoint is not None:
        cfg, tokenizer = start.opened(checkpoint)
    else:
        exp = start.configure(reference, [])
        cfg, tokenizer = exp.model, start.tokenizer(exp) if getattr(exp.model, "subwords", 0) else None
    lm = LM(cfg, _shapes(cfg), tokenizer)
    return lm if adapter is None else load_adapter(lm, adapter)


def generation(lm: LM, rows: int, length: int, topology: str | None, mesh: MeshConfig | None = None) -> Report:
    """What reading prompts and making tokens needs.

    lm: its parameters are not looked at. rows, length: of the batch; a prompt's length in tokens. topology: as in
    `topology.devices`. Learned evictors are taken to keep one in `memory.cr` of the keys, besides those in their
    window. Errors: as of `Chips`.
    """
    cfg = lm.config
    if min(rows, length) < 1 or length + 1 > cfg.max_length:
        raise AtomError(f"expected at least one row of 1 to {cfg.max_length - 1} tokens, got {rows} of {length}")
    model, chips = registry.of(cfg), Chips(lm, topology, mesh)
    what = f"{rows} rows with prompts of {length:,} tokens"
    with jax.set_mesh(chips.mesh):
        params = chips.params if chips.tables is None else chips.params | {"suffix": chips.whole(chips.tables)}
        if model.read_whole(cfg):
            padded = bucket(length)
            suffix = chips.suffix(rows, padded)
            prompt = decode.read_prompt.lower(
                params, chips.ints(rows, padded), chips.ints(rows), suffix,
                cfg=cfg, capacity=bucket(length + ROOM, LEAST),
            )  # fmt: skip
            (_, cache), _ = prompt.out_info
            places = chips.compile("prompt", prompt).places
            cache = chips.whole(cache) if places is None else at(cache, places[0][1])
        else:
            kept = min(length, math.ceil(length / cfg.dms.cr) + cfg.dms.window)
            what += f", of which every head keeps {kept:,}"
            before = _cache(chips, cfg, rows, kept + reading.PART)
            last_bd = chips.whole(jax.ShapeDtypeStruct((rows, cfg.d_model), jnp.dtype(cfg.dtype)))
            part = chips.ints(rows, reading.PART)
            prompt = reading.part_in_place.lower(params, part, chips.ints(rows), last_bd, before, cfg=cfg)
            chips.compile(f"{reading.PART} of a prompt", prompt)
            cache = _cache(chips, cfg, rows, kept + ROOM)
        begun = jax.ShapeDtypeStruct((rows,), jnp.int32)
        state = decode.State(cache, *chips.whole((begun, jax.ShapeDtypeStruct((rows,), jnp.bool_), begun)))
        choice = chips.whole(jax.eval_shape(lambda: decode.Choice(
            sampling.row_keys(jax.random.key(0), rows), sampling.sampler(), jnp.zeros(8, jnp.int32),
            twins=model.TWINS, unused=model.UNUSED,
        )))  # fmt: skip
        chips.compile("token", decode.decode.lower(params, state, choice, np.int32(1), cfg=cfg))
    return chips.report(what)


def _shapes(cfg: Any) -> Any:
    dtype, spec = jnp.dtype(cfg.dtype), registry.of(cfg).spec(cfg)
    return params_lib.map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), spec)


def _cache(chips: Chips, cfg: Any, rows: int, capacity: int) -> Any:
    """A memory that holds something already."""
    cache = jax.eval_shape(lambda: registry.of(cfg).init_cache(cfg, rows, capacity))
    return chips.whole(cache.replace(fresh=False))
