"""The compiled parts of a run: initial state, step, validation, and where everything lies on the mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atom_jax import params as params_lib
from atom_jax import sharding
from atom_jax.kvcache.dms import DMS
from atom_jax.models import registry
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training import byteify, distill, losses, optim
from atom_jax.training import state as state_lib
from atom_jax.training.config import Experiment
from atom_jax.training.losses import Sums
from atom_jax.training.state import State
from atom_jax.training.step import make_step, summary
from atom_jax.transfer.byteify import Lesson
from atom_jax.transfer.lessons import assemble
from atom_jax.typing import AtomError, Batch

FIELDS = ("ids", "positions", "segments", "targets", "loss_mask")


class Program:
    """What one experiment computes on one mesh. Call inside `jax.set_mesh(mesh)`.

    step:     (state, batch) -> (state, metrics); the state passed in is given up.
    evaluate: (state, batch) -> Sums, with the averaged parameters when the run keeps them.
    """

    def __init__(self, exp: Experiment, mesh: Mesh, tokenizer: Any):
        _check(exp, mesh, tokenizer)
        self.exp, self.mesh, self.tokenizer = exp, mesh, tokenizer
        self.spec = registry.of(exp.model).spec(exp.model)
        if exp.byteify is not None and exp.byteify.stage == 1:
            self.spec = self.spec | {"source": byteify.tables(exp.model.main)}
        self.optimizer = optim.make(exp.optim, self.spec, exp.train.steps)
        self.state = state_lib.abstract(self.spec, self.optimizer, exp.optim.ema > 0, mesh)
        self.rows = sharding.batch_sharding(mesh)
        whole, places = NamedSharding(mesh, P()), state_lib.shardings(self.state)
        loss = functools.partial(
            losses.next_token, cfg=exp.model, lengths=losses.byte_lengths(tokenizer, exp.model.vocab_size)
        )
        if exp.distill is not None:
            loss = functools.partial(distill.self_distillation, **loss.keywords, how=exp.distill)
        elif exp.byteify is not None:
            how = byteify.with_spaces(exp.byteify, tokenizer)
            loss = functools.partial(byteify.objective, **loss.keywords, how=how, eos=tokenizer.document_id)
        elif exp.optim.z_loss:
            loss = functools.partial(loss, z_loss=exp.optim.z_loss)
        self.step = jax.jit(
            make_step(loss, self.optimizer, exp.optim.accumulate, exp.optim.ema, exp.seed, places.params),
            in_shardings=(places, self.rows),
            out_shardings=(places, whole),
            donate_argnums=0,
        )
        self.evaluate = jax.jit(
            lambda state, batch: loss(self.averaged(state), batch),
            in_shardings=(places, self.rows),
            out_shardings=whole,
        )

    def initial(self, params: Any = None) -> State:
        """The first state: random parameters from the experiment's seed, or those given (already in place)."""
        places = state_lib.shardings(self.state)

        def begin(source: Any) -> State:
            values = params_lib.init(source, self.spec) if params is None else source
            return state_lib.fresh(values, self.optimizer, self.exp.optim.ema > 0)

        start = jax.jit(begin, out_shardings=places, donate_argnums=() if params is None else 0)
        return start(jax.random.key(self.exp.seed) if params is None else params)

    def averaged(self, state: State) -> Any:
        """The parameters to judge and to use: the moving average where there is one."""
        return state.params if state.ema is None else optim.merge(state.ema, self.optimizer.split(state.params)[1])

    def put(self, rows: dict[str, np.ndarray]) -> Batch | Lesson:
        """Places this process's rows of a batch on its devices."""
        batch = assemble(rows) if "lengths" in rows else Batch(**{k: rows[k] for k in _fields("marks" in rows)})
        if jax.process_count() > 1:
            return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, self.rows), batch)
        return jax.device_put(batch, self.rows)

    def abstract_batch(self) -> Batch | Lesson:
        """The shape of a batch, for compiling without data."""
        shape = (self.exp.data.batch_size, self.exp.data.seq_len)
        if self.exp.byteify is not None:
            made = {k: np.broadcast_to(np.int32(0), shape) for k in (*FIELDS, "suffix")}
            made["loss_mask"], made["state"] = made["loss_mask"] > 0, made["ids"][:, 0]
            made |= dict.fromkeys(
                ("tokens", "lengths"), np.broadcast_to(np.int32(0), (shape[0], self.exp.data.tokens))
            )
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows), assemble(made))
        kinds = {
            k: jnp.bool_ if k in ("loss_mask", "marks") else jnp.int32 for k in _fields(bool(self.exp.data.marks))
        }
        return Batch(**{k: jax.ShapeDtypeStruct(shape, t, sharding=self.rows) for k, t in kinds.items()})

    def validate(self, state: State, batches: Any) -> dict[str, float]:
        """Loss (nats per token) and bits per byte over all of `batches`."""
        total: Sums | None = None
        for batch in batches:
            sums = self.evaluate(state, self.put(batch))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return {k: float(v) for k, v in jax.device_get(summary(total)).items()}


def _fields(marks: bool) -> tuple[str, ...]:
    return (*FIELDS, "marks") if marks else FIELDS


def _check(exp: Experiment, mesh: Mesh, tokenizer: Any) -> None:
    """Refuses sizes that do not fit together, before anything is compiled."""
    if exp.distill is not None and not isinstance(getattr(exp.model, "memory", None), DMS):
        raise AtomError("distill: the model has no learned evictors; set memory to a dms policy")
    if (exp.byteify is not None) != (exp.data.tokens > 0):
        raise AtomError("byteify and data.tokens need each other")
    if exp.byteify is not None and exp.tokenizer != "bolmo":
        raise AtomError(f"byteify: tokenizer must be bolmo, not {exp.tokenizer!r}")
    if exp.byteify is not None and not isinstance(exp.model, BolmoConfig):
        raise AtomError(f"byteify: model must be a BolmoConfig, not a {type(exp.model).__name__}")
    how = exp.byteify
    if how is not None and how.stage == 1 and how.imitate.depth > exp.model.main.n_layers:
        raise AtomError(f"byteify.imitate.depth: the source has {exp.model.main.n_layers} layers")
    if exp.distill is not None and exp.optim.z_loss:
        raise AtomError("optim.z_loss does not go with distill")
    if mesh.shape["context"] > 1 and not isinstance(exp.model, TransformerConfig):
        raise AtomError(f"mesh.context spreads rows of transformers only, the model is a {type(exp.model).__name__}")
    shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], exp.optim.accumulate
    if exp.data.batch_size % (shards * parts):
        raise AtomError(
            f"data.batch_size {exp.data.batch_size} is not a multiple of {shards} (devices that share a batch) "
            f"times {parts} (optim.accumulate)"
        )
    if tokenizer.vocab_size > exp.model.vocab_size:
        raise AtomError(
            f"model.vocab_size {exp.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}"
        )
