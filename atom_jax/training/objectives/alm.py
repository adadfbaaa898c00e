"""Distillation between models with different tokenizers, by what they think of aligned chunks of text (Minixhofer et
al., 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching", 2503.20083)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import checkpoint, config
from atom_jax import params as params_lib
from atom_jax.data import pairs
from atom_jax.data.config import DataConfig
from atom_jax.data.pipeline import make_iterator
from atom_jax.models import lora, registry, transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn import scoring
from atom_jax.params import Tree
from atom_jax.tokenizers import Tokenizer
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.training.losses import Sums, byte_lengths, counted_bytes, next_token, summary
from atom_jax.training.objectives.base import Objective, Rows, Setting, check_frozen, register, training_flops
from atom_jax.training.plots import Pages
from atom_jax.transfer import alm
from atom_jax.transfer.alm import ALM, Chunked
from atom_jax.typing import AtomError, Batch

# Tables that a teacher has of its own where the layers are the student's.
_TABLES = ("embed", "unembed")


@struct.dataclass
class Pairs:
    """One text twice: as the student's tokens and the teacher's, and the chunk of each of these, i32 [b, t] and
    [b, k], -1 for padding."""

    student: Batch
    teacher: Batch
    student_chunks: jax.Array
    teacher_chunks: jax.Array

    @property
    def loss_mask(self) -> jax.Array:
        """bool [b, t]: the student's targets."""
        return self.student.loss_mask

    @property
    def size(self) -> int:
        """Most chunks of a row."""
        return min(self.student_chunks.shape[1], self.teacher_chunks.shape[1])


