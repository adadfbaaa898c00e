"""Commands about memories on disk: remember, recall, forget, fit_memory; and what `info` says of one."""

from __future__ import annotations

import os
from typing import Any

from absl import flags

from atom_jax.commands.flags import Flags, check_writable
from atom_jax.terminal import progress
from atom_jax.typing import AtomError


def remember(argv: list[str]) -> None:
    """Reads texts into a memory. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "remember --checkpoint=PATH --memory_dir=DIR FILE...",
        "Reads texts into a memory on disk, which is made where there is none. What was read is not read again, and"
        " after an interruption the same command goes on.",
    )
    _model_and_memory(known)
    known.add(flags.DEFINE_bool, "ids", False, "each FILE is a .npy file of token ids, as numpy.save writes it")
    known.add(flags.DEFINE_string, "source", None, "name of the text, by default the file's; for one FILE")
    known.add(flags.DEFINE_string, "law", None, "what is kept: sqrt (by default), log, all, power:alpha=0.25; with "
              "options as in sqrt:entries=64,block=128")  # fmt: skip
    known.add(flags.DEFINE_string, "score", None, "how tokens are compared: observed (by default), observed_head, "
              "surprise, knorm, random, recent, or a file that fit_memory wrote")  # fmt: skip
    known.add(flags.DEFINE_integer, "part", None, "tokens (or units, of a model that has its own) that are read at "
              "once, and of the exact window: 512")  # fmt: skip
    known.add(flags.DEFINE_string, "codec", None, "how entries are stored: float16 (by default), int8, binary or vq")
    known.add(flags.DEFINE_string, "text", None, "ids (by default): token ids are kept too; none")
    known.add(flags.DEFINE_list, "parts", None, "levels (by default): entries that stand before prompts; knn: states "
              "that are mixed into what the model says; or levels,knn")  # fmt: skip
    values, files = known.parse(argv, None, "checkpoint", "memory_dir")
    if not files:
        raise AtomError("usage: remember --checkpoint=PATH --memory_dir=DIR FILE...; no file is named")
    if values.source is not None and len(files) > 1:
        raise AtomError("--source names one text, and several files are given")
    if values.parts is not None and "levels" not in values.parts:
        for name in ("law", "score", "codec"):
            if values[name].present:
                raise AtomError(f"--{name} has no meaning with --parts={','.join(values.parts)}; it is for levels")

    import pathlib

    from atom_jax.checkpoint import load
    from atom_jax.files import open_regular
    from atom_jax.lasting.memory import Memory

    # Before a memory is made for them.
    names: dict[str, str] = {}
    for file in files:
        try:
            with open_regular(file) as opened:
                if not opened.read(1):
                    raise AtomError(f"{file}: is empty")
            other = names.setdefault(pathlib.Path(file).name, file)
            if not os.path.samefile(file, other):
                raise AtomError(f"{file}: has the name of {other}; read it alone, with a name of its own (--source)")
        except OSError as e:
            raise AtomError(f"{file}: cannot be read ({e.strerror})") from None
    writable(values.memory_dir)
    lm = load(values.checkpoint, dtype=values.dtype)
    options = {name: values[name].value for name in ("law", "score", "part", "codec", "text", "parts")}
    with Memory.open(values.memory_dir, lm, **options) as memory:
        for file in files:
            with progress(desc=file, unit="tok", unit_scale=True) as bar:
                path = pathlib.Path(file)
                what = _ids(file) if values.ids else path
                done = memory.read(what, values.source or path.name, say=bar.update)
            if not done.tokens:
                print(f"{done.name}: has been read before")
                continue
            print(
                f"{done.name}: {done.tokens:,} tokens, {done.tokens / done.seconds:.0f} tokens/s, {done.nll:.3f} nats"
                f" each; the memory holds {done.entries_after:,} entries per head ({done.entries_before:,} before),"
                f" {memory.states:,} states, {done.bytes:,} bytes"
            )


def recall(argv: list[str]) -> None:
    """Says what prompts look at. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "recall --checkpoint=PATH --memory_dir=DIR --prompt=TEXT",
        "Says which pages of what was read a prompt looks at, each with its share of attention, or of knn's states.",
    )
    _model_and_memory(known)
    known.add(flags.DEFINE_multi_string, "prompt", None, "text that leans on the memory; may be repeated")
    known.add(flags.DEFINE_integer, "pages", 5, "how many to name")
    values, _ = known.parse(argv, 0, "checkpoint", "memory_dir", "prompt")

    from atom_jax import config
    from atom_jax.checkpoint import load
    from atom_jax.lasting.memory import Memory

    pages = config.in_range("--pages", values.pages, int, 1)
    there(values.memory_dir)
    with Memory.open(values.memory_dir, load(values.checkpoint, dtype=values.dtype)) as memory:
        for prompt, found in zip(values.prompt, memory.recall(values.prompt, pages)):
            print(f"--- {prompt}")
            for page in found:
                said = "" if page.text is None else f"  {' '.join(page.text.split())}"
                print(f"{page.weight:6.1%}  {page.source}, {page.of} {page.first:,} to {page.last:,}{said}")


