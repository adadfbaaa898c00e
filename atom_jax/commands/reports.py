"""Commands that look at models: summary, fairness, transplants, units, memory."""

from __future__ import annotations

import os
import sys

from absl import flags

from atom_jax.commands.flags import Flags, check_writable, text_of
from atom_jax.fields import read_json
from atom_jax.typing import AtomError


def summary(argv: list[str]) -> None:
    """Judges a training run. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags("summary WORKDIR", "Judges a training run on its whole validation text; draws a picture.")
    known.add(flags.DEFINE_string, "prompt", "It was", "how the sample begins", empty=True)
    known.add(flags.DEFINE_integer, "sample_tokens", 400, "length of the sample")
    values, (workdir,) = known.parse(argv, 1)

    from atom_jax import config
    from atom_jax.evaluation.reports import summary

    tokens = config.in_range("--sample_tokens", values.sample_tokens, int, 1)
    result = summary.summarize(workdir, values.prompt, tokens)
    print(f"{result}\nPictures in {result.picture.parent}\n\n{summary.next_commands(workdir)}")


def fairness(argv: list[str]) -> None:
    """Compares languages. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags("fairness --checkpoint=PATH", "Bits per byte, bytes per unit and units per language.")
    known.add(flags.DEFINE_multi_string, "checkpoint", None, "what to judge; may be repeated")
    known.add(flags.DEFINE_string, "source", "corpora/parallel", "directory with a directory for each language")
    known.add(flags.DEFINE_integer, "limit", 100_000, "bytes per language to read at most; 0: all")
    known.add(flags.DEFINE_list, "scripts", [], "instead: rates of these scripts that make equal units per language")
    known.add(flags.DEFINE_float, "prior", 0.2, "unit ends per byte of English, in the first of them", "scripts")
    known.add(flags.DEFINE_string, "out", None, "JSON file for the results")
    known.alone("scripts", "source", "prior")
    values, _ = known.parse(argv, 0)
    if not values.checkpoint and not values.scripts:
        raise AtomError("--checkpoint is missing")
    check_writable("--out", values.out, parents=True, read=read_json)

    import pathlib

    from atom_jax.evaluation import cache
    from atom_jax.evaluation.reports import fairness

    if values.scripts:
        rates = fairness.priors(values.source, values.scripts, values.prior)
        print(", ".join(f"{name} {rate:.3f}" for name, rate in zip(values.scripts, rates)))
        return
    report = fairness.compare(values.checkpoint, values.source, values.limit)
    if values.out:
        cache.write_json(pathlib.Path(values.out), report)
    print(fairness.table(report))


