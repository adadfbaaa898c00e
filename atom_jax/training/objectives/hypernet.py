"""Training a hypernetwork that makes the rows of any tokenizer for a model that stays as it is (Minixhofer et al.,
2024, "Zero-Shot Tokenizer Transfer", 2405.07883)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax import params as params_lib
from atom_jax.data import sampled
from atom_jax.data.config import DataConfig
from atom_jax.data.pipeline import make_iterator
from atom_jax.data.sampled import SampledRows, Sampling
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn import scoring
from atom_jax.params import Tree
from atom_jax.training.losses import Sums
from atom_jax.training.objectives.base import Objective, Rows, Setting, check_frozen, register
from atom_jax.training.plots import Pages
from atom_jax.transfer.hypernet import Hypernet
from atom_jax.typing import AtomError, Batch

_NEVER = -1e9  # logit of ids that stand for nothing
_UNREAD = ("marks", "prompt_end", "chat", "stochastok", "fim")  # of the data, what drawn rows know nothing of


@struct.dataclass
class Drawn:
    """Text in the tokens of a tokenizer that was drawn. sizes: i32 [b, t], bytes of every target. surface: i32
    [b, v, l] and real: bool [b, v, l], the source's tokens of every id, in all rows the same."""

    text: Batch
    sizes: jax.Array
    surface: jax.Array
    real: jax.Array

    @property
    def loss_mask(self) -> jax.Array:
        """bool [b, t]: targets that count."""
        return self.text.loss_mask


@register
@dataclasses.dataclass(frozen=True)
class TrainHypernet(Objective):
    """net: a `transfer.hypernet.Projector` or `Zett` for the tables of the run's model, which is frozen, as are the
        scales of the network (optim.groups).
    sampling: how tokenizers are drawn. lexical: weight of how far made rows are from those of tokens that the model
        has: the mean of squared lengths, over the mean length of these rows.

    What is minimised beside is the next token of the drawn tokenizers. Before training, a Projector is FVT. The
    published warm-up on the model's own tokens is left out: a Projector knows them from the beginning.
    """

    net: Any = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    lexical: float = 0.5

    name: ClassVar[str] = "hypernet"
    pages: ClassVar[Pages] = {"hypernet": {"distance of known rows": {"lexical": ""}}}

    def __post_init__(self):
        config.check(self, lexical=(0, 1e6))
        if self.net is not None and not isinstance(self.net, Hypernet):
            raise AtomError(f"hypernet.net: expected a Projector or a Zett, got a {type(self.net).__name__}")

    def check(self, exp: Any) -> None:
        """A transformer that is frozen, and a network for its tables."""
        cfg = exp.model
        if not isinstance(cfg, TransformerConfig):
            raise AtomError(f"hypernet: the model must be a transformer over subwords, not a {type(cfg).__name__}")
        if self.net is None:
            raise AtomError("hypernet.net is not set: what network is to be trained?")
        planes = 1 if cfg.tie_embeddings else 2
        if (self.net.n, self.net.d) != (planes, cfg.d_model):
            raise AtomError(
                f"hypernet.net is for {self.net.n} tables of width {self.net.d}, the model has {planes} of "
                f"{cfg.d_model}"
            )
        if self.lexical and self.net.length == 1:
            raise AtomError("hypernet.lexical needs hypernet.net.length 2 or more, to tell single tokens from others")
        if wrong := [name for name in _UNREAD if getattr(exp.data, name)]:
            raise AtomError(f"hypernet: data.{wrong[0]} does not go with tokenizers that are drawn")
        scales = [f"hypernet/{name}/{part}" for name in ("in_scale", "out_scale") for part in "wb"]
        check_frozen(exp, "hypernet", [*params_lib.flatten(transformer.spec(cfg)), *scales])

    def extra_spec(self, cfg: TransformerConfig) -> Tree:
        """The network as "hypernet"."""
        return {"hypernet": self.net.spec()}

    def begin(self, setting: Setting, params: Any, places: Tree, data: Iterator[Rows]) -> tuple[Any, list[str]]:
        """The network with scales that fit the model's tables."""
        if params is None:
            raise AtomError("hypernet: set init_from, the model whose rows are to be made")
        drawn = params_lib.init(jax.random.key(setting.exp.seed), self.net.spec())
        begun = self.net.begun(drawn, np.asarray(_tables(params)))
        return params | {"hypernet": jax.device_put(begun, places["hypernet"])}, []

    def rows(self, setting: Setting, cfg: DataConfig, index: int, count: int) -> Any:
        """In the tokens of drawn tokenizers (`data.sampled`)."""
        kind = functools.partial(SampledRows, how=self.sampling, length=self.net.length)
        return make_iterator(cfg, setting.tokenizer, index, count, kind)

    def described(self, setting: Setting) -> Rows:
        """See Objective."""
        return sampled.described(setting.exp.data, self.sampling, self.net.length)

    def batch(self, rows: Rows) -> Drawn:
        """See Drawn."""
        return Drawn(super().batch(rows), rows["sizes"], rows["surface"], rows["real"])

    def counts(self, batch: Drawn, setting: Setting) -> jax.Array:
        """The number of targets, f32 []."""
        return jnp.sum(batch.loss_mask, dtype=jnp.float32)

    def loss(self, params: Any, batch: Drawn, key: Any, step: Any, *, setting: Setting, counts: Any = None) -> Sums:
        """learned: lexical, before weighting."""
        made_vnd, known, source_vnd = self._made(params, batch)
        nats = _nats(params, made_vnd, batch, setting.exp.model)
        lexical, own = _lexical(made_vnd, source_vnd, known), self.counts(batch, setting)
        return Sums(
            objective=nats + self.lexical * lexical * own,
            nats=nats,
            tokens=jnp.sum(batch.loss_mask, dtype=jnp.int32),
            bytes=jnp.sum(batch.sizes, dtype=jnp.int32),
            learned={"lexical": jnp.stack([lexical * own, own])},
        )

    def judge(self, params: Any, batch: Drawn, *, setting: Setting) -> Sums:
        """learned: fvt_bits, bits per byte with means of the pieces' rows (FVT) for the rows that are made."""
        found = self.loss(params, batch, None, None, setting=setting)
        table_vnd, surface, real = _tables(params), batch.surface[0], batch.real[0]
        rows_vlnd = jnp.where(real[..., None, None], table_vnd[surface], 0.0)
        mean_vnd = jnp.sum(rows_vlnd, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)[:, None, None]
        bits = _nats(params, mean_vnd, batch, setting.exp.model) / math.log(2)
        fvt = jnp.stack([bits, found.bytes.astype(jnp.float32)])
        return found.replace(learned=found.learned | {"fvt_bits": fvt})

    def operations(self, setting: Setting, factors: Mapping[str, float]) -> tuple[float, float]:
        """Of the drawn vocabulary, whose table gets a gradient, with the rows that are made, of which none is made
        without need."""
        exp = setting.exp
        cfg = dataclasses.replace(exp.model, vocab_size=self.sampling.vocabulary)
        drawn = dataclasses.replace(setting, exp=dataclasses.replace(exp, model=cfg))
        needed, again = super().operations(drawn, {**factors, "embed": 1.0, "unembed": 1.0})
        pieces = self.sampling.vocabulary * self.net.length
        return needed + 6 * pieces * params_lib.count(self.net.spec()["layers"]), again

    def _made(self, params: Any, batch: Drawn) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rows f32 [v, n, d] of the drawn vocabulary: id 0 has the model's own; which ids are single tokens of the
        model, bool [v]; and the model's rows of first pieces [v, n, d]."""
        surface, real, table_vnd = batch.surface[0], batch.real[0], _tables(params)
        made_vnd, first_vnd = self.net.apply(params["hypernet"], table_vnd, surface, real), table_vnd[surface[:, 0]]
        known = (jnp.sum(real, axis=1) == 1).at[0].set(False)
        return made_vnd.at[0].set(first_vnd[0]), known, first_vnd


