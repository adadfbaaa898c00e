"""How a model treats languages: bits per byte, bytes per unit and units for the same documents.

Units are what a model's inner network reads: learned units where the model has them (those of its innermost stage),
else tokens. A language's premium is the number of units that the documents take in it over the number in English
(Petrov et al. 2023): at 2.0, the same content costs twice the inner steps and twice the context.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from atom_jax import checkpoint
from atom_jax.chunking import scripts as scripts_lib
from atom_jax.data.sources import open_source
from atom_jax.evaluation import loglik, run
from atom_jax.evaluation.encode import Encoder, Item
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.inference.score import apply
from atom_jax.nn.attention import Tokens
from atom_jax.typing import LM, AtomError

REFERENCE = "en"
# Tokens of one batch: with little text, rows that fill up a larger one would cost more than it saves.
BATCH = 2048


def compare(checkpoints: Sequence[str], source: str, limit: int = 100_000) -> dict[str, Any]:
    """Judges checkpoints (anything `atom_jax.load` takes) on the test split of parallel texts.

    source: a directory with a directory for each language, as `make parallel` makes them.
    limit: bytes of the largest language to read at most (but one document at least); 0 = all.
    Returns {"source", "reference", "documents", "checkpoints": [{"path", "languages": {language: {"bytes",
    "bits_per_byte", "units", "bytes_per_unit", "premium"}}}]}, where "units" and "bytes_per_unit" are lists over the
    model's stages, outermost first. Raises AtomError for bad input.
    """
    if limit < 0:
        raise AtomError(f"--limit={limit}: expected a number of bytes, or 0 for all")
    texts = read(source, limit)
    reference = next(iter(texts))
    report = []
    for path in checkpoints:
        lm, cfg = checkpoint.load(path), run.resolve(EvalConfig(), path)
        encoder, languages = run.make_encoder(lm, cfg), {}
        for language, documents in tqdm(texts.items(), desc=path, unit="language"):
            languages[language] = measure(lm, encoder, documents)
        for row in languages.values():
            row["premium"] = row["units"][-1] / max(languages[reference]["units"][-1], 1)
        report.append({"path": path, "languages": languages})
    return {"source": source, "reference": reference, "documents": len(texts[reference]), "checkpoints": report}


def priors(source: str, scripts: Sequence[str], prior: float) -> tuple[float, ...]:
    """Rates of unit ends, one for each script (`Predictor.priors`), that make as many units of the same documents in
    every language as `prior` makes of English.

    The first script's rate is `prior`; those of the others are found by least squares over the languages, from the
    training split. Raises AtomError for bad input, or where no rates between 0 and 1 do this.
    """
    scripts_lib.check(tuple(scripts))
    texts = read(source, 1_000_000, "train")
    counts = _positions_of(texts, tuple(scripts)).astype(np.float64)
    wanted = prior * counts[0].sum() - prior * counts[:, 0]
    rates = (prior, *np.linalg.lstsq(counts[:, 1:], wanted)[0].tolist())
    if not all(0 < rate < 1 for rate in rates):
        found = ", ".join(f"{name} {rate:.3f}" for name, rate in zip(scripts, rates))
        raise AtomError(f"--scripts: no rates between 0 and 1 make equal units of these languages ({found})")
    return rates


def _positions_of(texts: dict[str, list[bytes]], scripts: tuple[str, ...]) -> np.ndarray:
    """i64 [languages, scripts]: bytes of each script, which are all those up to the next letter of another one."""
    size = max(sum(map(len, documents)) for documents in texts.values())

    @jax.jit
    def of(ids: np.ndarray, positions: np.ndarray) -> jax.Array:
        tokens = Tokens(positions, jnp.ones_like(positions))
        return scripts_lib.scripts_of(ids, tokens, scripts_lib.ScriptState.empty(1), scripts)[0][0]

    rows = []
    for documents in texts.values():
        ids = np.frombuffer(b"".join(documents), np.uint8).astype(np.int32)
        positions = np.concatenate([np.arange(len(text), dtype=np.int32) for text in documents])
        fill = (0, size - len(ids))
        script = np.asarray(of(np.pad(ids, fill)[None], np.pad(positions, fill)[None]))[: len(ids)]
        rows.append(np.bincount(script, minlength=len(scripts)))
    return np.stack(rows)


def read(source: str, limit: int, split: str = "test") -> dict[str, list[bytes]]:
    """Returns the same documents of a split in every language, English first if it is there."""
    folder = pathlib.Path(source)
    names = sorted(p.name for p in folder.iterdir() if (p / split).is_dir()) if folder.is_dir() else []
    if not names:
        raise AtomError(
            f"--source={source}: no directory there has a {split} split; `make parallel` fetches such texts"
        )
    names.sort(key=lambda name: name != REFERENCE)
    corpora = {name: open_source(str(folder / name), split) for name in names}
    if len({len(corpus) for corpus in corpora.values()}) > 1:
        counts = ", ".join(f"{name} {len(corpus)}" for name, corpus in corpora.items())
        raise AtomError(f"--source={source}: the languages differ in their number of {split} documents ({counts})")
    texts = {name: [corpus.read(i) for i in range(len(corpus))] for name, corpus in corpora.items()}
    largest = np.max([np.cumsum([len(text) for text in documents]) for documents in texts.values()], axis=0)
    count = max(1, int(np.sum(largest <= limit))) if limit else len(largest)
    return {name: documents[:count] for name, documents in texts.items()}


def measure(lm: LM, encoder: Encoder, documents: Sequence[bytes], batch_tokens: int = BATCH) -> dict[str, Any]:
    """Bits per byte and units of some documents, as in `compare`."""
    nbytes = sum(map(len, documents))
    items = _items(encoder, documents)
    work = loglik.plan(items, batch_tokens)
    nats = -sum(score.logprob for _, scores in loglik.score(lm, items, work, batch_tokens) for score in scores)
    units = count_units(lm, encoder, documents, batch_tokens)
    return {
        "bytes": nbytes,
        "bits_per_byte": nats / math.log(2) / nbytes,
        "units": units,
        "bytes_per_unit": [nbytes / max(n, 1) for n in units],
    }


def count_units(lm: LM, encoder: Encoder, documents: Sequence[bytes], batch_tokens: int) -> list[int]:
    """Returns the units of the documents at every stage, outermost first: [tokens] for a model without learned units.

    Documents too long for the model are read in windows, of which the part that was not seen before counts.
    """
    # Every token counts where it is read, also the last, which `measure` only predicts.
    items = _items(dataclasses.replace(encoder, length=encoder.length - 1), documents)
    if apply(lm, items[0].ids[None, :16]).aux.get("boundaries") is None:
        return [sum(len(item.ids) - item.start for item in items)]
    width = max(len(item.ids) for item in items)
    rows = max(1, batch_tokens // width)
    total: Any = 0
    for first in range(0, len(items), rows):
        ids, kept = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
        real = np.zeros((rows, width), bool)
        for row, item in enumerate(items[first : first + rows]):
            ids[row, : len(item.ids)] = item.ids
            real[row, : len(item.ids)] = True
            kept[row, item.start : len(item.ids)] = True
        boundaries = apply(lm, ids, real).aux["boundaries"]
        total += np.array([np.sum(np.asarray(marks) & kept) for marks in boundaries])
    return total.tolist()


def table(report: dict[str, Any]) -> str:
    """The report as lines of text: a row for each language, three columns for each checkpoint."""
    runs = report["checkpoints"]
    heads = [("language", "bytes")]
    rows = [[name, f"{row['bytes']:,}"] for name, row in runs[0]["languages"].items()]
    for number, run_ in enumerate(runs, 1):
        suffix = f" [{number}]" if len(runs) > 1 else ""
        heads.append(tuple(name + suffix for name in ("bits/byte", "bytes/unit", f"units/{report['reference']}")))
        for cells, row in zip(rows, run_["languages"].values()):
            values = (row["bits_per_byte"], row["bytes_per_unit"][-1], row["premium"])
            cells += [f"{value:.{digits}f}" for value, digits in zip(values, (3, 2, 2))]
    lines = [[name for names in heads for name in names], *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    legend = [f"[{number}] {run_['path']}" for number, run_ in enumerate(runs, 1)] if len(runs) > 1 else []
    title = f"{report['documents']} documents of {report['source']}, test split"
    cells = [
        "  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(r, widths))) for r in lines
    ]
    return "\n".join([title, *legend, *cells])


def _items(encoder: Encoder, documents: Sequence[bytes]) -> list[Item]:
    context = max(1, encoder.length // 2)
    return [item for text in documents for item in encoder.document(text, context)[0]]