def transplants(argv: list[str]) -> None:
    """Compares ways to another tokenizer. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "transplants SRC --tokenizer=PATH --out=DIR",
        "Bits per byte of SRC onto tokenizers, by several methods, before any training, beside SRC and trained "
        "models. Goes on where it was stopped.",
    )
    known.add(flags.DEFINE_multi_string, "tokenizer", [], "as of transplant; may be repeated")
    known.add(
        flags.DEFINE_multi_string, "method", [], "as of transplant; by default fvt, focus, and omp with a donor"
    )
    known.add(flags.DEFINE_multi_string, "donor", [], "TOKENIZER=MODEL, a model that has this tokenizer")
    known.add(flags.DEFINE_multi_string, "trained", [], "a checkpoint to judge as it is; may be repeated")
    known.add(flags.DEFINE_string, "out", None, "directory of transplants.jsonl and transplants.md")
    known.add(flags.DEFINE_string, "text", "austen", "text that focus learns its vectors from")
    known.add(flags.DEFINE_string, "judged", "austen", "text whose validation split is judged")
    known.add(flags.DEFINE_integer, "bytes", 20_000, "how much of it")
    values, (source,) = known.parse(argv, 1, "tokenizer", "out")
    pairs = [tuple(entry.rsplit("=", 1)) for entry in values.donor]
    if wrong := [entry for entry, pair in zip(values.donor, pairs) if len(pair) != 2]:
        raise AtomError(f"--donor={wrong[0]}: expected TOKENIZER=MODEL")
    donors = {tokenizer for tokenizer, _ in pairs}
    if len(donors) < len(pairs):
        raise AtomError("--donor: a tokenizer has two of them")

    from atom_jax.evaluation.reports import transplanted, transplants
    from atom_jax.transfer import initialisers

    if values.method:
        asked = {f"--method={name}": initialisers.parse(name, "--method") for name in values.method}
        donor = donors >= set(values.tokenizer) or (None if donors else False)
        transplanted.check_methods(asked, donor, values["text"].present > 0)
    methods = tuple(values.method) or transplants.Orders.methods
    orders = transplants.Orders(
        source, tuple(values.tokenizer), methods, tuple(values.trained), tuple(pairs), values.text, values.judged,
        values["bytes"].value,
    )  # fmt: skip
    transplants.compare(orders, values.out, lambda text: print(text, flush=True))
    print(f"wrote {values.out}/{transplants.TABLE}")


def units(argv: list[str]) -> None:
    """Shows the units of a text or of an episode. argv: the command and its arguments. Raises AtomError for bad
    input."""
    known = Flags("units --checkpoint=PATH --text=TEXT", "Prints a text, or an episode, with the units made of it.")
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "text", None, "the text", empty=True)
    known.add(flags.DEFINE_string, "file", None, "a file with the text, instead of --text")
    known.add(flags.DEFINE_string, "episode", None, "instead of a text, for world models: the world, such as watch")
    known.add(flags.DEFINE_integer, "length", 0, "frames that are watched; 0: as many as usual", "episode")
    known.add(flags.DEFINE_integer, "seed", 0, "which one", "episode")
    known.add(flags.DEFINE_string, "out", None, "a PNG to draw the probabilities of boundaries, or the frames, in")
    known.add(flags.DEFINE_string, "color", "auto", "auto (on a terminal), always or never: colours, or [brackets]")
    known.alone("episode", "checkpoint", "length", "seed", "out", "text", "file")
    values, _ = known.parse(argv, 0, "checkpoint")
    if values.color not in ("auto", "always", "never"):
        raise AtomError(f"--color={values.color}: expected auto, always or never")
    if values.episode is not None:
        _episode(values)
        return
    text = text_of(values.text, values.file)

    from atom_jax import picture
    from atom_jax.checkpoint import load
    from atom_jax.evaluation import run
    from atom_jax.evaluation.reports import unit_strip
    from atom_jax.evaluation.reports import units as lib
    from atom_jax.evaluation.tasks import EvalConfig

    picture.check(values.out)
    lm = load(values.checkpoint)
    found = lib.units(lm, text, run.resolve(EvalConfig(), values.checkpoint).max_length)
    if values.out is not None:
        unit_strip.draw(found, values.out)
    terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(lib.render(found, values.color == "always" or (values.color == "auto" and terminal)))
    number, length, before = found.windows
    if number > 1:
        print(f"read in {number} windows of {length} tokens, with {before} or more before each", file=sys.stderr)


def _episode(values: flags.FlagValues) -> None:
    """The units of an episode."""
    if values.text is not None or values.file is not None:
        raise AtomError("--episode is a world: leave out --text and --file")

    from atom_jax import picture
    from atom_jax.checkpoint import load
    from atom_jax.evaluation.reports import frame_strip, worlds

    picture.check(values.out)
    strip = worlds.seen(load(values.checkpoint), values.episode, values.length, values.seed)
    if values.out is not None:
        frame_strip.draw(strip, values.out)
    print(frame_strip.render(strip))


def memory(argv: list[str]) -> None:
    """Shows what heads keep of a text. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags("memory --checkpoint=PATH --text=TEXT", "Says which tokens of a text each head keeps.")
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "adapter", None, "learned evictors for a checkpoint that has none")
    known.add(flags.DEFINE_string, "text", None, "the text", empty=True)
    known.add(flags.DEFINE_string, "file", None, "a file with the text, instead of --text")
    known.add(flags.DEFINE_integer, "tokens", 0, "most tokens to read; 0: what the model was made for, up to 2048")
    known.add(flags.DEFINE_integer, "facts", 0, "so many facts are planted in the text, to see what is kept of them")
    known.add(flags.DEFINE_string, "out", None, "a PNG to draw the decisions in")
    values, _ = known.parse(argv, 0, "checkpoint")
    for name in ("tokens", "facts"):
        if values[name].value < 0:
            raise AtomError(f"--{name}={values[name].value}: expected at least 0")
    text = text_of(values.text, values.file)

    from atom_jax import picture
    from atom_jax.checkpoint import load
    from atom_jax.evaluation.reports import memory_picture

    picture.check(values.out)
    memory = memory_picture.read(load(values.checkpoint, adapter=values.adapter), text, values.tokens, values.facts)
    if values.out is not None:
        memory_picture.draw(memory, values.out)
    print(memory_picture.summary(memory))
