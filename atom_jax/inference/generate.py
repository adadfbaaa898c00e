"""Text from a model: prompts in, new tokens and text out."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax import params as params_lib
from atom_jax.inference.score import check_ids
from atom_jax.inference.stream import TextStream
from atom_jax.kvcache.dense import bucket
from atom_jax.models import registry
from atom_jax.models.family import Codec
from atom_jax.models.transformer import TransformerConfig
from atom_jax.session import laid_out, sampling
from atom_jax.session.decode import CHUNK, Choice, Made, State, decode, decode_beside, go_on, start
from atom_jax.typing import LM, AtomError

# Steps between looks at the text, where somebody waits for it or a stop string may end it.
LOOK = 8
# Room for new tokens that a cache starts with (fewer when fewer are asked for), and its least size. A larger one
# is read for nothing, a smaller one is compiled for sooner.
ROOM = 128
LEAST = 256
# Bytes of weights up to which the rows of a batch are dealt out to the cores of a CPU: about what a cache holds that
# the cores share. Every core reads all weights then; larger ones are better read once, by all cores for all rows.
SHARED = 32 * 2**20


@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens of every row, their text (None without a tokenizer), and what it cost.

    stats: prompt_tokens, new_tokens; seconds in all; prefill_seconds: until the first tokens, compilation included;
    tokens_per_second: later tokens by the time that they took, without compilation; kv_entries_peak: the most cache
    entries that unfinished rows held together (the sum of these for the parts of a batch on several cores); kv_reads:
    entries that decoding read (both averaged over layers and key/value heads; sliding layers read at most their
    window); kv_bytes: size of the cache buffers at the end.
    memory: what the model has read and chosen, with `keep_memory`: `generate(..., after=)` goes on from it.
    """

    ids: list[list[int]]
    text: list[str] | None
    stats: dict[str, float]
    memory: State | None = dataclasses.field(default=None, repr=False, compare=False)


def generate(
    lm: LM,
    prompts: str | Sequence[str | Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    key: jax.Array | None = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    keep_memory: bool = False,
    after: Generation | None = None,
) -> Generation:
    """Continues every prompt by up to `max_new_tokens` tokens, each row as if it were alone.

    Args:
      prompts: texts or lists of token ids, of any lengths (or one text). Texts get the tokenizer's front first
        (of byte models the bos).
      temperature: 0 takes the most likely token. top_k, top_p, min_p: see `sampling.restrict`.
      key: PRNG key, key(0) if None. Row r draws with fold_in(key, r); or an array of keys [rows], one for each.
      stop: a row ends before the first of these strings, and its text is cut there.
      stop_ids: a row ends at one of these tokens, which is not returned; None: those of the tokenizer and the model.
      on_text: called with (row, piece) as text becomes certain; the pieces of a row add up to its text.
      keep_memory: keep the model's memory in the result, for a later turn. Not with stop strings, which cut a text
        that has been read.
      after: such a result, whose rows the prompts continue: only they are read. Learned memory is given up then, and
        the result cannot be continued again. A stop id that ended a row stays part of it.
    Raises AtomError for empty prompts, ids out of range, too long a prompt, or options out of their range.
    """
    began = time.perf_counter()
    max_new_tokens = config.whole("max_new_tokens", max_new_tokens, 1)
    stop = [stop] if isinstance(stop, str) else _listed("stop", stop)
    if any(not isinstance(text, str) for text in stop):
        raise AtomError(f"stop: expected a string or a list of strings, got {stop!r}")
    if lm.tokenizer is None and (stop or on_text):
        raise AtomError("this model has no tokenizer: stop strings and streaming need one")
    if stop and keep_memory:
        raise AtomError("keep_memory: a stop string would cut text that the memory has read; use stop_ids")
    if "" in stop:
        raise AtomError("stop: an empty string would stop everywhere")
    how = sampling.sampler(temperature, top_k, top_p, min_p)
    rows = _token_rows(lm, prompts, first=after is None)
    memory = None if after is None else _memory(lm, after, len(rows))
    lengths = np.array([len(row) for row in rows])
    longest = (lengths if memory is None else lengths + 1 + np.asarray(memory.cache.length)).max()
    if longest + max_new_tokens > lm.config.max_length:
        raise AtomError(
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} exceed the {lm.config.max_length}"
            " positions of the model"
        )
    codec, keys = registry.of(lm.config).codec(lm.config), _row_keys(key, len(rows))
    choice = Choice(keys, how, _stop_ids(lm, stop_ids, codec), codec)
    parts = 1 if keep_memory or memory is not None else _parts(lm, len(rows))
    runs = []
    for part in np.split(np.arange(len(rows)), parts):
        mine = dataclasses.replace(choice, keys=keys[part])
        call = decode if parts == 1 else decode_beside()
        runs.append(_Run(lm, [rows[i] for i in part], mine, stop, on_text, call, first=int(part[0])))
    if memory is None:
        for run in runs:
            run.start(int(longest), min(max_new_tokens, ROOM))
    else:
        runs[0].go_on(memory)
    started, busy = time.perf_counter(), 0.0
    with ThreadPoolExecutor(parts) as threads:
        while going := [run for run in runs if run.made < max_new_tokens and not run.finished]:
            for run in going:
                run.prepare(min(run.made + (LOOK if stop or on_text else CHUNK), max_new_tokens))
            at = time.perf_counter()
            made = list((threads.map if len(going) > 1 else map)(_Run.decode, going))
            busy += time.perf_counter() - at
            for run, one in zip(going, made):
                run.take(one)
    return _result(lm, runs, began, started, busy, keep_memory)