def _tables(params: Tree) -> jax.Array:
    """The model's tables, f32 [v, n, d]."""
    planes = [params["embed"], *([params["unembed"].T] if "unembed" in params else [])]
    return jax.lax.stop_gradient(jnp.stack(planes, axis=1).astype(jnp.float32))


def _nats(params: Tree, made_vnd: jax.Array, batch: Drawn, cfg: TransformerConfig) -> jax.Array:
    """Cross-entropy f32 [] of a batch, in nats, with these rows in place of the model's."""
    tables = {"embed": made_vnd[:, 0]} | ({"unembed": made_vnd[:, 1].T} if "unembed" in params else {})
    p = {k: x for k, x in params.items() if k != "hypernet"} | tables
    cfg = dataclasses.replace(cfg, vocab_size=len(made_vnd))
    x_btd, _, _ = transformer.hidden(p, batch.text, cfg=cfg)
    shut = jnp.where(batch.real[0, :, 0], 0.0, _NEVER)[None, None]

    def head(x: jax.Array) -> jax.Array:
        return transformer.logits(p, x, cfg=cfg) + shut

    return jnp.sum(scoring.score(head, x_btd, batch.text.targets)["nats"] * batch.loss_mask)


def _lexical(made_vnd: jax.Array, source_vnd: jax.Array, known: jax.Array) -> jax.Array:
    """Mean squared distance of known rows, over the mean length of the source's, averaged over planes."""
    number = jnp.maximum(jnp.sum(known), 1)
    apart_vn = jnp.where(known[:, None], jnp.sum(jnp.square(made_vnd - source_vnd), axis=-1), 0.0)
    length_vn = jnp.where(known[:, None], jnp.linalg.norm(source_vnd, axis=-1), 0.0)
    return jnp.mean((jnp.sum(apart_vn, axis=0) / number) / jnp.maximum(jnp.sum(length_vn, axis=0) / number, 1e-9))
