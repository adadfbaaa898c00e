"""One side of `benchmarks.bolmo`: a model in a process of its own, which reads a text and goes on with given ones."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

import atom_jax
from atom_jax import params
from atom_jax.inference.score import to_batch
from atom_jax.kvcache import memory
from atom_jax.kvcache.policies import parse
from atom_jax.models import registry
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.bolmo.config import FUSED
from atom_jax.models.bolmo.forward import enough
from atom_jax.models.transformer import TransformerConfig
from atom_jax.session import laid_out, sampling
from atom_jax.session.decode import CHUNK, Choice
from atom_jax.session.session import Session
from atom_jax.session.slots import Slots
from atom_jax.tokenizers import BolmoTokenizer, ByteTokenizer
from atom_jax.transfer.lessons import begin
from atom_jax.typing import LM, AtomError, Batch
from benchmarks.machine import FLOAT
from benchmarks.worker import peak_bytes, serve

# Bytes end patches where the text has it, or none does, or all do.
FORMS = ("text", "never", "always")
# Patches of a prompt that is read (almost) without the layers over patches.
FEW = 8


@struct.dataclass
class Given(Choice):
    """Chooses as ever, and goes on with given tokens all the same: i32 [b, n], entry k after step k."""

    tokens: Any = None

    def take(self, logits_bv: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `Choice.take`; nothing stops."""
        chosen, _ = Choice.take(self, logits_bv, step)
        given = jnp.take_along_axis(self.tokens, step[:, None], axis=1)[:, 0]
        # Whatever is chosen is at least 0, which no compiler knows.
        return jnp.where(chosen < 0, chosen, given), jnp.zeros(given.shape, bool)