def forget(argv: list[str]) -> None:
    """Takes a text out of a memory. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags("forget --memory_dir=DIR --source=NAME", "Takes a text out of a memory; needs no model.")
    known.add(flags.DEFINE_string, "memory_dir", None, "the memory")
    known.add(flags.DEFINE_string, "source", None, "name of the text, as info lists it")
    values, _ = known.parse(argv, 0, "memory_dir", "source")

    from atom_jax.lasting.memory import Memory

    there(values.memory_dir)
    memory = Memory.open(values.memory_dir)
    tokens = memory.forget(values.source)
    print(f"forgot {values.source}, {tokens:,} tokens; {memory.length:,} entries per head are left")


def fit_memory(argv: list[str]) -> None:
    """Learns a score. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "fit_memory --checkpoint=PATH --out=FILE.safetensors TEXT...",
        "Fits a score for `remember --score=FILE`: facts are planted in texts, which are read once each; what was"
        " read lies beside FILE, and the same command goes on from it.",
    )
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "dtype", None, "float32 or bfloat16; by default what the checkpoint names")
    known.add(flags.DEFINE_string, "out", None, "file to write")
    known.add(flags.DEFINE_integer, "tokens", 8192, "of each text")
    known.add(flags.DEFINE_integer, "facts", 96, "planted in each text")
    known.add(flags.DEFINE_list, "kinds", [], "of facts, as atom_jax/data/facts/tables.py names them; by default all")
    known.add(flags.DEFINE_float, "ridge", 0.1, "regularisation")
    known.add(flags.DEFINE_integer, "part", 512, "tokens that are read at once, as `remember` will")
    known.add(flags.DEFINE_integer, "seed", 0, "of the facts")
    known.add(
        flags.DEFINE_integer, "later", 0,
        "instead of planted facts, keep what is looked at again at least so many tokens later; reads texts as the"
        " model does without a memory, puzzles (reason:subset) among them",
    )  # fmt: skip
    known.add(flags.DEFINE_float, "least", 0.5, "share of a query's attention that counts as a look", "later")
    known.add(flags.DEFINE_string, "policy_out", "", "directory for the score as a cache policy, for --adapter")
    known.alone("later", "checkpoint", "dtype", "out", "tokens", "ridge", "least", "policy_out")
    values, files = known.parse(argv, None, "checkpoint", "out")
    if not files:
        raise AtomError("usage: fit_memory --checkpoint=PATH --out=FILE.safetensors TEXT...; no text is named")

    from atom_jax.checkpoint import load
    from atom_jax.checkpoint.atomic import check_target
    from atom_jax.evaluation.tasks import lasting_fit
    from atom_jax.lasting import learned

    check_writable("--out", values.out, parents=True, read=learned.load)
    if values.policy_out:
        check_target(values.policy_out)
    for file in files:
        next(lasting_fit.documents_of(file))

    how = lasting_fit.Order(
        tuple(files), values.out, values.tokens, values.facts, tuple(values.kinds), values.ridge, values.part,
        values.seed, values.policy_out, values.later, values.least,
    )  # fmt: skip
    print(lasting_fit.run(load(values.checkpoint, dtype=values.dtype), how, lambda text: print(text, flush=True)))


