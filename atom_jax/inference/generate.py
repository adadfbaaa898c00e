"""Text from a model: prompts in, new tokens and text out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax.checkpoint import heads
from atom_jax.inference.stream import TextStream
from atom_jax.lasting import gate
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.store import LEVELS
from atom_jax.models import registry
from atom_jax.session import laid_out, programs, reading, sampling
from atom_jax.session.decode import CHUNK, Choice, Made
from atom_jax.session.drafts import drafters
from atom_jax.session.drafts.drafter import Drafter
from atom_jax.session.drafts.slots import DraftSlots
from atom_jax.session.prompts import check_model, end_ids, listed, token_rows
from atom_jax.session.queue import cores
from atom_jax.session.session import ROOM, Session
from atom_jax.session.slots import Slots
from atom_jax.typing import LM, AtomError

# Steps between looks at the text, where somebody waits for it or a stop string may end it.
LOOK = 8
# The longest draft.
LONGEST = 64
# The step of a row's key that draws whether it leans on a memory: none of its tokens'.
GATE = np.int32(-1)


@dataclasses.dataclass(frozen=True)
class Generation:
    """New tokens of every row, their text (None without a tokenizer), and what it cost.

    stats: prompt_tokens, new_tokens; seconds in all; prefill_seconds: until the first tokens, compilation included;
    tokens_per_second: later tokens by the time that they took, without compilation; kv_entries_peak: the most cache
    entries that unfinished rows held together (the sum of these for the parts of a batch on several cores); kv_reads:
    entries that decoding read (both averaged over layers and key/value heads; sliding layers read at most their
    window); kv_bytes: size of the cache buffers at the end. With drafts, for which a call of the model counts what it
    reads once, also tokens_per_call: later tokens by the calls in which their rows took part; and
    kv_reads_per_query: entries that all queries read, those of drafts included, where each reads by itself.
    With a memory on disk also leaning: the share of rows that leaned on it.
    acceptance: with drafts, of every row the share of their tokens that was accepted (0 where there were none).
    memory: with `keep_memory`, where the model stands after all that it has read and chosen: `generate(..., after=)`
    goes on from it.
    """

    ids: list[list[int]]
    text: list[str] | None
    stats: dict[str, float]
    acceptance: list[float] | None = None
    memory: Session | None = dataclasses.field(default=None, repr=False, compare=False)


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
    draft: str | Drafter | None = None,
    draft_tokens: int = 7,
    memory: Memory | None = None,
    remember: bool = False,
    reread: int = 0,
    twice: bool = False,
) -> Generation:
    """Continues every prompt by up to `max_new_tokens` tokens, each row as if it were alone.

    Args:
      prompts: texts or lists of token ids (or one text). Texts get the tokenizer's front first (of bytes, the bos).
      temperature: 0 takes the most likely token. top_k, top_p, min_p: see `sampling.restrict`.
      key: PRNG key, key(0) if None. Row r draws with fold_in(key, r); or an array of keys [rows], one for each.
      stop: a row ends before the first of these strings, and its text is cut there.
      stop_ids: a row ends at one of these tokens, which is not returned; None: those of the tokenizer and the model.
      on_text: called with (row, piece) as text becomes certain; the pieces of a row add up to its text.
      keep_memory: keep the model's memory in the result, for a later turn. Not with stop strings, which cut a text
        that has been read.
      after: such a result, whose rows the prompts continue: only they are read. Learned memory is given up then, and
        the result cannot be continued again. A stop id that ended a row stays part of it.
      draft: who guesses at what follows, so that the model reads several tokens in one call: a name in
        `drafts.drafters` or a drafter. The ids are those without. There are none where they cost more than they gain,
        in a Bolmo, and in other models with units under a cache policy. draft_tokens: their greatest length.
      memory: what the model has read in earlier sessions (`atom_jax.Memory`): its entries stand before the prompts
        that they make likelier (with a temperature: drawn by how much, `lasting.gate`), before others what was read
        last, or nothing; a later turn goes on with that. Its states are mixed into what is said of every token. It
        stays as it is. remember: afterwards it also reads prompts with their answers, each as one source. reread: so
        many passages of 64 tokens that share most words with a prompt are read again in front of it, where it leans.
      twice: every prompt is read a second time behind itself, with what is read again in front of it: of what a text
        says, the second time is read knowing what is asked (Just read twice, Arora et al., 2024). Texts get no second
        front. With `remember` a prompt is remembered once.
    Raises AtomError for empty prompts, ids out of range, too long a prompt, or options out of their range.
    """
    began = time.perf_counter()
    check_model(lm)
    max_new_tokens = config.whole("max_new_tokens", max_new_tokens, 1)
    stop = _stops(lm, stop, on_text is not None, keep_memory)
    how = sampling.sampler(temperature, top_k, top_p, min_p)
    drafter, draft_tokens = drafters.parse(draft), config.whole("draft_tokens", draft_tokens, 1, LONGEST)
    reread, ahead = _checked(memory, remember, reread), 0 if memory is None else _ahead(lm, memory, after)
    given = _Prompts.of(lm, prompts, after is None and not ahead, twice, memory, reread)
    before = None if after is None else _memory(after, len(given.said))
    _check_length(lm, given.lengths + (ahead if before is None else before.length + 1), max_new_tokens)
    keys, ends = sampling.row_keys(key, len(given.said)), end_ids(lm, stop_ids)
    given = given.gated(memory, sampling.Draw(keys, GATE, how)) if ahead and memory.choice.gated else given
    rows, lengths = given.rows, given.lengths
    learned = heads.load(drafter.source, lm.config) if drafter is not None and drafter.source else None
    parts, runs = 1 if keep_memory or before is not None else _parts(lm, len(rows)), []
    for part in np.split(np.arange(len(rows)), parts):
        mine = [rows[i] for i in part]
        session = _read(lm, given, part, before, memory, min(max_new_tokens, ROOM))
        choice = Choice(keys if parts == 1 else keys[part], how, ends, registry.of(lm.config).codec(lm.config))
        peak = float(lengths[part].sum() if before is None and _drops(lm) else session.use()[0].sum())
        if drafter is None or not programs.together(session.memory, cfg=lm.config):
            slots = Slots(session, choice, parts > 1)
        else:
            texts = mine if after is None else [np.append(after.ids[i], rows[i]).astype(np.int32) for i in part]
            slots = DraftSlots(session, choice, parts > 1, texts, drafter, draft_tokens, max_new_tokens, learned)
        runs.append(_Run(slots, mine, stop, on_text, int(part[0]), peak))
    started = time.perf_counter()
    busy = _decoded(runs, max_new_tokens, LOOK if stop or on_text else CHUNK)
    result = _result(lm, runs, began, started, busy, keep_memory, given.leaning if ahead else None)
    if remember:
        _remembered(memory, given.alone, result.ids)
    return result


class _Prompts(NamedTuple):
    """What is read of every row. said: its prompt, i32 [t]; alone: that as it is read with nothing in front; again:
    that without a front, where it is read twice; passages: what a memory reads again in front of each of these, i32
    [p]; side: i32 [b], what a memory puts in front of them (`gate.Side`)."""

    said: list[np.ndarray]
    alone: list[np.ndarray]
    again: list[np.ndarray] | None
    passages: list[np.ndarray]
    side: np.ndarray

    @classmethod
    def of(cls, lm: LM, prompts: Any, first: bool, twice: bool, memory: Memory | None, reread: int) -> _Prompts:
        """first: texts get the tokenizer's front. reread: so many passages are."""
        said = token_rows(lm, prompts, first=first)
        alone = said if first or memory is None else token_rows(lm, prompts, first=True)
        again = token_rows(lm, prompts, first=False) if twice else None
        passages = [memory.passages(row, reread) if reread else np.zeros(0, np.int32) for row in said]
        return cls(said, alone, again, passages, np.full(len(said), gate.Side.PASSAGES, np.int32))

    def gated(self, memory: Memory, draw: sampling.Draw) -> _Prompts:
        """With what makes a prompt likeliest in front of it, or drawn by that."""
        nats = memory.weigh(self.said, self.alone, self.passages)
        side = np.asarray(draw.among(jnp.asarray(-nats.T, jnp.float32)))
        passages = [x[: len(x) * (mine in gate.REREAD)] for x, mine in zip(self.passages, side)]
        said = [b if mine == gate.Side.NOTHING else a for a, b, mine in zip(self.said, self.alone, side)]
        return self._replace(said=said, passages=passages, side=side)

    @property
    def rows(self) -> list[np.ndarray]:
        """i32 [t] each."""
        copies = zip(*([self.said] if self.again is None else [self.said, self.again]))
        return [np.concatenate([x for one in own for x in (read, one)]) for read, own in zip(self.passages, copies)]

    @property
    def lengths(self) -> np.ndarray:
        """i64 [b]."""
        return np.array([len(row) for row in self.rows])

    @property
    def leaning(self) -> float:
        """The share of rows that lean on all that a memory holds."""
        return float((self.side <= gate.Side.MEMORY).mean())


