"""A model onto several tokenizers by several methods, before any training, beside itself and models that were trained
on: bits per byte of one text."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from atom_jax import checkpoint
from atom_jax.evaluation.cache import Lines
from atom_jax.evaluation.reports.transplanted import documents, lessons, measured
from atom_jax.files import write_text
from atom_jax.inference import transplant as lib
from atom_jax.transfer import initialisers
from atom_jax.typing import AtomError

ROWS, TABLE = "transplants.jsonl", "transplants.md"
_KEY = ("source", "tokenizer", "method", "donor", "text", "judged", "nbytes")
_FIELDS = dict.fromkeys(_KEY, str) | {"nbytes": int, "bits_per_byte": float, "tokens": int, "judged_bytes": int}


@dataclasses.dataclass(frozen=True)
class Orders:
    """What is compared: the source as it is; onto each of `tokenizers` by each of `methods`; and each of `trained`,
    checkpoints that are judged as they are.

    donors: by tokenizer, models that have it, for methods that need one; where there is none, these are left out.
    text, judged, nbytes: as in `transplanted.Order`.
    """

    source: str
    tokenizers: tuple[str, ...]
    methods: tuple[str, ...] = ("fvt", "focus", "omp")
    trained: tuple[str, ...] = ()
    donors: tuple[tuple[str, str], ...] = ()
    text: str = "austen"
    judged: str = "austen"
    nbytes: int = 20_000

    def rows(self) -> Iterator[dict[str, Any]]:
        """Keys of the rows that the table will have, in its order."""
        same = {"text": self.text, "judged": self.judged, "nbytes": self.nbytes, "donor": ""}
        yield same | {"source": self.source, "tokenizer": "", "method": ""}
        for tokenizer in self.tokenizers:
            for method in self.methods:
                need = "donor" in initialisers.parse(method, "--method").needs
                donor = dict(self.donors).get(tokenizer, "")
                if donor or not need:
                    found = same | {"donor": donor if need else ""}
                    yield found | {"source": self.source, "tokenizer": tokenizer, "method": method}
        for path in self.trained:
            yield same | {"source": path, "tokenizer": "", "method": ""}


def compare(orders: Orders, out: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Judges what is not in DIR/transplants.jsonl yet, row by row, and writes DIR/transplants.md; the same command
    goes on where it was stopped. Returns all rows of the table. say: is told each. Raises AtomError for bad input."""
    if orders.nbytes < 1:
        raise AtomError(f"--bytes={orders.nbytes}: expected at least 1")
    if unknown := [name for name, _ in orders.donors if name not in orders.tokenizers]:
        raise AtomError(f"--donor={unknown[0]}=...: there is no --tokenizer={unknown[0]}")
    wanted, judged = list(orders.rows()), documents(orders.judged, "validation", orders.nbytes)
    lines = Lines(pathlib.Path(out) / ROWS, _FIELDS)
    try:
        known = {tuple(row[name] for name in _KEY): row for row in lines.rows}
        for key in wanted:
            if (place := tuple(key[name] for name in _KEY)) not in known:
                known[place] = key | _judged(key, judged)
                lines.append([known[place]])
                say(_line(known[place]))
    finally:
        lines.close()
    rows = [known[tuple(key[name] for name in _KEY)] for key in wanted]
    write_text(pathlib.Path(out) / TABLE, table(rows))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    head = [
        "| model | tokenizer | method | bits per byte | times the source's | tokens |",
        "|---|---|---|---|---|---|",
    ]
    body = []
    for row in rows:
        ratio = row["bits_per_byte"] / rows[0]["bits_per_byte"]
        body.append(
            f"| {row['source']} | {row['tokenizer'] or 'its own'} | {row['method'] or 'as it is'} | "
            f"{row['bits_per_byte']:.3f} | {ratio:.3f} | {row['tokens']:,} |"
        )
    size = f"The first {rows[0]['judged_bytes']:,} bytes of the validation split of {rows[0]['judged']}."
    return "\n".join([size, "", *head, *body, ""])


def _judged(key: dict[str, Any], judged: list[bytes]) -> dict[str, Any]:
    lm, began = checkpoint.load(key["source"]), time.monotonic()
    if key["tokenizer"]:
        method = initialisers.parse(key["method"], "--method")
        texts = lessons((method,), key["text"])
        lm, _ = lib.transplant(
            lm, lib.find_tokenizer(key["tokenizer"]), method, donor=key["donor"] or None, texts=texts
        )
    seconds = round(time.monotonic() - began, 1)
    return measured(lm, judged) | {"seconds": seconds, "judged_bytes": sum(map(len, judged))}


def _line(row: dict[str, Any]) -> str:
    name = " ".join(filter(None, (row["source"], row["tokenizer"], row["method"])))
    return f"{row['bits_per_byte']:.4f} bits per byte  {row['tokens']:>8,} tokens  {name}"