def info(path: str, verify: bool, out: str | None = None) -> str:
    """What is in a memory. verify: everything is read and compared with its checksums. out: a PNG file for a picture
    of how it grows. Raises AtomError for a memory that is damaged."""
    from atom_jax import picture
    from atom_jax.evaluation.reports import memory_growth
    from atom_jax.lasting.memory import Memory
    from atom_jax.lasting.store import KNN

    if out is not None:
        picture.check(out)
    memory = Memory.open(path)
    stats, settings, model = memory.stats(), memory.settings, memory.model
    horizon = ", ".join(f"{age:,.0f} (rank {rank:g})" for rank, age in stats["horizon"].items())
    each = stats["tokens"] / max(stats["units"], 1)
    units = f"; {stats['units']:,} units, {each:.2f} tokens each" if stats["units"] else ""
    lines = [
        ("path", path),
        ("format", "memory on disk"),
        ("model", f"{model.family} {model.fingerprint} in {model.dtype}, {model.layers} layers, {model.heads} heads"),
        ("law", f"{settings.law}, score {settings.score}, parts of {settings.part}, {settings.sinks} sinks"),
        ("tokens", f"{stats['tokens']:,} of {len(memory.sources)} sources{units}"),
        ("entries", f"{stats['entries']:,} per head; {stats['held']:,} without the window, by law {stats['law']:,}"),
        ("states", f"{stats['states']:,} of knn" if KNN in settings.parts else "none"),
        (
            "bytes",
            f"{stats['bytes']:,}, {stats['text_bytes']:,} of them token ids, {stats['state_bytes']:,} states; entries"
            f" as {memory.codec}",
        ),
        *((("per byte", f"{stats['per_byte']:,.1f} bytes of memory for each of text"),) if stats["per_byte"] else ()),
        ("horizon", f"{horizon} {'units' if stats['units'] else 'tokens'}"),
        *((("verified", f"{memory.verify():,} bytes are what was written"),) if verify else ()),
    ]
    said = [f"{name:<12}{text}" for name, text in lines]
    for source in memory.sources:
        state = "" if source.finished else ", unfinished"
        said.append(f"  {source.name}: {source.tokens:,} tokens{state}")
    if out is not None:
        memory_growth.draw(memory, out)
        said.append(f"wrote {out}")
    return "\n".join(said)


def _ids(file: str) -> Any:
    """The array in a .npy file. AtomError for another one."""
    import numpy as np

    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError):
        found = None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
        raise AtomError(f"--ids: {file} is no .npy file of token ids")
    return found


def _model_and_memory(known: Flags) -> None:
    known.add(flags.DEFINE_string, "checkpoint", None, "the model")
    known.add(flags.DEFINE_string, "dtype", None, "float32 or bfloat16; by default what the checkpoint names")
    known.add(flags.DEFINE_string, "memory_dir", None, "the memory, which belongs to that model in that dtype")


def writable(path: str) -> None:
    """Raises AtomError where what --memory_dir names is no place to write a memory to: before a model is loaded."""
    from atom_jax.checkpoint.atomic import check_target
    from atom_jax.lasting.store import Store

    store = Store(path)
    try:
        _ = store.exists  # AtomError where something else is there
        check_target(path)
    except AtomError as e:
        raise AtomError(f"--memory_dir={e}") from None


def there(path: str) -> None:
    """Raises AtomError where no memory is at what --memory_dir names."""
    from atom_jax.lasting import store

    if not store.is_memory(path):
        raise AtomError(f"--memory_dir={path}: there is no memory; python -m atom_jax remember makes one")