@register
@dataclasses.dataclass(frozen=True)
class Alm(Objective):
    """source: the teacher, any checkpoint that `atom_jax.load` reads with a tokenizer. The student is the run's
        model, mostly the same one with another tokenizer (`atom_jax transplant`). data.tokens: the teacher's per row.
    words: chunks go on until a space follows on both sides; else they are the shortest that there are. One that has
        no room in a row is left out.
    how: see `transfer.alm.ALM`. latent: weight of the difference of final states where chunks end (`alm.latent`), for
        models of one width.
    balance: both losses count by the inverse lengths of their gradients ("gradmag"), and latent is a factor on that.
        The gradients are those of the final states, which cost a pass through the output embedding; the published
        recipe takes those of the last layer's weights.
    teacher: the configuration of the source, where it can't be read and nothing is but compiled.

    The teacher lies beside the model as "source", which optim.groups must freeze. Where the student learns by LoRA
    alone, its layers without it are the teacher's, which has its own tables only. With `how.merge` or `latent`, the
    parts of `optim.accumulate` have means (and a balance) of their own, which count by their chunks.
    """

    source: str = ""
    words: bool = False
    how: ALM = dataclasses.field(default_factory=ALM)
    latent: float = 0.0
    balance: bool = False
    teacher: Any = None

    name: ClassVar[str] = "alm"
    spelled: ClassVar[bool] = True
    pages: ClassVar[Pages] = {"alm": {"divergence of a chunk": {"alm": ""}, "difference of states": {"latent": ""}}}

    def __post_init__(self):
        config.check(self, latent=(0, 1e6))
        if self.balance and not self.latent:
            raise AtomError("alm.balance: there is one loss only; set objective.latent too")
        if self.teacher is not None and not isinstance(self.teacher, TransformerConfig):
            raise AtomError(f"alm.teacher: expected a TransformerConfig, got a {type(self.teacher).__name__}")

    def check(self, exp: Any) -> None:
        """Both are transformers over tokens; what is not the student's stays as it is."""
        theirs = self._config()
        for model in (exp.model, theirs):
            if not isinstance(model, TransformerConfig):
                raise AtomError(f"alm: teacher and student must be transformers, not a {type(model).__name__}")
        if self.latent and exp.model.d_model != theirs.d_model:
            raise AtomError(f"alm.latent: states are {exp.model.d_model} and {theirs.d_model} wide")
        if self.teacher is None and (size := self._tokenizer().vocab_size) > theirs.vocab_size:
            raise AtomError(
                f"alm.source {self.source}: its tokenizer has {size} ids, its table only {theirs.vocab_size} rows"
            )
        spec = transformer.spec(exp.model) if _shared(exp.model) else {}
        kept = [name for name in params_lib.flatten(_body(spec)) if name not in lora.paths(exp.model)]
        kept += [f"source/{name}" for name in params_lib.flatten(self.extra_spec(exp.model)["source"])]
        check_frozen(exp, "alm", kept)

    def extra_spec(self, cfg: TransformerConfig) -> Tree:
        """The teacher as "source"."""
        spec = transformer.spec(self._config())
        return {"source": {k: s for k, s in spec.items() if k in _TABLES} if _shared(cfg) else spec}

    def begin(self, setting: Setting, params: Any, places: Tree, data: Iterator[Rows]) -> tuple[Any, list[str]]:
        """The student as it is, and the teacher. Raises AtomError where it should have the student's layers and has
        others."""
        exp, there = setting.exp, setting.load(self.source, self._config())
        if not _shared(exp.model):
            return (params or {}) | {"source": there.params}, [f"taught by {self.source}"]
        learned = lora.paths(exp.model)
        ours, theirs = (params_lib.flatten(_body(p)) for p in (params or {}, there.params))
        ours = {name: x for name, x in ours.items() if name not in learned}
        if ours.keys() != theirs.keys() or not all(_same(x, theirs[name]) for name, x in ours.items()):
            raise AtomError(f"alm: with LoRA, the layers of init_from must be those of source {self.source}")
        tables = {k: x for k, x in there.params.items() if k in _TABLES}
        return params | {"source": tables}, [f"taught by {self.source}, whose layers it has"]

    def rows(self, setting: Setting, cfg: DataConfig, index: int, count: int) -> Any:
        """As the student's and the teacher's tokens (`data.pairs`)."""
        kind = functools.partial(pairs.PairedRows, other=self._tokenizer(), words=self.words)
        return make_iterator(cfg, setting.tokenizer, index, count, kind)

    def described(self, setting: Setting) -> Rows:
        """See Objective."""
        return pairs.described(setting.exp.data)

    def batch(self, rows: Rows) -> Pairs:
        """Both sides."""
        tokens, chunks = rows["tokens"], rows["token_chunks"]
        at, real = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape), chunks >= 0
        targets, counts = (np.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, real))
        teacher = Batch(tokens, at, real.astype(np.int32), targets, counts)
        student = Batch(**{name: rows[name] for name in ("ids", "positions", "segments", "targets", "loss_mask")})
        return Pairs(student, teacher, rows["chunks"], chunks)

    def counts(self, batch: Pairs, setting: Setting) -> dict[str, jax.Array]:
        """f32 []: the student's targets, and chunks of which the teacher scores a token."""
        side = Chunked(None, batch.teacher_chunks, batch.teacher.segments > 0)
        targets = jnp.sum(batch.loss_mask, dtype=jnp.float32)
        return {"targets": targets, "chunks": alm.scored(side, batch.size)}

    def loss(self, params: Any, batch: Pairs, key: Any, step: Any, *, setting: Setting, counts: Any = None) -> Sums:
        """nats are the student's next token, which is not learned from. learned: alm and latent, means per chunk."""
        cfg, own = setting.exp.model, self.counts(batch, setting)
        whole = own if counts is None else counts
        theirs, taught = self._teacher(params, cfg)
        ours, others = self._boundaries(setting)
        y_bkd, x_btd = _states(taught, batch.teacher, theirs), _states(params, batch.student, cfg)
        teacher, _ = _said(taught, y_bkd, batch.teacher, batch.teacher_chunks, theirs, others)

        def of_chunks(params: Any, x_btd: jax.Array) -> tuple[jax.Array, jax.Array]:
            student, nats_bt = _said(params, x_btd, batch.student, batch.student_chunks, cfg, ours)
            return jnp.stack(alm.loss(teacher, student, self.how, batch.size)), nats_bt

        def of_states(x_btd: jax.Array) -> jax.Array:
            return jnp.stack(alm.latent(y_bkd, x_btd, (batch.teacher_chunks, batch.student_chunks), batch.size))

        found, nats_bt = of_chunks(params, x_btd)
        learned = {"alm": found} | ({"latent": of_states(x_btd)} if self.latent else {})
        weights = jnp.array([1.0, self.latent][: len(learned)])
        if self.balance:
            fixed, at = jax.lax.stop_gradient((params, x_btd))
            losses = lambda x: _mean(of_chunks(fixed, x)[0]), lambda x: _mean(of_states(x))
            # Not flattened, which would gather what is spread over devices.
            lengths = [jnp.sqrt(jnp.sum(jnp.square(jax.grad(loss)(at).astype(jnp.float32)))) for loss in losses]
            weights = weights * alm.factors(jnp.stack(lengths))
        mean = sum(w * _mean(x) for w, x in zip(weights, learned.values()))
        share = own["chunks"] / jnp.maximum(whole["chunks"], 1.0)
        return Sums(
            objective=mean * share * whole["targets"],
            nats=jnp.sum(nats_bt * batch.loss_mask),
            tokens=jnp.sum(batch.loss_mask, dtype=jnp.int32),
            bytes=counted_bytes(setting.lengths, batch.student),
            learned=learned,
        )

    def reference(self, setting: Setting, batches: Callable[[], Iterator[Pairs]]) -> dict[str, float]:
        """Bits per byte of the teacher on the same text."""
        there, tokenizer = setting.load(self.source, self._config()), self._tokenizer()
        cfg = dataclasses.replace(there.config, dtype=setting.exp.model.dtype)
        lengths = byte_lengths(tokenizer, cfg.vocab_size)
        judge = jax.jit(lambda params, batch: next_token(params, batch, cfg=cfg, lengths=lengths))
        total = [judge(there.params, batch.teacher) for batch in batches()]
        return {"source_bits_per_byte": float(summary(jax.tree.map(lambda *x: sum(x), *total))["bits_per_byte"])}

    def operations(self, setting: Setting, factors: Mapping[str, float]) -> tuple[float, float]:
        """With the teacher's pass."""
        data, cfg = setting.exp.data, self._config()
        _, again = super().operations(setting, factors)
        taught = registry.of(cfg).flops(cfg, data.tokens) * data.batch_size * data.tokens
        return training_flops(setting.exp, factors) * data.batch_size * data.seq_len + taught, again

    def _teacher(self, params: Any, cfg: TransformerConfig) -> tuple[TransformerConfig, Tree]:
        """Configuration and parameters of the teacher among those of a run."""
        theirs = dataclasses.replace(self._config(), dtype=cfg.dtype)
        taught = params["source"]
        if _shared(cfg):
            layers = {k: x for k, x in params["layers"].items() if k != "lora"}
            taught = {"layers": layers, "norm": params["norm"]} | taught
        return theirs, jax.lax.stop_gradient(taught)

    def _config(self) -> TransformerConfig:
        return self.teacher if self.teacher is not None else self._opened[0]

    def _tokenizer(self) -> Any:
        return self._opened[1]

    def _boundaries(self, setting: Setting) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`ByteView.boundaries` of student and teacher; none where nothing is but compiled, without a tokenizer."""
        if not isinstance(setting.tokenizer, Tokenizer):
            return (), ()
        return byte_view(setting.tokenizer).boundaries, byte_view(self._tokenizer()).boundaries

    @functools.cached_property
    def _opened(self) -> tuple[Any, Any]:
        """(configuration, tokenizer) of the source."""
        if not self.source:
            raise AtomError("alm.source is not set: which model is to be learned from?")
        cfg, found = checkpoint.load_config(self.source)
        if found is None:
            raise AtomError(f"alm.source {self.source}: has no tokenizer")
        return cfg, found


def _shared(cfg: TransformerConfig) -> bool:
    """Whether the student's layers without LoRA are the teacher's."""
    return bool(lora.paths(cfg))


def _same(a: jax.Array, b: jax.Array) -> bool:
    return a.shape == b.shape and bool(jnp.array_equal(a, b))


def _body(tree: Tree) -> Tree:
    """A model without its tables: what LoRA leaves as it is."""
    return {k: x for k, x in tree.items() if k not in _TABLES}


def _mean(found: jax.Array) -> jax.Array:
    """Of (sum, number) f32 [2]."""
    return found[0] / jnp.maximum(found[1], 1.0)


def _states(params: Tree, batch: Batch, cfg: TransformerConfig) -> jax.Array:
    """Final states [b, t, d]."""
    return transformer.hidden(params, batch, cfg=cfg)[0]


def _said(
    params: Tree,
    x_btd: jax.Array,
    batch: Batch,
    chunks: jax.Array,
    cfg: TransformerConfig,
    boundaries: tuple[int, ...],
) -> tuple[Chunked, jax.Array]:
    """What a model with these final states says of its tokens, and nats f32 [b, t] of its targets."""
    head = functools.partial(transformer.logits, scoring.gathered(params), cfg=cfg)
    found = scoring.score(head, x_btd, batch.targets, ("nats", "among"), among=boundaries)
    logp_bt = jnp.pad(-found["nats"][:, :-1], ((0, 0), (1, 0)))
    return Chunked(logp_bt, chunks, batch.segments > 0, found["among"]), found["nats"]
