"""Fitting a score for lasting memories on planted facts: what their sentences receive tells them from the rest."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from atom_jax import config
from atom_jax import params as params_lib
from atom_jax.checkpoint import save_adapter
from atom_jax.checkpoint.atomic import check_target
from atom_jax.checkpoint.safetensors_io import SafetensorsSource, write_file
from atom_jax.data.builtin import novels
from atom_jax.data.facts.kinds import drawn
from atom_jax.data.facts.tables import KINDS
from atom_jax.data.facts.things import OTHERS
from atom_jax.data.sources import open_source
from atom_jax.evaluation.encode import Encoder, front
from atom_jax.evaluation.tasks import lasting_later, planted
from atom_jax.evaluation.tasks.needle import Haystack
from atom_jax.files import read_regular, replaced
from atom_jax.kvcache.lasting.score import Linear, Moments, Seen, by_head, features, fit, spread
from atom_jax.kvcache.shared import Shared
from atom_jax.lasting import inside, learned
from atom_jax.lasting.reader import Reader, State, model_of
from atom_jax.models import registry
from atom_jax.terminal import progress
from atom_jax.typing import LM, AtomError

SINKS = 4
# Of a directory, at most.
DOCUMENTS = 256


@dataclasses.dataclass(frozen=True)
class Order:
    """texts: as `text_of` takes them. out: the score's file. tokens: of each text; facts: planted in it, of these
    kinds (`data.facts.tables.KINDS`, none of which an evaluation asks for; (): of all). ridge: of the fit. part:
    tokens that are read at once. seed: of facts. policy_out: directory for the score as a cache policy, an adapter;
    "": none.
    later: instead of planted facts, tokens are to be kept to which some head of a query at least so many tokens
    behind pays more than `least` of its attention (`lasting_later`); 0: planted facts.
    """

    texts: tuple[str, ...]
    out: str
    tokens: int = 8192
    facts: int = 96
    kinds: tuple[str, ...] = ()
    ridge: float = 0.1
    part: int = 512
    seed: int = 0
    policy_out: str = ""
    later: int = 0
    least: float = 0.5

    def __post_init__(self):
        config.check(
            self, tokens=(2, 2**30), facts=(1, 2**20), ridge=(1e-6, 1e6), part=(1, 2**20), seed=(0, 2**31 - 1),
            later=(0, 2**20), least=(0, 1),
        )  # fmt: skip
        if self.later == 1:
            raise AtomError("later: expected 0 (planted facts) or at least 2, got 1")
        drawn(KINDS, OTHERS, self.kinds, self.facts, np.random.default_rng(0))


def run(lm: LM, how: Order, say: Callable[[str], None]) -> str:
    """Fits a score, writes it, and returns a sentence about it. What each text gave is kept beside `how.out`, in
    OUT.moments, and not read again. Raises AtomError for bad texts and settings, and models that have no memories."""
    lm = registry.with_memory(lm, None)
    if lm.tokenizer is None:
        raise AtomError("fit_memory: the model has no tokenizer")
    if how.policy_out and inside.of(lm.config).units:
        raise AtomError(f"policy_out: is for models without units of their own; this is a {lm.family} model")
    if how.policy_out:
        check_target(how.policy_out)
    model, found = model_of(lm), []
    encoder = Encoder(lm.tokenizer, 1 << 20, False)
    kept = pathlib.Path(f"{how.out}.moments")
    for i, name in enumerate(how.texts):
        if how.later:
            read = list(_within(lm, name, how.tokens))
            ids, what = np.concatenate(read), f"what is looked at after {how.later} tokens, in {how.tokens}"
            make = functools.partial(lasting_later.moments, lm, read, how.later, how.least, name)
            settings = f"later {how.later} {how.least} {list(map(len, read))}"
        else:
            chosen = drawn(KINDS, OTHERS, how.kinds, how.facts, np.random.default_rng((how.seed, i)))
            stream = planted.plant(Haystack.of(text_of(name), encoder), chosen, how.tokens, encoder)
            ids, what, settings = stream.ids, f"{how.facts} facts in {how.tokens} tokens", str(how.part)
            make = functools.partial(_moments, lm, stream, how.part, name)
        key = hashlib.sha256(f"{model} {settings} ".encode() + ids.tobytes()).hexdigest()[:16]
        file = kept / f"{key}.safetensors"
        if not file.exists():
            _save(make(), file)
        say(f"{name}: {what}")
        found.append(_load(file, 2 * model.layers * model.heads + 2))
    learned.save(fit(found, how.ridge, model.fingerprint), how.out)
    if how.policy_out:
        attention = fit([m.of_attention() for m in found], how.ridge, model.fingerprint)
        save_adapter(as_policy(lm, attention, horizon=how.later or Shared.horizon), how.policy_out)
        say(f"wrote {how.policy_out}: the policy shared with {len(attention.weight)} weights")
    return f"wrote {how.out}: {len(found[0].first)} features, fitted on {len(found)} texts"


def as_policy(lm: LM, attention: Linear, **fields: Any) -> LM:
    """The model, which has no units of its own, with the cache policy `shared` that chooses by this score, which was
    fitted `of_attention`; fields: of the policy."""
    cfg = registry.of(lm.config).with_memory(lm.config, Shared(**{"budget": 512} | fields, learned=True))
    model = model_of(lm)
    weights = by_head(attention, model.layers, model.heads)
    # Stacked layers have equal parameters, used or not.
    every = np.zeros((lm.config.n_layers, model.heads), np.float32)
    new = {}
    for name, x in weights.items():
        every[inside.of(lm.config).full] = x
        new[f"layers/attn/{Shared.name}/{name}"] = jnp.asarray(every.copy())
    return dataclasses.replace(lm, config=cfg, params=params_lib.unflatten(params_lib.flatten(lm.params) | new))


def text_of(name: str) -> bytes:
    """The first documents of a text, one after another; see `documents_of`."""
    return b"\n\n".join(itertools.islice(documents_of(name), DOCUMENTS))


def documents_of(name: str) -> Iterator[bytes]:
    """A novel by its name (`data.builtin.novels`), a file, or the documents of the training split of a directory, or
    of puzzles (reason:...). AtomError where there is none of these."""
    known = novels()
    if name in known:
        yield known[name]
    elif pathlib.Path(name).is_dir() or name.startswith("reason:"):
        documents = open_source(name, "train")
        yield from map(documents.read, range(len(documents)))
    else:
        try:
            yield read_regular(name)
        except OSError as e:
            raise AtomError(f"{name}: cannot be read ({e.strerror}), and is no novel ({', '.join(known)})") from None


def _within(lm: LM, name: str, tokens: int) -> Iterator[np.ndarray]:
    """Documents as the model was trained on them, as ids i32 [n], no longer than it can read, `tokens` together."""
    for document in documents_of(name):
        ids = np.array([*front(lm.tokenizer), *lm.tokenizer.encode(document)], np.int32)
        for at in range(0, len(ids), lm.config.max_length):
            piece = ids[at : at + min(lm.config.max_length, tokens)]
            yield piece
            tokens -= len(piece)
            if not tokens:
                return


def read(lm: LM, texts: Sequence[np.ndarray], part: int, name: str) -> Iterator[tuple[State, Seen | None]]:
    """After every part of texts, each of which is a source: where reading stands, and what has left the window."""
    reader, state = Reader(lm, part, SINKS), None
    with progress(total=sum(map(len, texts)), desc=name, unit="tok", unit_scale=True) as bar:
        for number, ids in enumerate(texts):
            # With a source's first part the latest of the one before leaves.
            left = None if state is None else reader.end(state)
            state = reader.begin(number)
            while (at := state.tokens) < len(ids):
                state, seen = reader.read(state, ids)
                bar.update(state.tokens - at)
                yield state, seen if left is None else left
                left = None


def _moments(lm: LM, stream: planted.Stream, part: int, name: str) -> Moments:
    """Of all tokens (or units with any of those that are wanted) that have left the window. Wanted are whole
    sentences: an answer is of little use without what it is about."""
    rows, wanted, before = [], [], np.append(0, np.cumsum(stream.said))
    for _, seen in read(lm, [stream.ids], part, name):
        if seen is not None:
            rows.append(spread(features(seen.most, seen.total, seen.nll, seen.following)))
            wanted.append(np.diff(before[seen.ends]) > 0)
    if not rows:
        raise AtomError(f"{name}: {len(stream.ids)} tokens are one part, which nothing follows")
    return Moments.of(np.concatenate(rows, axis=1), np.concatenate(wanted))


def _save(m: Moments, file: pathlib.Path) -> None:
    try:
        with replaced(file, parents=True) as part:
            write_file({"n": np.array([m.n]), "first": m.first, "second": m.second, "wanted": m.wanted}, part)
    except OSError as e:
        raise AtomError(f"{file}: could not be written ({e.strerror or e})") from None


def _load(file: pathlib.Path, size: int) -> Moments:
    source = SafetensorsSource(file)
    found = {name: source.read(name) for name in source.infos}
    shapes = {"n": (1,), "first": (size,), "second": (size, size), "wanted": (size,)}
    dtypes = {name: np.dtype(np.int64 if name == "n" else np.float64) for name in shapes}
    right = {name: (x.shape, x.dtype) for name, x in found.items()} == {n: (shapes[n], dtypes[n]) for n in shapes}
    if not right or found["n"][0] < 1:
        raise AtomError(
            f"{file}: holds no moments of {size} features, as fit_memory writes them for this model; delete it"
        )
    return Moments(int(found["n"][0]), *(found[name] for name in ("first", "second", "wanted")))
