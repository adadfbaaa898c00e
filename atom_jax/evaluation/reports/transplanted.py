"""A checkpoint given another tokenizer: loaded, remade, judged before and after, saved, reported."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atom_jax import checkpoint, picture
from atom_jax.checkpoint.atomic import check_new, staged
from atom_jax.data.sources import open_source
from atom_jax.evaluation import cache, run
from atom_jax.evaluation.reports import fairness
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.inference import transplant as lib
from atom_jax.transfer import initialisers
from atom_jax.transfer.initialisers import Initialiser
from atom_jax.transfer.transplant import LABELS, Report
from atom_jax.typing import LM, AtomError

REPORT, PICTURE = "transplant.json", "transplant.png"
_COLORS = ("#CC79A7", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#999999")


@dataclasses.dataclass(frozen=True)
class Order:
    """What is asked for.

    source: a checkpoint. tokenizer, method, fallback, donor, special: as of `inference.transplant`.
    text: source of the text that focus learns its vectors from (its train split), None: austen. judged: source of the
    text on whose validation split bits per byte are measured; nbytes: how much of it, 0 to leave that out.
    """

    source: str
    tokenizer: str
    method: str = "fvt"
    fallback: str = "normal"
    donor: str | None = None
    text: str | None = None
    judged: str = "austen"
    nbytes: int = 20_000
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)


def transplant(order: Order, out: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Carries the order out and writes the model, transplant.json and transplant.png into a new directory.

    say: is told what happens. Returns what is in transplant.json. Raises AtomError for bad input, and leaves nothing
    behind then.
    """
    target = pathlib.Path(out)
    check_new(out, "--out=")
    method = initialisers.parse(order.method, "--method")
    fallback = initialisers.parse(order.fallback, "--fallback")
    methods = {f"--method={order.method}": method, f"--fallback={order.fallback}": fallback}
    check_methods(methods, order.donor is not None, order.text is not None)
    tokenizer = lib.find_tokenizer(order.tokenizer)
    judged = documents(order.judged, "validation", order.nbytes) if order.nbytes else []
    lm, began = checkpoint.load(order.source), time.monotonic()
    texts = lessons((method, fallback), order.text)
    say(f"{order.source}: {lm.config.vocab_size:,} rows; by {method.name} for {tokenizer.vocab_size:,} ids")
    made, report = lib.transplant(
        lm, tokenizer, method, donor=order.donor, texts=texts, fallback=fallback, special=order.special
    )
    seconds = time.monotonic() - began
    say(str(report))
    result = {"source": order.source, "tokenizer": order.tokenizer, "seconds": round(seconds, 2)}
    result |= {"judged_on": order.judged, "judged_bytes": sum(map(len, judged))} if judged else {}
    for name, model in (("before", lm), ("after", made)) if judged else ():
        result[name] = measured(model, judged)
        say(f"{name:<7}{result[name]['bits_per_byte']:.4f} bits per byte, {result[name]['tokens']:,} tokens")
    result |= report.to_json()
    with staged(target) as staging:
        checkpoint.save_hf(made, staging)
        cache.write_json(staging / REPORT, result)
        draw(report, result, staging / PICTURE)
    return result


def check_methods(methods: Mapping[str, Initialiser], donor: bool | None, text: bool) -> None:
    """Raises AtomError for a method that a command cannot run, and for what none of the methods has a use for.

    methods: by the flag that names each. donor: whether there is one; None: not for every tokenizer. text: whether
    one was named.
    """
    for flag, method in methods.items():
        if "donor" in method.needs and not donor:
            whose = "each --tokenizer" if donor is None else "the --tokenizer"
            raise AtomError(f"{flag}: needs --donor, a model that has {whose} already")
        if "source_vectors" in method.needs:
            raise AtomError(f"{flag}: needs vectors of both vocabularies, which only Python can give it")
        if "hypernet" in method.needs and not method.path:
            raise AtomError(f"{flag}: needs a network, as hypernet:path=DIR")
    for flag, given, need in (("--donor", donor is not False, "donor"), ("--text", text, "target_vectors")):
        if given and not any(need in method.needs for method in methods.values()):
            users = ", ".join(name for name, cls in initialisers.INITIALISERS.items() if cls.needs == (need,))
            raise AtomError(f"{flag} has no meaning with {' and '.join(methods)}; it is for {users}")


def measured(lm: LM, documents: list[bytes]) -> dict[str, float]:
    """Bits per byte of texts, and the tokens that they are."""
    found = fairness.measure(lm, run.make_encoder(lm, EvalConfig()), documents)
    return {"bits_per_byte": found["bits_per_byte"], "tokens": found["units"][0]}


def draw(report: Report, result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes a PNG: the rows with each label, and bits per byte before and after."""
    with picture.drawn(path, ncols=2, figsize=(10, 3), width_ratios=(3, 1)) as (_, (left, right)):
        counts = report.counts
        left.barh(LABELS, [counts[label] for label in LABELS], color=_COLORS)
        for y, label in enumerate(LABELS):
            left.annotate(f" {counts[label]:,}", (counts[label], y), va="center", fontsize=8)
        left.invert_yaxis()
        left.margins(x=0.15)
        left.set(xlabel="rows", title=f"{len(report.labels):,} rows by {report.settings['method']}")
        names = [name for name in ("before", "after") if name in result]
        bars = right.bar(names, [result[name]["bits_per_byte"] for name in names], color=("#999999", "#0072B2"))
        right.bar_label(bars, fmt="%.3f", fontsize=8)
        right.margins(y=0.15)
        right.set(ylabel="bits per byte")


def lessons(methods: Sequence[Initialiser], source: str | None) -> list[bytes] | None:
    """Documents that methods learn their vectors from, where one needs those of the new tokens and no others. source:
    None: the novels."""
    needed = any(method.needs == ("target_vectors",) for method in methods)
    return documents(source or "austen", "train", 0) if needed else None


def documents(source: str, split: str, nbytes: int) -> list[bytes]:
    """Documents of a split, cut off after so many bytes in all (0: nowhere), at the end of a line. Raises AtomError
    where all of a source is wanted that a program makes without an end."""
    corpus, out, left = open_source(source, split), [], nbytes or 1 << 40
    if not nbytes and getattr(corpus, "endless", False):
        raise AtomError(f"{source}: a program makes it without an end; name a text")
    for i in range(len(corpus)):
        if left <= 0:
            break
        text = corpus.read(i)
        if len(text) > left:
            text = text[: text.rfind(b"\n", 0, left) + 1] or text[:left].decode("utf-8", "ignore").encode("utf-8")
        out.append(text)
        left -= len(text) if text else left
    return [text for text in out if text]
