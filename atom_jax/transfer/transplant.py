"""A model that speaks another tokenizer: its table is made anew, everything else stays.

Rows of special tokens are copied from those with the same name, else of the same use; ordinary tokens that stand for
the same bytes are copied; the rest is made by a method (`initialisers`), what that can't make by another one, the
fallback, and what is left then is drawn.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.models.transformer import TransformerConfig
from atom_jax.tokenizers.byte_view import ROLES, ByteView, byte_view
from atom_jax.transfer.initialisers import Aux, Initialiser, Normal, Task
from atom_jax.transfer.initialisers.trained import trained
from atom_jax.typing import LM, AtomError

LABELS = ("special", "exact", "byte", "composed", "interpolated", "fallback")
_PROBE = "A dog, 12 — é 東京 🙂\n"


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a table.

    labels: of every row, one of LABELS: copied from a special token; copied, because both stand for the same bytes
    (byte: one of them is a byte token); made of its pieces, or of other tokens; or nothing was known.
    warnings: sentences. settings: how it was made, for a JSON file.
    """

    labels: tuple[str, ...]
    warnings: tuple[str, ...]
    settings: Mapping[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Rows with each label."""
        found = Counter(self.labels)
        return {label: found[label] for label in LABELS}

    def to_json(self) -> dict[str, Any]:
        """Everything; `rows` has the place of every row's label in `labels`, a digit each."""
        place = {label: str(i) for i, label in enumerate(LABELS)}
        return {
            **self.settings, "warnings": list(self.warnings), "counts": self.counts, "labels": list(LABELS),
            "rows": "".join(place[label] for label in self.labels),
        }  # fmt: skip

    def __str__(self) -> str:
        parts = ", ".join(f"{n:,} {label}" for label, n in self.counts.items() if n)
        return "\n".join([f"{len(self.labels):,} rows: {parts}", *(f"warning: {text}" for text in self.warnings)])


def transplant(
    lm: LM,
    tokenizer: Any,
    method: Initialiser,
    aux: Aux = Aux(),  # noqa: B008, it is frozen
    fallback: Initialiser = Normal(),  # noqa: B008
    special: Mapping[str, str] | None = None,
    untrained: float = 0.0,
) -> tuple[LM, Report]:
    """The model with the tokenizer in place of its own, and what became of the rows of its table.

    aux: what the method needs beside. special: names of special tokens of the new tokenizer -> of the model's own,
    before all other rules. untrained: quantile for rows that were hardly trained (`initialisers.trained`), from which
    no others are made; 0: all are used.
    Raises AtomError for models other than transformers over subwords, a model without a tokenizer, tokenizers that
    change texts or can't write every text, and what the method lacks.
    """
    if not isinstance(lm.config, TransformerConfig):
        raise AtomError(f"{lm.family}: only transformers over subwords can be given another tokenizer")
    if lm.tokenizer is None:
        raise AtomError("the model has no tokenizer, so nobody knows what its rows stand for")
    source, target = byte_view(lm.tokenizer), byte_view(tokenizer)
    _check_texts(tokenizer, target)
    table = stacked(lm)
    made, labels, warnings = new_table(source, target, table, method, aux, fallback, special or {}, untrained)
    own_pad = getattr(tokenizer, "own_pad_id", tokenizer.pad_id)
    cfg = dataclasses.replace(
        lm.config, vocab_size=target.size, bos_id=tokenizer.bos_id, eos_ids=tuple(tokenizer.eos_ids), pad_id=own_pad
    )
    settings = {
        "method": method.name, "options": dataclasses.asdict(method), "fallback": fallback.name,
        "planes": table.shape[1], "rows_before": len(table), "rows_after": len(made),
        "digits_before": source.digits, "digits_after": target.digits,
        "tokenizer_before": _named(lm.tokenizer), "tokenizer_after": _named(tokenizer),
    }  # fmt: skip
    warnings = [*warnings, *_warnings(lm.tokenizer, tokenizer, source, target)]
    params = lm.params | unstacked(made, lm.params)
    return LM(cfg, params, tokenizer), Report(tuple(labels), tuple(warnings), settings)


def new_table(
    source: ByteView,
    target: ByteView,
    table: np.ndarray,
    method: Initialiser,
    aux: Aux,
    fallback: Initialiser,
    special: Mapping[str, str],
    untrained: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows f32 [ids, n, d] for the target's vocabulary, labels str [ids], and warnings.

    table: f32 [v, n, d], the source's: one plane where it is tied, else input and output. Tokens beyond it don't
    count, nor do rows that no token names.
    """
    shared = shared_rows(source, target, len(table))
    rows, labels, warnings = _copied(source, target, table, shared if method.copies else shared[:0], special)
    named = np.zeros(target.size, bool)
    named[[i for i in (*target.pieces, *target.special) if i < target.size]] = True
    known = np.unique([i for i in (*source.pieces, *source.special) if i < len(table)])
    used = table[known]
    if untrained:
        nameless = np.setdiff1d(np.arange(len(table)), known)
        shared = shared[trained(table, nameless, untrained)[shared[:, 1]]]
    for maker in (method, fallback, Normal()):
        draws = maker.label == "fallback"
        new = np.flatnonzero(labels == "")
        new = new if draws else new[named[new]]
        if len(new):
            values, found = maker.rows(Task(source, target, used if draws else table, new, shared, aux))
            rows[new[found]], labels[new[found]] = values[found], maker.label
    return rows, labels, warnings


def _copied(
    source: ByteView, target: ByteView, table: np.ndarray, shared: np.ndarray, special: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """As `new_table`, what can be copied only; other labels are "". shared: i64 [s, 2], (target id, source id)."""
    rows, labels = np.zeros((target.size, *table.shape[1:]), np.float32), np.full(target.size, "", "<U12")
    n, warnings = table.shape[1], []
    for i, ids in special_rows(source, target, special).items():
        ids = [j for j in ids if j < len(table)]
        if len(ids) > 1 and n == 1:
            name = target.special[i]
            warnings.append(f"{name} begins and ends texts, and the table is tied: its row is that of the beginning")
        if ids:
            rows[i] = [table[ids[0] if plane == 0 else ids[-1], plane] for plane in range(n)]
            labels[i] = "special"
    rows[shared[:, 0]] = table[shared[:, 1]]
    of_bytes = np.array([a in target.byte_ids or b in source.byte_ids for a, b in shared.tolist()], bool)
    labels[shared[:, 0]] = np.where(of_bytes, "byte", "exact")
    return rows, labels, warnings


def shared_rows(source: ByteView, target: ByteView, rows: int) -> np.ndarray:
    """i64 [s, 2]: (target id, source id) of ordinary tokens that stand for the same bytes, by target id. Where either
    vocabulary has several, the first of one goes with the first of the other, and so on."""
    pairs = []
    for piece, ids in target.ids.items():
        theirs = [i for i in source.ids.get(piece, ()) if i < rows]
        pairs += [(i, theirs[min(place, len(theirs) - 1)]) for place, i in enumerate(ids) if theirs]
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def special_rows(source: ByteView, target: ByteView, chosen: Mapping[str, str]) -> dict[int, list[int]]:
    """Special tokens of the target -> the source's: what is chosen by name, else that with the same name, else those
    of the same use, the one that begins texts first and the one that ends them last.

    Raises AtomError for names that aren't there.
    """
    theirs, ours = ({name: i for i, name in view.special.items()} for view in (source, target))
    wrong = [name for a, b in chosen.items() for name, known in ((a, ours), (b, theirs)) if name not in known]
    if wrong:
        raise AtomError(f"special: there is no special token {wrong[0][:60]!r}")
    out: dict[int, list[int]] = {}
    for role in reversed(ROLES):
        if role in source.roles and role in target.roles:
            out.setdefault(target.roles[role], []).append(source.roles[role])
    for i, uses in out.items():
        ends = [source.roles[role] for role in ("eos", "eot") if target.roles.get(role) == i and role in source.roles]
        out[i] = list(dict.fromkeys([uses[0], *ends[:1]]))
    out |= {ours[name]: [theirs[name]] for name in ours.keys() & theirs.keys()}
    return out | {ours[a]: [theirs[b]] for a, b in chosen.items()}


def stacked(lm: LM) -> np.ndarray:
    """The tables of a transformer, f32 [v, n, d]: the input embedding, and the output embedding where that is another
    one."""
    planes = [np.asarray(lm.params["embed"], np.float32)]
    if "unembed" in lm.params:
        planes.append(np.asarray(lm.params["unembed"], np.float32).T)
    return np.stack(planes, axis=1)


def unstacked(table: np.ndarray, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The inverse of `stacked`, by name and in the dtypes of these parameters."""
    out = {"embed": jnp.asarray(table[:, 0]).astype(params["embed"].dtype)}
    if "unembed" in params:
        out["unembed"] = jnp.asarray(table[:, 1].T).astype(params["unembed"].dtype)
    return out


def _check_texts(tokenizer: Any, view: ByteView) -> None:
    """Raises AtomError for a tokenizer from which texts don't come back."""
    if view.rewrites:
        raise AtomError(f"{view.name}: it rewrites texts ({', '.join(view.rewrites)}), so their bytes get lost")
    if lost := [c for c in _PROBE if c not in tokenizer.decode(tokenizer.encode(c))]:
        raise AtomError(f"{view.name}: it has no token for {lost[0]!r} and none for its bytes")


def _named(tokenizer: Any) -> str:
    """SHA-256 of tokenizer.json, or a tokenizer's name."""
    return getattr(tokenizer, "digest", tokenizer.name)


def _warnings(old: Any, new: Any, source: ByteView, target: ByteView) -> list[str]:
    out = []
    if source.digits != target.digits:
        out.append(
            f"a token held at most {source.digits} digits of a number, now {target.digits}: arithmetic suffers"
        )
    before, after = (getattr(t, "chat_template", None) for t in (old, new))
    if before != after:
        what = "has no chat template" if after is None else "brings a chat template that the model was not tuned with"
        out.append(f"the tokenizer {what}")
    if target.adds_space != source.adds_space:
        out.append(f"texts {'now' if target.adds_space else 'no longer'} get a space in front")
    if not new.eos_ids:
        out.append("the tokenizer names no token that ends a text, so generation stops at the length only")
    return out