class Side:
    """Every public method is one call over the pipe: plain values in, plain values out; times in seconds."""

    peak = staticmethod(peak_bytes)

    def make(self, teacher: str, folder: str) -> None:
        """Writes FOLDER/bolmo, a Bolmo of the teacher's layers before training, and FOLDER/bytes, a transformer over
        bytes with these layers."""
        source = atom_jax.load(teacher, dtype="float32")
        if not isinstance(source.config, TransformerConfig) or source.tokenizer is None:
            raise AtomError(f"--teacher={teacher}: expected a transformer over subwords with its tokenizer")
        for name, model in (("bolmo", beginner), ("bytes", over_bytes)):
            atom_jax.save_hf(model(source), pathlib.Path(folder) / name)

    def open(self, path: str, capacity: float = 0.0, trained: bool = False) -> None:
        """capacity: patches per byte that there is room for. trained: whether patches end where the Bolmo's own
        predictor ends them; else they are subwords. (Both for a Bolmo only.)"""
        self.lm, self.trained, self.is_bolmo = atom_jax.load(path, dtype="float32"), trained, capacity > 0
        if self.is_bolmo != isinstance(self.lm.config, BolmoConfig):
            raise AtomError(f"--checkpoint={path}: expected a Bolmo, not a {self.lm.family}")
        if self.is_bolmo:
            cfg = dataclasses.replace(self.lm.config, capacity=capacity)
            self.lm = dataclasses.replace(self.lm, config=cfg)

    def prompt(self, text: str, new: list[str]) -> dict[str, float]:
        """Takes the prompt and a text for each row; returns `unit` and `new_unit`, bytes per token or patch of
        the prompt and of the first text; `flops` of reading a byte of the prompt; `moved`, bytes to read for one more
        byte of that text; `encode`, the seconds that the prompt's ids (and suffix subwords) take."""
        cfg, self.bytes = self.lm.config, len(text.encode())
        self.batch, seconds = self._batch(text), []
        for _ in range(3):
            began = time.perf_counter()
            jax.block_until_ready(self._batch(text))
            seconds.append(time.perf_counter() - began)
        length = self.batch.ids.shape[1]
        self.last, self.rows = int(self.batch.ids[0, -1]), [self._ids(t, first=False) for t in new]
        ends = [self._ends(text, t) for t in new]
        # From the prompt's last byte on, which is read to the end when it is known whether it ends a patch.
        self.ends, self.marks = ends[0][:length], [e[length - 1 :] for e in ends]
        self.room = length + max(map(len, self.rows)) + 1
        self.units = int(self.ends.sum())
        unit, new_unit = self.bytes / self.units, len(new[0].encode()) / max(1, int(self.marks[0][1:].sum()))
        exact = dataclasses.replace(cfg, capacity=1 / unit) if self.is_bolmo else cfg
        flops = registry.of(cfg).flops(exact, length)
        return {
            "unit": unit, "new_unit": new_unit, "flops": flops * length / self.bytes, "moved": self._moved(new_unit),
            "encode": statistics.median(seconds),
        }  # fmt: skip

    def read(self, few: bool = False) -> float:
        """Reads the prompt. few: with 8 patches only, which leaves the layers over bytes."""
        cfg, ends = self.lm.config, self._given_ends()
        if few:
            ends = ends & (jnp.cumsum(ends, axis=1) <= FEW)
            cfg = dataclasses.replace(cfg, capacity=FEW / self.batch.ids.shape[1])
        began = time.perf_counter()
        logits, cache, lost = read(self.lm.params, self.batch, ends, cfg=cfg, capacity=self.room)
        jax.block_until_ready(logits)
        taken = time.perf_counter() - began
        if int(lost):
            raise AtomError(f"capacity: there is no room for {int(lost)} patches of the prompt")
        if not few:
            self.cache = memory.unstack(cache) if laid_out.unrolls(self.lm) else cache
        return taken

    def take(self, rows: int) -> dict[str, int]:
        """Goes on in so many rows after the prompt, from here on; returns the `steps` that the given texts take, and
        `runs` of the layers over patches among them."""
        codec = registry.of(self.lm.config).codec(self.lm.config)
        self.begun = memory.rows(self.cache, jnp.zeros(rows, jnp.int32))
        texts, ends = self.rows[:rows], self.marks[:rows]
        self.until = np.array([len(ids) for ids in texts], np.int32)
        if self.until.max() > CHUNK:
            raise AtomError(f"--new_bytes: at most {CHUNK} at once")
        keys, none = sampling.row_keys(jax.random.key(0), rows), jnp.full(8, -1, jnp.int32)
        self.given, self.choices = {}, {}
        for form in FORMS if self.is_bolmo else FORMS[:1]:
            given = np.zeros((rows, max(map(len, texts)) + 1), np.int32)
            for row, ids, marks in zip(given, texts, ends, strict=True):
                if self.is_bolmo:
                    forms = {"text": marks, "never": marks & False, "always": marks | True}[form]
                    ids = np.concatenate([[self.last], ids]) + FUSED * forms
                row[: len(ids)] = ids
            self.given[form] = jnp.asarray(given)
            self.choices[form] = Given(
                keys, sampling.sampler(), none, codec, tokens=self.given[form][:, 1:]
            )  # fmt: skip
        if not self.is_bolmo:
            return {}
        return schedule([m[:-1] for m in ends], enough(self.lm.params, self.lm.config, self.begun))

    def compile(self) -> None:
        """What `step` needs."""
        self._decode("text", 0 * self.until, keep=True)

    def step(self, form: str = "text", keep: bool = True) -> float:
        """Seconds in which all rows go on with their texts. keep: from the prompt's end again next time."""
        return self._decode(form, self.until, keep)

    def hold(self, policy: str, share: float) -> dict[str, float]:
        """Reads the prompt under a cache policy that may keep a share of its tokens or patches; bytes, per byte of
        text, of the entries `held`, of the `buffers` that they are in, and of all other `states`."""
        named = policy if policy == "none" else f"{policy}:budget={math.ceil(share * self.units)}"
        lm = registry.with_memory(self.lm, parse(named))
        _, cache, _ = read(lm.params, self.batch, self._given_ends(), cfg=lm.config, capacity=self.room)
        main = cache.parts.inside.layers if self.is_bolmo else cache.layers
        entries = float(memory.use(cache)[0][0])
        buffers, everything = params.nbytes(main), params.nbytes((cache.layers, cache.parts))
        found = {"held": entries * self._entry(), "buffers": buffers, "states": everything - buffers}
        return {name: value / self.bytes for name, value in found.items()}

    def slots(self, form: str, keep: bool = True) -> Slots:
        """Where all rows begin. keep: a copy, since decoding uses it up."""
        begun = Session(self.lm, laid_out.of(self.lm), self.begun, self.given[form][:, 0], None)
        return Slots(begun.fork() if keep else begun, self.choices[form])

    def _decode(self, form: str, until: np.ndarray, keep: bool) -> float:
        slots = self.slots(form, keep)
        jax.block_until_ready((slots.session.params, slots.session.memory))
        began = time.perf_counter()
        slots.decode(until)
        made = slots.made
        taken = time.perf_counter() - began
        if (made < until).any():
            raise AtomError("capacity: there is no room for all patches of the new text")
        return taken

    def _batch(self, text: str) -> Batch:
        return to_batch(self.lm, self._ids(text)[None])

    def _ids(self, text: str, first: bool = True) -> np.ndarray:
        """Ids of a text; one that begins has a bos where the model reads bytes."""
        ids = np.asarray(self.lm.tokenizer.encode(text), np.int32)
        bytewise = first and isinstance(self.lm.tokenizer, ByteTokenizer)
        return np.concatenate([[self.lm.tokenizer.bos_id], ids]).astype(np.int32) if bytewise else ids

    def _ends(self, text: str, new: str) -> np.ndarray:
        """bool: where units of a text and what follows end. Those of a trained model, by its own predictor; else
        tokens of the teacher."""
        ids = np.concatenate([self._ids(text), self._ids(new, first=False)])
        if not self.is_bolmo:
            return np.ones(len(ids), bool)
        if self.trained:
            return np.asarray(atom_jax.apply(self.lm, ids[None]).aux["boundaries"][0][0])
        subwords = self.lm.tokenizer.subwords
        tokens = [i for part in (text, new) for i in subwords.encode(part).tolist()]
        out = np.zeros(len(ids), bool)
        out[np.cumsum([0, *(len(subwords.pieces[i]) for i in tokens)])] = True
        return out

    def _given_ends(self) -> jax.Array | None:
        return jnp.asarray(self.ends)[None] if self.is_bolmo else None

    def _entry(self) -> int:
        """Bytes of keys and values of one token or patch in all layers."""
        cfg = self.lm.config.main if self.is_bolmo else self.lm.config
        return 2 * cfg.head_dim * FLOAT * cfg.n_layers * cfg.n_kv_heads

    def _moved(self, unit: float) -> float:
        """Bytes to read for one more byte: weights (of tables the head's only), held entries, states of layers over
        bytes (which are written, too)."""
        cfg = self.lm.config
        flat = params.flatten(registry.of(cfg).spec(cfg))
        sizes = {k: FLOAT * math.prod(s.shape) for k, s in flat.items() if k not in ("embed", "subwords")}
        if not self.is_bolmo:
            sizes["unembed"] = FLOAT * cfg.d_model * cfg.vocab_size
            return (sum(sizes.values()) + self.units * self._entry()) / unit
        inner = sum(n for k, n in sizes.items() if k.startswith(("main/", "pool/")))
        states = 2 * params.nbytes(registry.of(cfg).init_cache(cfg, 1, 1).layers)
        return sum(sizes.values()) - inner + states + (inner + self.units * self._entry()) / unit