def _remembered(memory: Memory, said: list[np.ndarray], made: list[list[int]]) -> None:
    """Reads prompts, i32 [t] each, with their answers, each as one source."""
    for row, ids in zip(said, made):
        memory.read(np.concatenate([row, np.array(ids, np.int32)]))


def _stops(lm: LM, stop: Any, streams: bool, keep_memory: bool) -> list[str]:
    """Stop strings, checked."""
    stop = [stop] if isinstance(stop, str) else listed("stop", stop)
    if any(not isinstance(text, str) for text in stop):
        raise AtomError(f"stop: expected a string or a list of strings, got {stop!r}")
    if lm.tokenizer is None and (stop or streams):
        raise AtomError("this model has no tokenizer: stop strings and streaming need one")
    if stop and keep_memory:
        raise AtomError("keep_memory: a stop string would cut text that the memory has read; use stop_ids")
    if "" in stop:
        raise AtomError("stop: an empty string would stop everywhere")
    return stop


def _checked(memory: Memory | None, remember: bool, reread: int) -> int:
    """How many passages are read again; AtomError where a lasting memory can't do what is asked of it."""
    reread = config.whole("reread", reread, 0, 1024)
    if (remember or reread) and memory is None:
        raise AtomError("remember, reread: there is no memory")
    if remember and (left := [source.name for source in memory.sources if not source.finished]):
        raise AtomError(f"remember: {left[0]} was not read to its end; read or forget that first")
    return reread


