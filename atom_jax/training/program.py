"""The compiled parts of a run: initial state, step, validation, and where everything lies on the mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atom_jax import params as params_lib
from atom_jax import sharding
from atom_jax.data.config import DataConfig
from atom_jax.data.numbered import is_numbered
from atom_jax.models import registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.training import optim
from atom_jax.training import state as state_lib
from atom_jax.training.config import Experiment
from atom_jax.training.losses import Sums, summary
from atom_jax.training.objectives import Setting
from atom_jax.training.objectives.base import Rows
from atom_jax.training.state import State
from atom_jax.training.step import make_step
from atom_jax.typing import FRAMES, TEXTS, AtomError


class Program:
    """What one experiment computes on one mesh. Call inside `jax.set_mesh(mesh)`.

    step:     (state, batch) -> (state, metrics); the state passed in is given up.
    evaluate: (state, batch) -> Sums, with the averaged parameters when the run keeps them.
    extra:    names of parameters that are the objectives' and not the model's.
    pages:    curves of what the objectives report (see `plots`).
    """

    def __init__(self, exp: Experiment, mesh: Mesh, tokenizer: Any):
        _check(exp, mesh, tokenizer)
        self.setting, self.objective = Setting(exp, mesh, tokenizer), exp.objectives[-1]
        self.spec, self.extra = _spec(exp)
        self.pages = {name: page for objective in exp.objectives for name, page in objective.pages.items()}
        self.optimizer = optim.make(exp.optim, self.spec, exp.train.steps)
        self.state = state_lib.abstract(self.spec, self.optimizer, exp.optim.ema > 0, mesh)
        self.rows = sharding.batch_sharding(mesh)
        whole, places = NamedSharding(mesh, P()), state_lib.shardings(self.state)
        self.step = jax.jit(
            make_step(self.objective, self.setting, self.optimizer, places.params),
            in_shardings=(places, self.rows),
            out_shardings=(places, whole),
            donate_argnums=0,
        )
        self.evaluate = jax.jit(
            lambda state, batch: self.objective.judge(self.averaged(state), batch, setting=self.setting),
            in_shardings=(places, self.rows),
            out_shardings=whole,
        )

    def initial(self, params: Any = None) -> State:
        """The first state: random parameters from the experiment's seed, or those given (already in place)."""
        places, exp = state_lib.shardings(self.state), self.setting.exp

        def begin(source: Any) -> State:
            values = params_lib.init(source, self.spec) if params is None else source
            return state_lib.fresh(values, self.optimizer, exp.optim.ema > 0)

        start = jax.jit(begin, out_shardings=places, donate_argnums=() if params is None else 0)
        return start(jax.random.key(exp.seed) if params is None else params)

    def averaged(self, state: State) -> Any:
        """The parameters to judge and to use: the moving average where there is one."""
        return state.params if state.ema is None else optim.merge(state.ema, self.optimizer.split(state.params)[1])

    def model(self, state: State) -> Any:
        """`averaged`, without what is not the model's."""
        return {k: v for k, v in self.averaged(state).items() if k not in self.extra}

    def finished(self, state: State, data: Iterator[Rows]) -> State:
        """The state after what the objectives do when the last step is done. data: the rows of the run."""
        params = self.averaged(state)
        for objective in self.setting.exp.objectives:
            params = objective.finish(self.setting, params, data)
        if state.ema is None:
            return state.replace(params=params)
        learn, frozen = self.optimizer.split(params)
        return state.replace(params=optim.merge(self.optimizer.split(state.params)[0], frozen), ema=learn)

    def reference(self, batches: Callable[[], Iterator[Rows]]) -> dict[str, float]:
        """What stands beside every validation, whose batches these are."""
        return self.objective.reference(self.setting, lambda: map(self.put, batches()))

    def operations(self) -> tuple[float, float]:
        """Operations of a step that training needs, and those done a second time to save memory."""
        return self.objective.operations(self.setting, self.optimizer.factors)

    def put(self, rows: Rows) -> Any:
        """Places this process's rows of a batch on its devices."""
        batch = self.objective.batch(rows)
        if jax.process_count() > 1:
            return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, self.rows), batch)
        return jax.device_put(batch, self.rows)

    def read(self, cfg: DataConfig) -> Any:
        """The endless rows of this process of some data (`Objective.rows`)."""
        index, count = sharding.row_share(self.setting.mesh, jax.process_index())
        return self.objective.rows(self.setting, cfg, index, count)

    def abstract_batch(self) -> Any:
        """The shape of a batch, for compiling without data."""
        batch = self.objective.batch(self.objective.described(self.setting))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.rows), batch)

    def validate(self, state: State, batches: Iterator[Rows]) -> dict[str, float]:
        """Loss (nats per token) and bits per byte over all of `batches`."""
        total: Sums | None = None
        for batch in batches:
            sums = self.evaluate(state, self.put(batch))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return {k: float(v) for k, v in jax.device_get(summary(total)).items()}


