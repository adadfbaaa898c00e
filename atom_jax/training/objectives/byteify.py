"""Byteification as a training run: what is minimised, and how the result is judged (Minixhofer et al., 2025, "Bolmo:
Byteifying the Next Generation of Language Models", section 4)."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import checkpoint, config
from atom_jax import params as params_lib
from atom_jax.models import bolmo, registry, transformer
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn import scoring
from atom_jax.params import Tree
from atom_jax.tokenizers import BolmoTokenizer
from atom_jax.training.losses import Sums, byte_lengths, counted_bytes, next_token, summary
from atom_jax.training.objectives.base import Objective, Rows, Setting, register
from atom_jax.training.plots import Pages
from atom_jax.transfer import byteify, lessons
from atom_jax.transfer.byteify import Lesson, Stage1, Weights
from atom_jax.typing import LM, AtomError, Batch

# Tables of the source model that the first stage needs besides its layers.
TABLES = ("embed", "norm", "unembed")


@register
@dataclasses.dataclass(frozen=True)
class Byteify(Objective):
    """source: the subword model that a Bolmo is made of, any checkpoint that `atom_jax.load` reads with a tokenizer.
    stage: 1 imitates it, while its layers are frozen (optim.groups: main, and the tables in source), and starts from
        it; 2 trains on its boundaries and on text, and starts from init_from.
    imitate, weights: of stage 1. spaces: whether imitate.spaces are the source's tokens that begin with white space.
    official_means: as in the published code, for stage 2 (for stage 1 see `Stage1`).
    """

    source: str = ""
    stage: int = 1
    imitate: Stage1 = dataclasses.field(default_factory=Stage1)
    weights: Weights = dataclasses.field(default_factory=Weights)
    spaces: bool = False
    official_means: bool = False

    name: ClassVar[str] = "byteify"
    spelled: ClassVar[bool] = True
    pages: ClassVar[Pages] = {
        "byteify": {
            "parts of the loss": {k: k for k in ("encoder", "decoder", "boundary")},
            "boundaries": {f"boundary_{k}": k for k in ("accuracy", "precision", "recall")},
        }
    }

    def __post_init__(self):
        config.check(self)
        config.check(self.weights, **dict.fromkeys(("encoder", "cross_entropy", "decoder", "boundary"), (0, 1e6)))
        if self.stage not in (1, 2):
            raise AtomError(f"byteify.stage: expected 1 or 2, got {self.stage}")

    def check(self, exp: Any) -> None:
        """A Bolmo reads what only its tokenizer makes."""
        if exp.tokenizer != "bolmo":
            raise AtomError(f"byteify: tokenizer must be bolmo, not {exp.tokenizer!r}")
        if not isinstance(exp.model, BolmoConfig):
            raise AtomError(f"byteify: model must be a BolmoConfig, not a {type(exp.model).__name__}")
        if self.stage == 1 and self.imitate.depth > exp.model.main.n_layers:
            raise AtomError(f"byteify.imitate.depth: the source has {exp.model.main.n_layers} layers")
        if self.stage == 1 and exp.init_from:
            raise AtomError(f"byteify: stage 1 starts from byteify.source, not from init_from {exp.init_from}")

    def tokenizer(self, exp: Any) -> BolmoTokenizer:
        """Bytes, with the subwords of the source."""
        return BolmoTokenizer(self._opened()[1])

    def extra_spec(self, cfg: BolmoConfig) -> Tree:
        """The tables of the source as "source", in stage 1."""
        return {"source": _tables(cfg.main)} if self.stage == 1 else {}

    def begin(self, setting: Setting, params: Any, places: Tree, data: Iterator[Rows]) -> tuple[Any, list[str]]:
        """What the source gives a Bolmo (`lessons.begin`), with its tables. Raises AtomError where sizes differ."""
        if self.stage == 2:
            return params, []
        exp, there = setting.exp, setting.load(self.source, self._opened()[0])

        def begin(key: jax.Array, params: Any) -> Any:
            made = lessons.begin(key, LM(there.config, params, None), exp.model)
            return made | {"source": {name: params[name] for name in TABLES if name in params}}

        shapes = [params_lib.flatten(_tables(c)) for c in (there.config, exp.model.main)]
        for name in sorted(set(shapes[0]) | set(shapes[1])):
            found = [list(s[name].shape) if name in s else "absent" for s in shapes]
            if found[0] != found[1]:
                raise AtomError(f"byteify.source {self.source}: {name} is {found[0]} there, {found[1]} in model.main")
        made = jax.jit(begin, out_shardings=places)(jax.random.key(exp.seed), there.params)
        return made, [f"a Bolmo made of {self.source}"]

    def batch(self, rows: Rows) -> Lesson:
        """Bytes and subwords."""
        return lessons.assemble(rows)

    def counts(self, batch: Lesson, setting: Setting) -> dict[str, jax.Array]:
        """By name, as in `stage1` and `stage2`."""
        return byteify.counts(batch, setting.exp.model)

    def loss(self, params: Any, batch: Lesson, key: Any, step: Any, *, setting: Setting, counts: Any = None) -> Sums:
        """What the stage minimises, without noise. With `official_means` the parts of a batch do not add up.

        params: the Bolmo's, in stage 1 with "source". Targets are bytes with whether they end a patch. learned: the
        parts of the loss before weighting and, of stage 1, boundary_accuracy.
        """
        cfg, tokenizer = setting.exp.model, setting.tokenizer
        text, own = batch.bytes.replace(marks=batch.marks), self.counts(batch, setting)
        if self.stage == 1:
            how, eos = _with_spaces(self.imitate, tokenizer) if self.spaces else self.imitate, tokenizer.document_id
            _, means = byteify.stage1(params, params["source"], batch, self.weights, cfg=cfg, how=how, eos=eos)
            weights = dataclasses.asdict(self.weights)
        else:
            _, means = byteify.stage2(params, text, cfg=cfg, official_means=self.official_means)
            weights = {"cross_entropy": 1.0, "boundary": cfg.rule.weight}
        whole, targets = counts or own, own["cross_entropy"]
        shares = {name: own[name] / jnp.maximum(whole[name], 1.0) for name in weights}
        loss = sum(weight * means[name] * shares[name] for name, weight in weights.items())
        return Sums(
            objective=loss * whole["cross_entropy"],
            nats=means.pop("cross_entropy") * targets,
            tokens=targets.astype(jnp.int32),
            bytes=counted_bytes(setting.lengths, text),
            learned={k: jnp.stack([mean * own.get(k, targets), own.get(k, targets)]) for k, mean in means.items()},
        )

    def judge(self, params: Any, batch: Lesson, *, setting: Setting) -> Sums:
        """The cross-entropy with the model's own boundaries. learned: boundary_accuracy, boundary_precision and
        boundary_recall, bytes_per_unit_0 (bytes per patch), lost_0 (patches without room, per byte) and bytes_alone
        (bits per byte where it does not count whether a byte ends a patch)."""
        return _judge(params, batch.bytes.replace(marks=batch.marks), setting.exp.model, setting.lengths)

    def reference(self, setting: Setting, batches: Callable[[], Iterator[Lesson]]) -> dict[str, float]:
        """Bits per byte of the source on the same text."""
        there = setting.load(self.source, self._opened()[0])
        cfg = dataclasses.replace(there.config, dtype=setting.exp.model.dtype)
        lengths, eos = byte_lengths(setting.tokenizer.subwords, cfg.vocab_size), setting.tokenizer.document_id
        judge = jax.jit(lambda params, lesson: _source_sums(params, lesson, cfg, lengths, eos))
        total = [judge(there.params, lesson) for lesson in batches()]
        return {"source_bits_per_byte": float(summary(jax.tree.map(lambda *x: sum(x), *total))["bits_per_byte"])}

    def operations(self, setting: Setting, factors: Mapping[str, float]) -> tuple[float, float]:
        """Of stage 1 three passes through what learns, one through the source model, and two through those of its
        layers that gradients go through."""
        if self.stage == 2:
            return super().operations(setting, factors)
        data, model = setting.exp.data, setting.exp.model
        share, flops = data.tokens / data.seq_len, lambda cfg, length: registry.of(cfg).flops(cfg, length)
        source = flops(model.main, data.tokens)
        layers = source - 2 * model.main.d_model * model.main.vocab_size
        local = flops(dataclasses.replace(model, capacity=share), data.seq_len) - layers * share
        passed = layers * self.imitate.depth / model.main.n_layers * share
        total = data.batch_size * data.seq_len
        return (3 * local + source * share + 2 * passed) * total, (local + passed) * total if model.remat else 0.0

    def _opened(self) -> tuple[Any, Any]:
        """(configuration, tokenizer) of the source."""
        if not self.source:
            raise AtomError("byteify.source is not set: which model is the Bolmo to be made of?")
        cfg, found = checkpoint.load_config(self.source)
        if not hasattr(found, "pieces"):
            raise AtomError(f"byteify.source {self.source}: has no tokenizer.json, whose subwords a Bolmo needs")
        return cfg, found


def _tables(main: TransformerConfig) -> Tree:
    """Specs of TABLES, as far as the source model has them."""
    spec = transformer.spec(main)
    return {name: spec[name] for name in TABLES if name in spec}


def _with_spaces(how: Stage1, tokenizer: Any) -> Stage1:
    """`how`, with the source's tokens that begin with white space."""
    found = tuple(i for i, piece in sorted(tokenizer.subwords.pieces.items()) if piece[:1] in (b" ", b"\n", b"\t"))
    return dataclasses.replace(how, spaces=found)