def _check_length(lm: LM, length_b: np.ndarray, most: int) -> None:
    """AtomError where a row of so many tokens, i32 [b], and `most` after it are too long."""
    if (longest := int(length_b.max())) + most > lm.config.max_length:
        raise AtomError(
            f"a prompt of {longest} tokens and max_new_tokens {most} exceed the {lm.config.max_length}"
            " positions of the model"
        )


def _read(
    lm: LM, given: _Prompts, part: np.ndarray, before: Session | None, memory: Memory | None, room: int
) -> Session:  # fmt: skip
    """Where some rows, i32 [p], stand once their prompts are read, after `before` or after what a lasting memory puts
    in front; and what that mixes in goes with them."""
    rows = given.rows
    longest, rows = max(map(len, rows)), [rows[i] for i in part]
    if before is not None:
        return before.extend(rows)
    params = laid_out.of(lm)
    params = params if memory is None else memory.mixing(params)
    front = gate.front(memory.fronts(), given.side[part]) if memory is not None and memory.length else None
    return Session.prefill(lm, rows, room=room, longest=longest, params=params, memory=front)


def _decoded(runs: list[_Run], most: int, look: int) -> float:
    """Makes up to `most` tokens in every row, `look` of them between two looks at the text; returns the seconds that
    it took without compilation."""
    busy = 0.0
    with ThreadPoolExecutor(len(runs)) as threads:
        while going := [run for run in runs if run.made < most and not run.finished]:
            for run in going:
                run.until = min(run.made + look, most)
                run.slots.prepare(run.until)
            at = time.perf_counter()
            made = list((threads.map if len(going) > 1 else map)(_Run.decode, going))
            busy += time.perf_counter() - at
            for run, one in zip(going, made):
                run.take(one)
    for run in runs:
        run.slots.session.check()
    return busy


def _parts(lm: LM, rows: int) -> int:
    """Into how many equal parts a batch is split, each decoded by a thread of its own."""
    return max(n for n in range(1, cores(lm) + 1) if rows % n == 0)


def _drops(lm: LM) -> bool:
    """Whether a policy takes away from prompts that have been whole in memory."""
    plan = reading.plan(lm.config)
    return plan.part is None and not plan.waits and lm.config.memory is not None