def _spec(exp: Experiment) -> tuple[params_lib.Tree, tuple[str, ...]]:
    """Specs of all parameters, and the names of those that are not the model's."""
    spec = dict(registry.kind(exp.model).spec(exp.model))
    own = tuple(spec)
    for objective in exp.objectives:
        more = objective.extra_spec(exp.model)
        if taken := sorted(set(more) & set(spec)):
            raise AtomError(f"{objective.name}: there are parameters {taken[0]} already")
        spec |= more
    return spec, tuple(name for name in spec if name not in own)


def check(exp: Experiment) -> None:
    """Raises AtomError for what does not fit together in an experiment, whatever it starts from and runs on."""
    for objective in exp.objectives:
        objective.check(exp)
    name = exp.objectives[-1].name
    if exp.objectives[-1].spelled and not exp.data.tokens:
        raise AtomError(f"{name} and data.tokens need each other")
    if exp.data.tokens and not exp.objectives[-1].spelled:
        raise AtomError(f"data.tokens is {exp.data.tokens}, but {name} does not read rows of subwords")
    if exp.data.weighs and not exp.objectives[-1].weighs:
        raise AtomError(f"data.sources: facts: weighs targets, which {name} does not know")
    reads, learns = registry.kind(exp.model).reads, exp.objectives[-1].reads
    if reads != learns:
        raise AtomError(f"objective: {name} is about {learns}, but the model reads {reads}")
    if is_numbered(exp.data) and reads != FRAMES:
        raise AtomError(f"data.sources: {exp.data.sources[0]} is a world, but {name} is about {learns}")
    if exp.optim.z_loss and not exp.objectives[-1].z_loss:
        raise AtomError(f"optim.z_loss does not go with {name}")
    if reads == TEXTS and exp.data.seq_len > exp.model.max_length:
        raise AtomError(f"data.seq_len {exp.data.seq_len} is beyond the model's {exp.model.max_length} positions")


def _check(exp: Experiment, mesh: Mesh, tokenizer: Any) -> None:
    """Refuses sizes that do not fit together, before anything is compiled."""
    check(exp)
    if mesh.shape["context"] > 1 and not isinstance(exp.model, TransformerConfig):
        raise AtomError(f"mesh.context spreads rows of transformers only, the model is a {type(exp.model).__name__}")
    shards, parts = mesh.shape["data"] * mesh.shape["fsdp"], exp.optim.accumulate
    if exp.data.batch_size % (shards * parts):
        raise AtomError(
            f"data.batch_size {exp.data.batch_size} is not a multiple of {shards} (devices that share a batch) "
            f"times {parts} (optim.accumulate)"
        )
    if tokenizer is not None and tokenizer.vocab_size > exp.model.vocab_size:
        raise AtomError(
            f"model.vocab_size {exp.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}"
        )
