"""Cache policies next to each other: what a model loses when it keeps only part of a context's keys and values.

A context is read through the cache of each policy, and then a continuation is scored from what the cache has kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from atom_jax import checkpoint, config
from atom_jax import params as params_lib
from atom_jax.checkpoint import adapters
from atom_jax.data.sources import open_source
from atom_jax.evaluation import cache
from atom_jax.evaluation.encode import Encoder, front
from atom_jax.evaluation.metrics import Result
from atom_jax.evaluation.tasks import kv_cells, kv_plot, needle, planted, requests
from atom_jax.evaluation.tasks.kv_cells import Ask, Cell, Method
from atom_jax.kvcache import policies
from atom_jax.kvcache.policy import fitted
from atom_jax.models import registry
from atom_jax.models.fingerprint import fingerprint
from atom_jax.terminal import progress
from atom_jax.typing import LM, AtomError

PARTS = ("loss", "facts", "needle", "lambada")
_BUILTIN = ("austen", "pystdlib")
# Bytes of a source after which no further document is read.
_MOST = 1 << 24


@dataclasses.dataclass(frozen=True)
class KvSettings:
    """What is compared, and on what.

    policies: such as "none" (everything is kept), "model" (the checkpoint's own memory), "streaming_llm",
        "snapkv:window=64"; (): these and all that `kvcache.policies` knows. "none" is always among them.
    adapters: of this model, or checkpoints of it with learned memory, one method each.
    budgets: entries per head; each policy that has a budget, and whose text sets none, runs with all of them.
    parts: "loss", "facts", "needle" and "lambada".
    sources: texts of "loss", as in DataConfig.sources: of "austen" and "pystdlib" the held-out splits, of others
        everything. The documents of a source follow each other.
    context, scored, windows: so many windows per source, evenly spaced, of `context` tokens and `scored` after them.
    fact_lengths, fact_texts, facts, kinds: of "facts": contexts of so many tokens, so many of each from two novels,
        with so many facts planted in each, of these kinds (`planted.KINDS`; (): of all). Questions come afterwards:
        a policy does not know what will be asked.
    lengths, depths, needles: of "needle": contexts of so many tokens, from two novels; where in them the sentence
        stands, 0 to 1; and how many of each.
    limit: documents of LAMBADA to draw at random (0: all).
    batch: rows that are read at once. seed: of all draws.
    """

    policies: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    budgets: tuple[int, ...] = (1024, 512, 256)
    parts: tuple[str, ...] = ("loss", "facts")
    sources: tuple[str, ...] = ("austen",)
    context: int = 2048
    scored: int = 256
    windows: int = 8
    fact_lengths: tuple[int, ...] = (2048,)
    fact_texts: int = 1
    facts: int = 24
    kinds: tuple[str, ...] = ()
    lengths: tuple[int, ...] = (512, 1024, 2048)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    needles: int = 2
    limit: int = 200
    batch: int = 1
    seed: int = 0

    def __post_init__(self):
        some, count = (1, 2**24), (0, 2**31 - 1)
        config.check(
            self, budgets=some, context=some, scored=some, windows=some, lengths=some, depths=(0, 1), needles=some,
            limit=count, batch=some, seed=count, fact_lengths=some, fact_texts=some, facts=some,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kv:
    """Loss, needles and last words for policies and budgets, with what each of them keeps."""

    settings = KvSettings()

    def run(self, lm: LM, settings: KvSettings, encoder: Encoder, out: pathlib.Path | None) -> Result:
        """Rows of the results (`kv_cells.rows`) in the notes, under "rows", and where the windows begin, under
        "windows". With `out` finished cells are kept in OUT.cells.jsonl, and a picture is drawn next to it."""
        check(settings, lm.config.max_length)
        chosen = methods(settings, lm.config)
        for path in dict.fromkeys(settings.adapters):
            found = with_learned(lm, path, "kv.adapters")
            memory = registry.of(found.config).memory(found.config)
            chosen.append(Method(path, getattr(memory, "budget", None), memory, found))
        texts = _texts(settings, encoder)
        for (part, _), asks in texts.items():
            _fits(part, max(ask.positions for ask in asks), lm.config.max_length)
        cells = [Cell(m, part, source, asks) for m in chosen for (part, source), asks in texts.items()]
        path = out and out.with_name(out.name + ".cells.jsonl")
        with contextlib.closing(cache.Lines(path, {"key": str})) as lines:
            found = _measure(lm, cells, settings.batch, lines)
        dense = {(c.part, c.source): f for c, f in zip(cells, found) if c.method.name == "none"}
        rows = []
        for cell, one in zip(cells, found):
            base = None if cell.method.name == "none" else dense[cell.part, cell.source]
            rows += kv_cells.rows(cell, one, base)
        if out is not None:
            kv_plot.draw(rows, out.with_suffix(".png"))
        starts = {source: [a.start for a in asks] for (part, source), asks in texts.items() if part == "loss"}
        return Result({}, len(cells), {"rows": rows, "windows": starts}, kv_cells.table(rows))


def check(settings: KvSettings, max_length: int) -> None:
    """Raises AtomError for settings that do not fit; max_length: positions of the model."""
    for part in settings.parts or ("",):
        if part not in PARTS:
            raise AtomError(f"kv.parts: no part {part!r}; expected some of {', '.join(PARTS)}")
    for name in ("budgets", "lengths", "depths", "sources", "fact_lengths"):
        if not getattr(settings, name):
            raise AtomError(f"kv.{name}: there is none")
    longest = {
        "loss": settings.context + settings.scored, "needle": max(settings.lengths) + 16,
        "facts": max(settings.fact_lengths),
    }  # fmt: skip
    for part in settings.parts:
        _fits(part, longest.get(part, 0), max_length)


def _fits(part: str, tokens: int, max_length: int) -> None:
    if tokens > max_length:
        raise AtomError(f"kv: {part} reads up to {tokens} tokens, the model was made for {max_length}")


def methods(settings: KvSettings, cfg: Any) -> list[Method]:
    """The policies of the settings with their budgets, "none" first.

    Raises AtomError for texts that name no policy, and for memories that the model lacks.
    """
    own = registry.of(cfg).memory(cfg)
    known = [name for name, p in policies.POLICIES.items() if _has_budget(p)]
    names = joined(settings.policies) or (["model"] if own is not None else []) + known
    out = [Method("none", None, None)]
    for name in dict.fromkeys(n for n in names if n != "none"):
        if name == "model":
            if own is None:
                raise AtomError("kv.policies: model, but the checkpoint has no memory of its own")
            out.append(Method(name, getattr(own, "budget", None), own))
            continue
        kind, _, fields = name.partition(":")
        set_already = {field.partition("=")[0] for field in fields.split(",")}
        if kind in known and not set_already & {"budget", "ratio"}:
            for b in settings.budgets:
                out.append(Method(name, b, policies.parse(f"{kind}:{fields}{',' if fields else ''}budget={b}")))
            continue
        policy = policies.parse(name)
        if policies.to_hf(policy, cfg.family):
            raise AtomError(f"kv.policies: {name} is learned: write model, for a checkpoint that has learned it")
        policy = fitted(policy, None, own)
        out.append(Method(name, policy.budget if "budget" in set_already else None, policy))
    return out


def with_learned(lm: LM, path: str, flag: str) -> LM:
    """The model with an adapter, or a checkpoint of it, that has learned memory. AtomError, which begins with `flag`,
    for one that has not, or that was made for another model."""
    try:
        found = adapters.load_adapter(lm, path) if adapters.is_adapter(path) else checkpoint.load(path)
    except AtomError as e:
        raise AtomError(f"{flag}: {e}") from None
    if registry.of(found.config).memory(found.config) is None:
        raise AtomError(f"{flag}: {path} has no learned memory")
    if not _same(lm, found):
        raise AtomError(f"{flag}: {path} was made for another model than this checkpoint's")
    return found


def _same(lm: LM, other: LM) -> bool:
    """Whether two models have the same parameters but for what memories learn."""
    trees = []
    for one in (lm, other):
        learned = registry.learned(one.config)
        trees.append({k: x for k, x in params_lib.flatten(one.params).items() if k not in learned})
    return trees[0].keys() == trees[1].keys() and all(
        a.shape == trees[1][k].shape and bool((a == trees[1][k]).all()) for k, a in trees[0].items()
    )


def _has_budget(policy: Any) -> bool:
    return "budget" in {f.name for f in dataclasses.fields(policy)}


def joined(names: tuple[str, ...]) -> list[str]:
    """Texts of policies, put together again where a comma between two fields of one has divided it."""
    out: list[str] = []
    for name in names:
        if out and "=" in name and ":" not in name:
            out[-1] += ("," if ":" in out[-1] else ":") + name
        else:
            out.append(name)
    return out


def _texts(settings: KvSettings, encoder: Encoder) -> dict[tuple[str, str], tuple[Ask, ...]]:
    """What every method reads: by part and source."""
    texts: dict[tuple[str, str], tuple[Ask, ...]] = {}
    for part in dict.fromkeys(settings.parts):
        if part == "loss":
            for source in settings.sources:
                texts[part, source] = windows(settings, encoder, source)
        elif part in ("needle", "facts"):
            hay = needle.Haystack.of(_read("austen"), encoder)
            make, lengths = (_needles, settings.lengths) if part == "needle" else (_facts, settings.fact_lengths)
            for length in lengths:
                texts[part, f"{length} tokens"] = make(settings, encoder, hay, length)
        else:
            texts[part, "lambada"] = _last_words(settings, encoder)
    return texts


def _read(source: str) -> bytes:
    """The text of a source: of built-in ones what is held out."""
    parts, size = [], 0
    for split in ("validation", "test") if source in _BUILTIN else ("all",):
        corpus = open_source(source, split)
        for i in range(len(corpus)):
            if size < _MOST:
                parts.append(corpus.read(i))
                size += len(parts[-1])
    return b"".join(parts)


def windows(settings: KvSettings, encoder: Encoder, source: str) -> tuple[Ask, ...]:
    """Windows of a source, evenly spaced: `settings.context` tokens and the `settings.scored` after them."""
    ids = encoder.tokenizer.encode(_read(source))
    first = np.array(front(encoder.tokenizer) if encoder.always_front else [], np.int32)
    context = settings.context - len(first)
    if context < 1 or len(ids) < context + settings.scored:
        raise AtomError(f"kv.sources: {source} has {len(ids)} tokens, a window has {context + settings.scored}")
    starts = np.unique(np.linspace(0, len(ids) - context - settings.scored, settings.windows).astype(np.int64))
    asks = []
    for i, start in enumerate(starts.tolist()):
        before, after = np.split(ids[start : start + context + settings.scored], [context])
        asks.append(Ask(np.concatenate([first, before]), after, i, start))
    return tuple(asks)


def _needles(settings: KvSettings, encoder: Encoder, hay: needle.Haystack, length: int) -> tuple[Ask, ...]:
    asks = []
    for d, depth in enumerate(settings.depths):
        for i in range(settings.needles):
            one = needle.build(hay, encoder, length, depth, (settings.seed, length, d, i))
            asks.append(Ask(one.ids, one.answer, d, one.at))
    return tuple(asks)


def _facts(settings: KvSettings, encoder: Encoder, hay: needle.Haystack, length: int) -> tuple[Ask, ...]:
    asks = []
    first = np.array(front(encoder.tokenizer) if encoder.always_front else [], np.int32)
    for number in range(settings.fact_texts):
        draw = np.random.default_rng((settings.seed, 11, length, number))
        start = int(draw.integers(max(len(hay.ids) - length, 0) + 1))
        text = needle.Haystack(hay.ids[start:], hay.ends[start:])
        try:
            chosen = planted.facts(settings.kinds, settings.facts, draw)
            stream = planted.plant(text, chosen, length - len(first), encoder)
        except AtomError as e:  # which begins with the name of a setting
            raise AtomError(f"kv.{e}") from None
        context = np.concatenate([first, stream.ids])
        for fact in stream.facts:
            question, answer = planted.asked(fact, encoder)
            asks.append(Ask(context, answer, number, start, question, fact.kind))
    return tuple(asks)


def _last_words(settings: KvSettings, encoder: Encoder) -> tuple[Ask, ...]:
    everything = requests.read("lambada/bpb_0shot")
    asks = []
    for number, i in enumerate(requests.subset(len(everything), settings.limit, settings.seed)):
        for item in encoder.pair(everything[i].contexts[0], everything[i].continuations[0]).items:
            asks.append(Ask(item.ids[: item.start], item.ids[item.start :], number))
    return tuple(asks)


def _measure(lm: LM, cells: list[Cell], batch: int, lines: cache.Lines) -> list[dict[str, Any]]:
    """What was found in every cell; those that `lines` holds aren't measured again."""
    models = {id(one): fingerprint(one) for one in [lm, *(cell.method.lm for cell in cells)] if one is not None}
    keys = [cell.key(models[id(cell.method.lm or lm)], batch) for cell in cells]
    known = {row.get("key"): row["found"] for row in lines.rows if kv_cells.is_found(row.get("found"))}
    left = sum(cell.tokens for key, cell in zip(keys, cells) if key not in known)
    total = sum(cell.tokens for cell in cells)
    with progress(total=total, initial=total - left, desc="kv", unit="tok", unit_scale=True) as bar:
        for i, (key, cell) in enumerate(zip(keys, cells)):
            # A process may map only so much memory (vm.max_map_count), and every policy has programs of its own.
            if i and cell.method is not cells[i - 1].method:
                jax.clear_caches()
            if key in known:
                continue
            bar.set_postfix_str(f"{cell.method.name} {cell.method.budget or ''} {cell.part}", refresh=False)
            known[key] = kv_cells.measure(lm, cell, batch, bar.update)
            about = {"policy": cell.method.name, "budget": cell.method.budget, "part": cell.part}
            lines.append([{"key": key, **about, "source": cell.source, "found": known[key]}])
    return [known[key] for key in keys]