@functools.partial(jax.jit, static_argnames=("cfg", "capacity"))
def read(
    p: Any, batch: Batch, ends: jax.Array | None, *, cfg: Any, capacity: int
) -> tuple[jax.Array, Any, jax.Array]:  # fmt: skip
    """Logits at the end of a prompt, the memory of it, and how many patches found no room."""
    model = registry.of(cfg)
    given = {} if ends is None else {"ends": ends}
    cache = model.init_cache(cfg, batch.ids.shape[0], capacity)
    x_btd, cache, aux = model.hidden(p, batch, cfg=cfg, cache=cache, **given)
    return model.logits(p, x_btd[:, -1:], cfg=cfg), cache, jnp.int32(aux.get("lost", 0))


def schedule(ends: list[np.ndarray], quorum: int) -> dict[str, int]:
    """Steps in which rows are read of which so many wait for each other at the ends of patches (`bolmo.step`), and
    those of them in which patches are."""
    at, steps, runs = np.zeros(len(ends), int), 0, 0
    while (live := np.array([i < len(e) for i, e in zip(at, ends)])).any():
        on = np.array([i < len(e) and bool(e[i]) for i, e in zip(at, ends)])
        run = bool(on.any() and on.sum() >= min(quorum, live.sum()))
        at += live & (run | ~on)
        steps, runs = steps + 1, runs + run
    return {"steps": steps, "runs": runs}


def beginner(source: LM) -> LM:
    """A Bolmo of the source's layers before any training, shaped as the published ones are."""
    main = dataclasses.replace(source.config, tie_embeddings=False)
    cfg = BolmoConfig(
        main=main, subwords=source.config.vocab_size, local_heads=main.n_heads,
        local_d_ff=-(-11 * main.d_model // 64) * 8,
    )  # fmt: skip
    return LM(cfg, begin(jax.random.key(0), source, cfg), BolmoTokenizer(source.tokenizer))


def over_bytes(source: LM) -> LM:
    """A transformer over bytes with the source's layers, and tables that are drawn."""
    tokenizer = ByteTokenizer()
    cfg = dataclasses.replace(source.config, vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id)
    table = 0.02 * jax.random.normal(jax.random.key(0), (cfg.vocab_size, cfg.d_model))
    drawn = {"embed": table} if cfg.tie_embeddings else {"embed": table, "unembed": table.T}
    return LM(cfg, {**source.params, **drawn}, tokenizer)


if __name__ == "__main__":
    serve(Side(), (AtomError, OSError))