def _parts(lm: LM, rows: int) -> int:
    """Into how many equal parts a batch is split, each decoded by a thread of its own."""
    if not laid_out.unrolls(lm) or params_lib.nbytes(lm.params) > SHARED:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(n for n in range(1, cores + 1) if rows % n == 0)


def _result(lm: LM, runs: list[_Run], began: float, started: float, busy: float, keep_memory: bool) -> Generation:
    """Ends all rows and adds up. busy: seconds of decoding without compilation."""
    for run in runs:
        run.finish()
    streams = [stream for run in runs for stream in run.streams]
    new = sum(len(s.ids) for s in streams)
    stats = {
        "prompt_tokens": sum(len(row) for run in runs for row in run.rows),
        "new_tokens": new,
        "seconds": time.perf_counter() - began,
        "prefill_seconds": started - began,
        "tokens_per_second": max(new - len(streams), 0) / busy if busy else 0.0,
        "kv_entries_peak": sum(run.peak for run in runs),
        "kv_reads": sum(run.reads for run in runs),
        "kv_bytes": sum(params_lib.nbytes(run.state.cache.layers) for run in runs),
    }
    text = None if lm.tokenizer is None else [s.text for s in streams]
    return Generation([s.ids for s in streams], text, stats, runs[0].state if keep_memory else None)


class _Run:
    """Rows of one call of `generate` that are decoded together: their device state and the text of each.

    call: `decode` or its like. first: the number of the first of these rows.
    """

    def __init__(
        self, lm: LM, rows: list[np.ndarray], choice: Choice, stop: list[str], on_text: Any, call: Any, first: int
    ):  # fmt: skip
        self.lm, self.rows, self.choice, self.on_text, self.first = lm, rows, choice, on_text, first
        self.call = functools.partial(call, cfg=lm.config)
        self.params = laid_out.of(lm)
        self.streams = [TextStream(lm.tokenizer, stop, before=int(row[-1])) for row in rows]
        self.made, self.reads, self.peak, self.until, self.finished = 0, 0.0, 0.0, 0, False
        self.state: State | None = None
        self.compiled: list[Any] = []  # shapes of the cache that `decode` was last compiled for

    def start(self, longest: int, room: int) -> None:
        """Reads the prompts, of which the longest of the whole call has so many tokens, and chooses the first new
        tokens."""
        ids, lengths = _padded(self.rows, longest)
        unroll = laid_out.unrolls(self.lm)
        # A prompt goes through the scanned layers in any case: they compile in a fraction of the time.
        params = self.lm.params if unroll else self.params
        capacity = bucket(longest + room, LEAST)
        mask = np.arange(ids.shape[1])[None] < lengths[:, None]
        suffix = self.choice.codec.suffix(self.lm.tokenizer, ids, mask)
        self.state, token = start(
            params, ids, lengths, self.choice, suffix, cfg=self.lm.config, capacity=capacity, unroll=unroll
        )
        cfg = self.lm.config
        if isinstance(cfg, TransformerConfig) and cfg.memory is not None and registry.of(cfg).read_whole(cfg):
            self.peak = float(lengths.sum())  # a policy takes away from what was whole
        else:
            self._count()
        self._take(np.asarray(token)[:, None])

    def go_on(self, memory: State) -> None:
        """Reads the prompts after what `memory` has seen and chooses the first tokens."""
        last = np.asarray(memory.token)
        rows = [np.append(token, row) for token, row in zip(last, self.rows)]
        ids, lengths = _padded(rows, max(map(len, rows)))
        self.state, token = go_on(self.params, memory, ids, lengths, self.choice, cfg=self.lm.config)
        self._count()
        self._take(np.asarray(token)[:, None])

    def _count(self) -> None:
        """Takes what is held now into the peak."""
        held_b, _ = registry.of(self.lm.config).cache_use(self.state.cache, self.lm.config)
        self.peak = max(self.peak, float(held_b.sum()))

    def prepare(self, until: int) -> None:
        """Gets ready to make `until` tokens in every unfinished row, or fewer where the cache ends, which is made
        larger first."""
        model, self.until = registry.of(self.lm.config), until
        if bool(jnp.any(model.full(self.state.cache) & ~self.state.done & (self.state.made < until))):
            self.state = self.state.replace(cache=model.grow(self.state.cache))
        shapes = [x.shape for x in jax.tree.leaves(self.state.cache)]
        if shapes != self.compiled:
            # No step is taken: rates are to count decoding, not compiling.
            self.state, _ = self.call(self.params, self.state, self.choice, np.int32(0))
            self.compiled = shapes

    def decode(self) -> Made:
        """Makes these tokens, and waits for them."""
        self.state, made = self.call(self.params, self.state, self.choice, np.int32(self.until))
        return jax.tree.map(np.asarray, made)

    def take(self, made: Made) -> None:
        """Adds what was made to the texts and the counts."""
        self.reads += float(made.reads.astype(np.float64).sum())
        self.peak = max(self.peak, float(made.peak))
        self._take(made.tokens)

    def finish(self) -> None:
        """Ends the texts."""
        for r, stream in enumerate(self.streams):
            if self.lm.tokenizer is not None:
                self._say(r, stream.finish())

    def _take(self, tokens: np.ndarray) -> None:
        """Adds new tokens, -1 = none, to the texts; rows that met a stop string are done from here on."""
        done = np.array(self.state.done)
        for r, (stream, new) in enumerate(zip(self.streams, tokens)):
            new = new[new >= 0].tolist()
            if self.lm.tokenizer is None:
                stream.ids += new
            else:
                self._say(r, stream.push(new))
            done[r] |= stream.stopped
        self.finished = bool(done.all())
        # Tokens in every unfinished row: some may have more.
        self.made = int(np.asarray(self.state.made).min(where=~done, initial=np.iinfo(np.int32).max))
        self.state = self.state.replace(done=self.state.done | done)

    def _say(self, row: int, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(self.first + row, piece)


def _padded(rows: list[np.ndarray], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids i32 [b, t], padded on the right to the first of few sizes that holds `longest`, and the lengths i32 [b]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), bucket(longest)), np.int32)
    for row, out in zip(rows, ids):
        out[: len(row)] = row
    return ids, lengths


