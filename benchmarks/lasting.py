"""How fast a lasting memory is written and leaned on, next to the same model without one, in turns in one run.

    python -m benchmarks.lasting [--checkpoint=DIR] [--score=FILE] [--far_tokens=131072] [--repeats=3] [--out=FILE]

read     `Memory.read` of --tokens tokens into a new memory with law sqrt, its commit included. Without one: the
         same parts, each attending to the same positions (4 sinks, the part before, its own tokens) by the same
         attention, the nats of every token said as `read` says them; nothing is observed or kept. The next line
         leaves out the nats, too: no logits are made.
decode   tokens after a prompt that leans on a memory of --tokens tokens with law all, of whose entries every layer
         and head chooses 16 pages of 32, anew after every 16 tokens. Without one: after --prompt_tokens tokens.
choice   the same with a memory of --far_tokens tokens, next to itself with no choice in any step that is measured:
         what is missing to 1 is the share of choosing. Reading so much takes minutes, and 23 KB of disk per token of
         SmolLM2-135M; --far_tokens=0 leaves it out. Above a gigabyte entries stay on disk (--choice=resident=BYTES).

"ratio" is the speed with a memory over that without, of the medians, and its range over the repeats; compilation
and first calls don't count. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import struct
from tqdm import tqdm

from atom_jax import config
from atom_jax.checkpoint import load
from atom_jax.data.builtin import austen
from atom_jax.evaluation.metrics import columns
from atom_jax.files import write_text
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.kvcache.lasting.layer import PartLayer
from atom_jax.kvcache.layer import Call
from atom_jax.lasting import inside as inside_lib
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.reader import Reader
from atom_jax.models import registry
from atom_jax.nn import scoring
from atom_jax.session import decode, sampling
from atom_jax.session.session import Session
from atom_jax.session.slots import Slots
from atom_jax.typing import LM, AtomError, Batch
from benchmarks import command, machine

CHECKPOINT = flags.DEFINE_string("checkpoint", "models/smollm2-135m-instruct", "What to load.")
SCORE = flags.DEFINE_string("score", None, "Of the memory that is read into; None: the model's, else observed.")
TOKENS = flags.DEFINE_integer("tokens", 8192, "Tokens to read.", lower_bound=2)
PROMPT = flags.DEFINE_integer("prompt_tokens", 1536, "Tokens of the prompt without a memory.", lower_bound=1)
ASKED = flags.DEFINE_integer("asked_tokens", 32, "Tokens of prompts that lean on a memory.", lower_bound=2)
NEW = flags.DEFINE_integer("new_tokens", 64, "New tokens of a measurement.", 1, decode.CHUNK)
FAR = flags.DEFINE_integer("far_tokens", 131072, "Tokens of the large memory; 0: none.", lower_bound=0)
PART = flags.DEFINE_integer("part", 512, "Tokens that are read at once.", lower_bound=4)
CHOICE = flags.DEFINE_string("choice", "", "Fields of the choice, as whole=2048,pages=16.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements, of which the median counts.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Also write all numbers to this JSON file.")
_FLAGS = (CHECKPOINT, SCORE, TOKENS, PROMPT, ASKED, NEW, FAR, PART, CHOICE, REPEATS)
SINKS = 4
# Does its work once; seconds.
Side = Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Row:
    """A comparison. tokens: of every measurement. seconds: of these, with a memory and without."""

    name: str
    tokens: int
    memory: list[float]
    without: list[float]

    @property
    def ratios(self) -> list[float]:
        """Speed with a memory over that without, of every repeat."""
        return [b / a for a, b in zip(self.memory, self.without)]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.without) / statistics.median(self.memory)

    def cells(self) -> tuple[str, ...]:
        """The line of the table."""
        rates = (f"{self.tokens / statistics.median(x):,.1f}" for x in (self.memory, self.without))
        return self.name, *rates, f"{self.ratio:.2f}", f"{min(self.ratios):.2f}-{max(self.ratios):.2f}"


@struct.dataclass
class Alone(PartLayer):
    """Sees what `PartLayer` does, by the same attention, and observes nothing."""

    def attended(self, call: Call, k: jax.Array, v: jax.Array, places: jax.Array) -> tuple[jax.Array, ...]:
        """As of `PartLayer`; nothing is received, so the compiler leaves out what would find it."""
        nothing = jnp.zeros(k.shape[:3], jnp.float32)
        return super().attended(call, k, v, places)[0], nothing, nothing


@functools.partial(jax.jit, static_argnames=("cfg", "says"), donate_argnames="memory")
def _pass(params: Any, ids_1t: jax.Array, memory: Any, x_1d: jax.Array, *, cfg: Any, says: bool) -> tuple:
    """The last state of a part, the memory after it, and the nats of its tokens."""
    model = registry.of(cfg)
    places = memory.length[:, None] + jnp.arange(ids_1t.shape[1], dtype=jnp.int32)[None]
    batch = Batch(ids_1t, places, jnp.ones_like(ids_1t))
    x_1td, memory, _ = model.hidden(params, batch, cfg=cfg, cache=memory)
    if not says:
        return x_1td[:, -1], memory, None
    before = jnp.concatenate([x_1d[:, None], x_1td[:, :-1]], axis=1)
    return x_1td[:, -1], memory, scoring.score(lambda x: model.logits(params, x, cfg=cfg), before, ids_1t)["nats"]


def without(lm: LM, ids: np.ndarray, says: bool) -> float:
    """Reads whole parts of ids, i32 [n], and keeps nothing of them; seconds."""
    began, part = time.perf_counter(), PART.value
    reader = Reader(lm, part, SINKS)
    state, inside = reader.begin(0), inside_lib.of(lm.config)
    layers = inside.layers_of(state.memory, np.arange(len(inside.kinds)))
    alone = Alone(*(getattr(layers, field.name) for field in dataclasses.fields(layers)))
    # Copies: empty arrays that are one can't be given up one by one.
    memory, x_1d, nats = inside.with_layers(state.memory, jax.tree.map(jnp.copy, alone), 0), state.x_1d, []
    for at in range(0, len(ids), part):
        place = jnp.full(1, min(at - part, SINKS) + part if at else 0, jnp.int32)
        given = ids[None, at : at + part]
        x_1d, memory, said = _pass(
            lm.params, given, memory.replace(length=place), x_1d, cfg=lm.config, says=says
        )  # fmt: skip
        nats.append(said)
    jax.block_until_ready((x_1d, memory, nats))
    return time.perf_counter() - began


def kept(lm: LM, ids: np.ndarray) -> float:
    """Reads ids, i32 [n], into a new memory; seconds, without those of making it."""
    with tempfile.TemporaryDirectory() as folder:
        opened = Memory.open(folder, lm, law="sqrt", score=SCORE.value, part=PART.value, sinks=SINKS)
        began = time.perf_counter()
        opened.read(ids, "text")
        return time.perf_counter() - began


def decoding(lm: LM, ids: np.ndarray, memory: Memory | None) -> Side:
    """Makes tokens after these, NEW more with every call."""
    session = Session.prefill(lm, [ids], memory=None if memory is None else memory.front())
    room = (REPEATS.value + 1) * NEW.value + 1
    session = dataclasses.replace(session, memory=memory_lib.grow(session.memory, room))
    slots = Slots(session, decode.Choice(sampling.row_keys(None, 1), sampling.sampler(), np.full(8, -1, np.int32)))

    def step() -> float:
        until = slots.made[0] + NEW.value
        slots.prepare(until)
        began = time.perf_counter()
        tokens = slots.decode(until).tokens
        seconds = time.perf_counter() - began
        if (tokens[:, : NEW.value] < 0).any():
            raise RuntimeError("the memory was full before the tokens were made")
        return seconds

    return step


def turns(name: str, tokens: int, sides: tuple[Side, Side], say: Callable[[str], None]) -> Row:
    """Seconds of both sides, in turns, after a first call of each."""
    seconds: list[list[float]] = [[], []]
    for n in range(REPEATS.value + 1):
        for i in (n % 2, 1 - n % 2):
            say(f"{name}: {'without' if i else 'with'} a memory, {n} of {REPEATS.value}")
            taken = sides[i]()
            seconds[i] += [taken] if n else []
    return Row(name, tokens, *seconds)


def measure(lm: LM, ids: np.ndarray, choice: Choice, say: Callable[[str], None]) -> Iterator[Row]:
    """Rows, each as soon as it is known."""
    whole = ids[: TOKENS.value // PART.value * PART.value]
    read = functools.partial(kept, lm, whole)
    for name, says in (("read", True), ("read, next to states only", False)):
        yield turns(name, len(whole), (read, functools.partial(without, lm, whole, says)), say)
    asked, steps = ids[-ASKED.value :], (REPEATS.value + 2) * NEW.value
    with _read(lm, whole, choice, say) as memory:
        pair = decoding(lm, asked, memory), decoding(lm, ids[: PROMPT.value], None)
        yield turns("decode", NEW.value, pair, say)
    if FAR.value:
        with _read(lm, ids[: FAR.value], choice, say) as memory:
            often = decoding(lm, asked, memory)
            memory.close()
            memory.choice = dataclasses.replace(choice, stride=max(steps, choice.stride))
            where = "on disk" if memory.paged else "resident"
            yield turns(
                f"choice, {memory.held:,} entries {where}", NEW.value, (often, decoding(lm, asked, memory)), say
            )


@contextlib.contextmanager
def _read(lm: LM, ids: np.ndarray, choice: Choice, say: Callable[[str], None]) -> Iterator[Memory]:
    """A memory of these tokens that keeps all of them."""
    with tempfile.TemporaryDirectory() as folder:
        memory, done = Memory.open(folder, lm, law="all", part=PART.value, sinks=SINKS, choice=choice), 0

        def tell(new: int) -> None:
            nonlocal done
            done += new
            say(f"reading, {done:,} of {len(ids):,}")

        memory.read(ids, "text", say=tell)
        if not memory.chooses:
            raise AtomError(f"--choice: {memory.length} entries are all attended to; set whole to fewer")
        yield memory


def text(lm: LM, n: int) -> np.ndarray:
    """The first n tokens of novels, i32."""
    if lm.tokenizer is None:
        raise AtomError("--checkpoint: the model has no tokenizer")
    novels = b"\n".join(austen("train").texts)
    ids = np.asarray(lm.tokenizer.encode(novels[: 8 * n].decode("utf-8", "replace")), np.int32)
    if len(ids) < n:
        raise AtomError(f"--far_tokens, --tokens: {n} tokens are wanted, and the novels' beginning has {len(ids)}")
    return ids[:n]


def main() -> None:
    """Prints the table, a line as soon as it is known."""
    if TOKENS.value < PART.value:
        raise AtomError(f"--tokens={TOKENS.value}: fewer than a part of {PART.value}")
    fields = [f for f in CHOICE.value.split(",") if f]
    choice = config.build(Choice, fields, "--choice:")
    lm = registry.with_memory(load(CHECKPOINT.value), None)
    ids = text(lm, max(TOKENS.value, PROMPT.value, FAR.value) + ASKED.value)
    facts = machine.describe()
    print(
        f"{facts['processor']}, {facts['cores']} cores; jax {jax.__version__}; load {facts['load']:.1f}", flush=True
    )
    rows: list[Row] = []
    with tqdm(bar_format="{desc} [{elapsed}]", disable=None, leave=False) as bar:
        for row in measure(lm, ids, choice, bar.set_description_str):
            rows.append(row)
            tqdm.write("  ".join(row.cells()))
    head = ("tokens per second", "with a memory", "without", "ratio", "range")
    print(columns([head, *(row.cells() for row in rows)], 1), flush=True)
    if OUT.value:
        flags_ = {flag.name: flag.value for flag in _FLAGS}
        lines = [{**dataclasses.asdict(row), "ratio": row.ratio, "ratios": row.ratios} for row in rows]
        write_text(OUT.value, json.dumps({"machine": facts, "flags": flags_, "rows": lines}, indent=1) + "\n")


if __name__ == "__main__":
    command.run("lasting", main)
