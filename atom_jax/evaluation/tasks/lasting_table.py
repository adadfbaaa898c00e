"""What comes of the rows of a comparison of lasting memories: over all streams, by kinds and ages of facts."""

from __future__ import annotations

from typing import Any

import numpy as np

from atom_jax.evaluation.metrics import columns, mean, proportion

Row = dict[str, Any]
# Ages are in bins from one power of this to the next.
BASE = 4


def methods(rows: list[Row]) -> list[tuple[str, str]]:
    """Law and score of all methods, in order."""
    return list(dict.fromkeys((row["law"], row["score"]) for row in rows))


def groups(rows: list[Row]) -> list[Row]:
    """Of every method, means over the streams' facts: of all ("all"), and of each kind."""
    out = []
    for kind in dict.fromkeys(["", *(row["kind"] for row in rows)]):
        for law, score in methods(rows):
            mine = [r for r in rows if (r["law"], r["score"], r["kind"]) == (law, score, kind)]
            if mine:
                out.append({"law": law, "score": score, "group": kind or "all", **_means(mine)})
    return out


def _means(mine: list[Row]) -> Row:
    weight = [row["facts"] for row in mine]
    over = lambda field: float(np.average([row[field] for row in mine], weights=weight))  # noqa: E731
    whole = proportion([r == 1 for row in mine for r in row["rights"]])
    said = {field: over(field) for field in ("entries", "right", "nats")}
    size = None if any(row["bytes"] is None for row in mine) else over("bytes")
    return {"facts": sum(weight), **said, "whole": whole.value, "stderr": whole.stderr, "bytes": size}


def ages(rows: list[Row]) -> list[Row]:
    """Of every method, by how many tokens ago a fact was read: [from, to), the mean age, and how many are right."""
    out = []
    for law, score in methods(rows):
        mine = [r for r in rows if (r["law"], r["score"], r["kind"]) == (law, score, "")]
        age, right = (np.array([x for row in mine for x in row[field]]) for field in ("ages", "rights"))
        power = np.array([(int(a).bit_length() - 1) // 2 for a in age])
        for n in np.unique(power).tolist():
            there = power == n
            out.append({
                "law": law, "score": score, "from": BASE**n, "to": BASE ** (n + 1), "age": float(age[there].mean()),
                "facts": int(there.sum()), "right": float(right[there].mean()),
                "whole": float((right[there] == 1).mean()),
            })  # fmt: skip
    return out


def later(rows: list[Row]) -> list[Row]:
    """Of every method, nats per token of the other book, and how many more these are than those of "none": means over
    streams and windows, with standard errors over windows."""
    nats = {
        (law, score): np.mean([r["later"] for r in rows if (r["law"], r["score"], r["kind"]) == (law, score, "")], 0)
        for law, score in methods(rows)
    }
    out = []
    for (law, score), mine in nats.items():
        if mine.size:
            total, added = mean(mine), mean(mine - nats["none", ""])
            out.append({
                "law": law, "score": score, "windows": len(mine), "nats": total.value, "stderr": total.stderr,
                "added": added.value, "added_stderr": added.stderr,
            })  # fmt: skip
    return out


def table(rows: list[Row]) -> str:
    """All of it as lines of text: every method, then every group of facts, then ages."""
    book = {(r["law"], r["score"]): r for r in later(rows)}
    lines = [
        ("law", "score", "facts", "entries", "bytes", "right", "whole", "stderr", "nats", "later", "added", "stderr")
    ]
    for row in groups(rows):
        size = "-" if row["bytes"] is None else f"{row['bytes']:,.0f}"
        other = book.get((row["law"], row["score"])) if row["group"] == "all" else None
        behind = ("", "", "") if other is None else (
            f"{other['nats']:.3f}", f"{other['added']:+.4f}", f"{other['added_stderr']:.4f}",
        )  # fmt: skip
        lines.append((
            row["law"], row["score"], row["group"], f"{row['entries']:.0f}", size, f"{row['right']:.2f}",
            f"{row['whole']:.2f}", f"{row['stderr']:.2f}", f"{row['nats']:.2f}", *behind,
        ))  # fmt: skip
    return f"{columns(lines, 3)}\n\n{_by_age(rows)}"


def _by_age(rows: list[Row]) -> str:
    """Right and whole of every method, a column for each bin of ages."""
    found = ages(rows)
    bins = sorted({(row["from"], row["to"]) for row in found})
    by = {(row["law"], row["score"], row["from"]): row for row in found}
    lines = [("law", "score", *(f"{a:,} to {b - 1:,}" for a, b in bins))]
    for law, score in methods(rows):
        mine = [by[law, score, a] for a, _ in bins]
        lines.append((law, score, *(f"{r['right']:.2f} / {r['whole']:.2f}" for r in mine)))
    first = [by[(*methods(rows)[0], a)] for a, _ in bins]
    lines.append(("facts", "", *(f"{r['facts']}" for r in first)))
    return "by tokens ago, right / whole\n" + columns(lines, 2)