def _memory(after: Generation, rows: int) -> Session:
    """What a later turn goes on from, checked."""
    if after.memory is None:
        raise AtomError("after: this generation has no memory; make it with keep_memory=True")
    if len(after.ids) != rows:
        raise AtomError(f"after: it has {len(after.ids)} rows, but there are {rows} prompts")
    if after.memory.spent:
        raise AtomError("after: this generation has been continued already, and its memory is given up")
    # Memory that is compacted while it reads may be large, and is written over.
    return after.memory if reading.plan(after.memory.lm.config).shrinks else after.memory.fork()


def _ahead(lm: LM, memory: Memory, after: Generation | None) -> int:
    """Positions that what a lasting memory puts in front of prompts takes, checked; 0: it holds nothing."""
    if after is not None:
        raise AtomError("memory: stands before a first turn, and this one goes on after another")
    if LEVELS in memory.settings.parts and registry.of(lm.config).memory(lm.config) is not None:
        raise AtomError("memory: is read whole, which this model's cache policy would not do; choose the dense cache")
    if not memory.belongs(lm):
        raise AtomError("memory: belongs to another model")
    return memory.taken if memory.length else 0


def _result(
    lm: LM, runs: list[_Run], began: float, started: float, busy: float, keep_memory: bool, leaning: float | None
) -> Generation:  # fmt: skip
    """Ends all rows and adds up. busy: seconds of decoding without compilation. leaning: the share of rows that lean
    on a memory on disk."""
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
        "kv_bytes": sum(run.slots.session.nbytes for run in runs),
    }
    stats |= {} if leaning is None else {"leaning": leaning}
    drafts = [run.slots for run in runs if isinstance(run.slots, DraftSlots)]
    acceptance = None
    if drafts:
        tried, accepted, steps = (np.concatenate(x) for x in zip(*((s.tried, s.accepted, s.steps) for s in drafts)))
        acceptance = (accepted / np.maximum(tried, 1)).tolist()
        stats["tokens_per_call"] = float((steps + accepted).sum() / max(steps.sum(), 1))
        stats["kv_reads_per_query"] = sum(s.queries for s in drafts)
    text = None if lm.tokenizer is None else [s.text for s in streams]
    kept = runs[0].slots.session if keep_memory else None
    return Generation([s.ids for s in streams], text, stats, acceptance, kept)


class _Run:
    """Rows of one call of `generate` that are decoded together, and the text of each.

    slots: go on from the prompts `rows`. first: the number of the first of these rows. peak: entries that they held
    while they were read.
    """

    def __init__(
        self, slots: Slots, rows: list[np.ndarray], stop: list[str], on_text: Any, first: int, peak: float
    ):  # fmt: skip
        self.slots, self.rows, self.on_text, self.first, self.peak = slots, rows, on_text, first, peak
        self.tokenizer = slots.session.lm.tokenizer
        self.streams = [TextStream(self.tokenizer, stop, before=int(row[-1])) for row in rows]
        self.made, self.reads, self.until, self.finished = 0, 0.0, 0, False
        self._take(slots.first[:, None])

    def decode(self) -> Made:
        """Makes `until` tokens in every unfinished row, or fewer where the memory ends."""
        return self.slots.decode(self.until)

    def take(self, made: Made) -> None:
        """Adds what was made to the texts and the counts."""
        self.reads += float(made.read.astype(np.float64).sum())
        self.peak = max(self.peak, float(made.peak))
        self._take(made.tokens)

    def finish(self) -> None:
        """Ends the texts."""
        for r, stream in enumerate(self.streams):
            if self.tokenizer is not None:
                self._say(r, stream.finish())

    def _take(self, tokens: np.ndarray) -> None:
        """Adds new tokens, -1 = none, to the texts; rows that met a stop string are done from here on."""
        done = np.array(self.slots.done)
        for r, (stream, new) in enumerate(zip(self.streams, tokens)):
            new = new[new >= 0].tolist()
            if self.tokenizer is None:
                stream.ids += new
            else:
                self._say(r, stream.push(new))
            done[r] |= stream.stopped
        self.finished = bool(done.all())
        # Tokens in every unfinished row: some may have more.
        self.made = int(self.slots.made.min(where=~done, initial=np.iinfo(np.int32).max))
        self.slots.end(done)

    def _say(self, row: int, piece: str) -> None:
        if piece and self.on_text is not None:
            self.on_text(self.first + row, piece)