def _memory(lm: LM, after: Generation, rows: int) -> State:
    """What a later turn goes on from, checked."""
    if not isinstance(lm.config, TransformerConfig):
        raise AtomError(f"after: a {lm.family} cannot go on from an earlier generation yet")
    if after.memory is None:
        raise AtomError("after: this generation has no memory; make it with keep_memory=True")
    if len(after.ids) != rows:
        raise AtomError(f"after: it has {len(after.ids)} rows, but there are {rows} prompts")
    if any(x.is_deleted() for x in jax.tree.leaves(after.memory)):
        raise AtomError("after: this generation has been continued already, and its memory is given up")
    return after.memory


def _token_rows(lm: LM, prompts: Any, first: bool) -> list[np.ndarray]:
    """Prompts as i32 arrays, checked. first: whether they begin a text."""
    prompts = [prompts] if isinstance(prompts, str | bytes) else _listed("prompts", prompts)
    if not prompts:
        raise AtomError("prompts: there is none")
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str | bytes):
            ids = _encode(lm, prompt, first)
        else:
            try:
                ids = np.asarray(prompt)
            except ValueError:  # lists of different lengths
                raise AtomError(f"prompts[{i}]: expected a text or a list of token ids") from None
            if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not ids.size):
                raise AtomError(f"prompts[{i}]: expected a text or a list of token ids")
        if not ids.size:
            raise AtomError(f"prompts[{i}] is empty, and the model has no token that begins a text")
        check_ids(ids, lm.config.vocab_size)
        rows.append(ids.astype(np.int32))
    return rows


def _listed(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except TypeError:
        raise AtomError(f"{name}: expected a list, got {values!r}") from None


def _encode(lm: LM, text: str | bytes, first: bool) -> np.ndarray:
    tokenizer = lm.tokenizer
    if tokenizer is None:
        raise AtomError("this model has no tokenizer: give prompts as lists of token ids")
    ids = np.asarray(tokenizer.encode(text))
    return np.concatenate([np.array(getattr(tokenizer, "front", ()), ids.dtype), ids]) if first else ids


def _stop_ids(lm: LM, stop_ids: Sequence[int] | None, codec: Codec) -> np.ndarray:
    """i32 array, filled up with -1 to a multiple of 8, so that their number does not recompile."""
    if stop_ids is None:
        known = {*lm.config.eos_ids, *(lm.tokenizer.eos_ids if lm.tokenizer is not None else ())}
        stop_ids = {i for i in known if 0 <= i < lm.config.vocab_size}
    vocab = lm.config.vocab_size
    ids = np.array(
        sorted(config.whole("a token id of stop_ids", i, 0, vocab - 1) for i in _listed("stop_ids", stop_ids)),
        np.int64,
    )
    ids = codec.forms(ids)
    return np.pad(ids, (0, 8 - len(ids) % 8), constant_values=-1).astype(np.int32)


def _row_keys(key: jax.Array | None, rows: int) -> jax.Array:
    key = jax.random.key(0) if key is None else key
    if not hasattr(key, "dtype"):
        raise AtomError(f"key: expected a key such as jax.random.key(0), got {key!r}")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError) as e:
            raise AtomError(f"key: expected a key such as jax.random.key(0) ({e})") from None
    if key.ndim == 0:
        return sampling.row_keys(key, rows)
    if key.shape != (rows,):
        raise AtomError(f"key has shape {list(key.shape)}; expected one key, or one for each of the {rows} prompts")
    return key