def _judge(params: Any, batch: Batch, cfg: BolmoConfig, lengths: np.ndarray) -> Sums:
    x_btd, _, aux = bolmo.hidden(params, batch, cfg=cfg)
    head, codec = functools.partial(bolmo.logits, params, cfg=cfg), bolmo.codec(cfg)
    found, counts = aux["boundaries"][0], batch.loss_mask

    def total(x_bt: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counts, x_bt, 0.0), dtype=jnp.float32)

    nats = total(scoring.score(head, x_btd, codec.fuse(batch.targets, aux))["nats"])
    alone = total(scoring.score(lambda x: codec.merge(head(x)), x_btd, codec.plain(batch.targets))["nats"])
    decided = batch.positions > 0
    both, ours, theirs = (total(m & decided) for m in (found & batch.marks, found, batch.marks))
    size, count = counted_bytes(lengths, batch).astype(jnp.float32), jnp.sum(counts, dtype=jnp.int32)
    agree = byteify.accuracy(found, batch.marks, batch)
    return Sums(
        objective=nats,
        nats=nats,
        tokens=count,
        bytes=counted_bytes(lengths, batch),
        learned={
            "bytes_alone": jnp.stack([alone / math.log(2), size]),
            "boundary_accuracy": jnp.stack([agree * count, count.astype(jnp.float32)]),
            "boundary_precision": jnp.stack([both, ours]),
            "boundary_recall": jnp.stack([both, theirs]),
            "bytes_per_unit_0": aux["metrics"]["bytes_per_unit_0"],
            "lost_0": jnp.stack([aux["lost"].astype(jnp.float32), count.astype(jnp.float32)]),
        },
    )


def _source_sums(params: Any, lesson: Lesson, cfg: TransformerConfig, lengths: np.ndarray, eos: int) -> Sums:
    """Cross-entropy of the source model, with parameters of its own, on the text of a lesson. lengths: i32 [v], bytes
    per token."""
    tokens = lesson.tokens
    ids = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=eos)
    at = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    counts = jnp.pad(lesson.lengths[:, 1:] > 0, ((0, 0), (0, 1)))
    return next_token(params, Batch(ids, at, jnp.ones_like(ids), tokens, counts), cfg=cfg, lengths=lengths)
