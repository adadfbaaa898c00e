"""The commands of `python -m atom_jax`: generate, units, memory, convert, transplant, instructify, info, summary,
fairness."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from atom_jax import terminal
from atom_jax.files import read_regular
from atom_jax.typing import AtomError

USAGE = """python -m atom_jax COMMAND [...]

  generate  --checkpoint=PATH --prompt=TEXT   continue a text
  units     --checkpoint=PATH --text=TEXT     a text cut into the model's units
  memory    --checkpoint=PATH --text=TEXT     the tokens that each head keeps, of models with learned evictors
  convert   SRC DST                           Hugging Face directory <-> Orbax directory, GGUF -> either
  transplant SRC --tokenizer=PATH --out=DIR   give a model another tokenizer
  instructify MODEL TUNED BASE DST            give what was made of a model what tuning changed in it
  info      PATH                              what is in a checkpoint
  summary   WORKDIR                           a training run next to baselines, with a sample and a picture
  fairness  --checkpoint=PATH                 languages next to each other, on parallel texts

`python -m atom_jax COMMAND --help` lists the flags of a command. A checkpoint is a Hugging Face directory, an Orbax
directory (converted, or the --workdir of a training run), a .gguf file or a Hugging Face model id."""


def main(argv: list[str]) -> int:
    """Runs one command and returns the exit code: 0, 1 after bad input (one sentence on stderr), 130 after Ctrl-C."""
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "generate": _generate,
        "convert": _convert,
        "info": _info,
        "instructify": _instructify,
        "transplant": _transplant,
        "summary": _summary,
        "fairness": _fairness,
        "units": _units,
        "memory": _memory,
    }

    def command() -> int | None:
        if len(argv) < 2 or argv[1] in ("--help", "-h", "help"):
            print(USAGE)
            return 0 if len(argv) > 1 else 1
        if argv[1] not in commands:
            raise AtomError(f"unknown command {argv[1]!r}; known: {', '.join(commands)}")
        with contextlib.suppress(_Done):
            return commands[argv[1]](argv[1:])

    return terminal.run("error", command)


class _Flags:
    """The flags of one command."""

    def __init__(self, usage: str, purpose: str):
        self._usage, self._values = usage, flags.FlagValues()
        self._help = [f"python -m atom_jax {usage} [flags]", "", purpose, ""]

    def add(self, define: Callable[..., Any], name: str, default: Any, text: str) -> None:
        """Defines a flag with one of absl's DEFINE functions."""
        define(name, default, text, flag_values=self._values)
        known = "" if default in (None, False, [], "") else f" (default {default})"
        self._help.append(f"  --{name:<16} {text}{known}")

    def parse(self, argv: list[str], positional: int) -> tuple[flags.FlagValues, list[str]]:
        """Returns the flags and the arguments left over, of which there must be `positional`."""
        if any(a in ("--help", "-h", "-help") for a in argv):
            print("\n".join(self._help))
            raise _Done
        rest = self._values(argv)[1:]
        if len(rest) != positional:
            given = " ".join(rest) or "nothing"
            raise AtomError(f"usage: {self._usage}; besides flags, {given} was given")
        return self._values, rest


class _Done(Exception):
    """The command has nothing left to do."""


def _generate(argv: list[str]) -> int | None:
    known = _Flags("generate --checkpoint=PATH --prompt=TEXT", "Writes the new text to the terminal.")
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "adapter", None, "learned evictors for it: a shipped name or a directory")
    known.add(flags.DEFINE_multi_string, "prompt", None, "text to continue; several --prompt run as one batch")
    known.add(flags.DEFINE_integer, "max_new_tokens", 64, "most tokens to add to each prompt")
    known.add(flags.DEFINE_float, "temperature", 0.0, "0 always takes the most likely token")
    known.add(flags.DEFINE_integer, "top_k", 0, "draw from the k most likely tokens; 0: from all")
    known.add(flags.DEFINE_float, "top_p", 1.0, "draw from the fewest tokens that together have this probability")
    known.add(flags.DEFINE_float, "min_p", 0.0, "draw from tokens at least this fraction as likely as the best")
    known.add(flags.DEFINE_integer, "seed", 0, "seed of the draws")
    known.add(flags.DEFINE_multi_string, "stop", [], "end before this string; may be repeated")
    known.add(flags.DEFINE_string, "dtype", None, "float32 or bfloat16; by default what the checkpoint names")
    known.add(flags.DEFINE_string, "memory", None,
              "what of the keys and values is kept: none (all), or a policy such as tova:budget=512, or (a quarter "
              "of the prompt, and all that follows) tova:ratio=0.25,prompt_only=true")  # fmt: skip
    known.add(flags.DEFINE_bool, "stats", False, "print tokens, seconds and cache use to stderr")
    known.add(flags.DEFINE_bool, "json", False, "print one JSON object with texts, ids and stats instead of text")
    known.add(flags.DEFINE_bool, "compile_only", False, "compile, say what it needs per chip, stop; needs no weights")
    known.add(flags.DEFINE_string, "topology", None, "with --compile_only: chips nobody has to have: v5p:2x2x1")
    known.add(flags.DEFINE_string, "config", None, "with --compile_only, instead of a checkpoint: FILE.py:variant")
    known.add(flags.DEFINE_integer, "rows", 1, "with --compile_only: prompts in a batch")
    known.add(flags.DEFINE_integer, "length", 1024, "with --compile_only: tokens of each prompt")
    known.add(flags.DEFINE_multi_string, "mesh", [],
              "with --compile_only: AXIS=N, how chips are used; by default one is")  # fmt: skip
    values, _ = known.parse(argv, 0)
    if values.compile_only:
        return _compile(values)
    for name in ("checkpoint", "prompt"):
        if not values[name].value:
            raise AtomError(f"--{name} is missing")

    import jax

    from atom_jax import config
    from atom_jax.checkpoint import load
    from atom_jax.inference.generate import generate
    from atom_jax.kvcache import policies
    from atom_jax.models import registry

    seed = config.in_range("--seed", values.seed, int)
    policy = None if values.memory is None else policies.parse(values.memory)
    lm = load(values.checkpoint, adapter=values.adapter, dtype=values.dtype)
    if values.memory is not None:
        lm = registry.with_memory(lm, policy)
    alone = len(values.prompt) == 1 and not values.json
    result = generate(
        lm,
        values.prompt,
        max_new_tokens=values.max_new_tokens,
        temperature=values.temperature,
        key=jax.random.key(seed),
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
        stop=values.stop,
        on_text=_write if alone else None,
    )
    if values.json:
        table = {"text": result.text, "ids": result.ids, "stats": result.stats}
        print(json.dumps(table, ensure_ascii=not terminal.is_utf8()))
    elif alone:
        print()
    else:
        for prompt, text in zip(values.prompt, result.text):
            print(f"--- {prompt}\n{text}")
    _report(result.stats, everything=values.stats)


def _compile(values: flags.FlagValues) -> int:
    """Prints what generation needs; 1 where it does not fit."""
    from atom_jax import config
    from atom_jax.aot.generation import described, generation
    from atom_jax.kvcache import policies
    from atom_jax.models import registry
    from atom_jax.sharding import MeshConfig

    lm = described(values.checkpoint, values.config, values.adapter)
    if values.memory is not None:
        lm = registry.with_memory(lm, policies.parse(values.memory))
    mesh = config.build(MeshConfig, values.mesh, "--mesh") if values.mesh else None
    report = generation(lm, values.rows, values.length, values.topology, mesh)
    print(report)
    return 0 if report.fits else 1


def _write(row: int, piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _report(stats: dict[str, float], everything: bool) -> None:
    rate = f"{stats['new_tokens']} tokens, {stats['tokens_per_second']:.1f} tokens/s"
    print(f"{rate} ({stats['prompt_tokens']} of prompt, first token after {stats['prefill_seconds']:.1f} s)",
          file=sys.stderr)  # fmt: skip
    if everything:
        for name, value in stats.items():
            print(
                f"  {name:<20}{value:,.3f}" if isinstance(value, float) else f"  {name:<20}{value:,}", file=sys.stderr
            )


def _convert(argv: list[str]) -> None:
    known = _Flags("convert SRC DST", "Converts a checkpoint; DST must not exist yet.")
    known.add(flags.DEFINE_string, "to", None, "hf or orbax; by default orbax for Hugging Face input, else hf")
    values, (source, target) = known.parse(argv, 2)

    from atom_jax.checkpoint import cli

    print(cli.convert(source, target, values.to))


def _instructify(argv: list[str]) -> None:
    known = _Flags(
        "instructify MODEL TUNED BASE DST",
        "Adds what tuning changed in BASE to what was made of it, a Bolmo or a transplanted model, without training.",
    )
    known.add(flags.DEFINE_float, "alpha", 1.0, "factor on the difference between TUNED and BASE")
    values, (model, tuned, base, target) = known.parse(argv, 4)

    from atom_jax.checkpoint import load, save_hf
    from atom_jax.transfer.lessons import add_tuning

    save_hf(add_tuning(load(model), load(tuned), load(base), values.alpha), target)
    print(f"wrote {target}")


def _transplant(argv: list[str]) -> None:
    known = _Flags(
        "transplant SRC --tokenizer=PATH --out=DIR",
        "Makes the table of SRC anew for another tokenizer; everything else stays. Judges it before and after.",
    )
    known.add(
        flags.DEFINE_string, "tokenizer", None, "a directory, tokenizer.json, .tiktoken file, model id, or bytes"
    )
    known.add(flags.DEFINE_string, "out", None, "a new directory for the model, transplant.json and transplant.png")
    known.add(flags.DEFINE_string, "method", "fvt", "how rows are made for tokens that SRC lacks: fvt, focus, "
              "tokenadapt; with a donor omp, neighbours, landmarks; options as in omp:k=32")  # fmt: skip
    known.add(flags.DEFINE_string, "donor", None, "a model that has this tokenizer already")
    known.add(
        flags.DEFINE_string, "fallback", "normal", "rows of which nothing is known: normal, covariance, mean, zero"
    )
    known.add(flags.DEFINE_multi_string, "special", [], "NEW=OLD, special tokens of which NEW gets the row of OLD")
    known.add(flags.DEFINE_string, "text", "austen", "text that focus learns its vectors from")
    known.add(flags.DEFINE_string, "judged", "austen", "text whose validation split is judged")
    known.add(flags.DEFINE_integer, "bytes", 20_000, "how much of it; 0: nothing is judged")
    values, (source,) = known.parse(argv, 1)
    for name in ("tokenizer", "out"):
        if not values[name].value:
            raise AtomError(f"--{name} is missing")
    pairs = [entry.split("=") for entry in values.special]
    if wrong := [entry for entry, pair in zip(values.special, pairs) if len(pair) != 2]:
        raise AtomError(f"--special={wrong[0]}: expected NEW=OLD")

    from atom_jax import config
    from atom_jax.evaluation.reports import transplanted

    order = transplanted.Order(
        source, values.tokenizer, values.method, values.fallback, values.donor, values.text, values.judged,
        config.in_range("--bytes", values["bytes"].value, int, 0), dict(pairs),
    )  # fmt: skip
    transplanted.transplant(order, values.out, lambda text: print(text, flush=True))
    print(f"wrote {values.out}")


def _info(argv: list[str]) -> None:
    known = _Flags("info PATH", "Says what is in a checkpoint.")
    known.add(flags.DEFINE_bool, "tensors", False, "also list every tensor")
    known.add(flags.DEFINE_bool, "verify", False, "read everything and compare it with its checksums")
    values, (path,) = known.parse(argv, 1)

    from atom_jax.checkpoint import cli

    print(cli.info(path, values.tensors, values.verify))


def _summary(argv: list[str]) -> None:
    known = _Flags("summary WORKDIR [flags]", "Judges a training run on its whole validation text; draws a picture.")
    known.add(flags.DEFINE_string, "prompt", "It was", "how the sample begins")
    known.add(flags.DEFINE_integer, "sample_tokens", 400, "length of the sample")
    values, (workdir,) = known.parse(argv, 1)

    from atom_jax.evaluation.reports import summary

    result = summary.summarize(workdir, values.prompt, values.sample_tokens)
    print(f"{result}\nPictures in {result.picture.parent}\n\n{summary.next_commands(workdir)}")


def _fairness(argv: list[str]) -> None:
    known = _Flags("fairness --checkpoint=PATH", "Bits per byte, bytes per unit and units per language.")
    known.add(flags.DEFINE_multi_string, "checkpoint", None, "what to judge; may be repeated")
    known.add(flags.DEFINE_string, "source", "corpora/parallel", "directory with a directory for each language")
    known.add(flags.DEFINE_integer, "limit", 100_000, "bytes per language to read at most; 0: all")
    known.add(flags.DEFINE_list, "scripts", [], "instead: rates of these scripts that make equal units per language")
    known.add(flags.DEFINE_float, "prior", 0.2, "with --scripts: unit ends per byte of English, in the first of them")
    known.add(flags.DEFINE_string, "out", None, "JSON file for the results")
    values, _ = known.parse(argv, 0)
    if not values.checkpoint and not values.scripts:
        raise AtomError("--checkpoint is missing")

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


def _units(argv: list[str]) -> None:
    known = _Flags("units --checkpoint=PATH --text=TEXT", "Prints a text with the units that the model makes of it.")
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "text", None, "the text")
    known.add(flags.DEFINE_string, "file", None, "a file with the text, instead of --text")
    known.add(flags.DEFINE_string, "out", None, "a PNG to draw the probabilities of boundaries in")
    known.add(flags.DEFINE_string, "color", "auto", "auto (on a terminal), always or never: colours, or [brackets]")
    values, _ = known.parse(argv, 0)
    if not values.checkpoint:
        raise AtomError("--checkpoint is missing")
    if values.color not in ("auto", "always", "never"):
        raise AtomError(f"--color={values.color}: expected auto, always or never")
    text = _text(values.text, values.file)

    from atom_jax.checkpoint import load
    from atom_jax.evaluation import picture, run
    from atom_jax.evaluation.reports import unit_strip
    from atom_jax.evaluation.reports import units as lib
    from atom_jax.evaluation.tasks import EvalConfig

    if values.out is not None:
        picture.check_name(values.out)
    lm = load(values.checkpoint)
    found = lib.units(lm, text, run.resolve(EvalConfig(), values.checkpoint).max_length)
    if values.out is not None:
        unit_strip.draw(found, values.out)
    terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(lib.render(found, values.color == "always" or (values.color == "auto" and terminal)))
    number, length, before = found.windows
    if number > 1:
        print(f"read in {number} windows of {length} tokens, with {before} or more before each", file=sys.stderr)


def _memory(argv: list[str]) -> None:
    known = _Flags("memory --checkpoint=PATH --text=TEXT", "Says which tokens of a text each head keeps.")
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "adapter", None, "learned evictors for a checkpoint that has none")
    known.add(flags.DEFINE_string, "text", None, "the text")
    known.add(flags.DEFINE_string, "file", None, "a file with the text, instead of --text")
    known.add(flags.DEFINE_integer, "tokens", 0, "most tokens to read; 0: what the model was made for, up to 2048")
    known.add(flags.DEFINE_string, "out", None, "a PNG to draw the decisions in")
    values, _ = known.parse(argv, 0)
    if not values.checkpoint:
        raise AtomError("--checkpoint is missing")
    if values.tokens < 0:
        raise AtomError(f"--tokens={values.tokens}: expected at least 0")
    text = _text(values.text, values.file)

    from atom_jax.checkpoint import load
    from atom_jax.evaluation import picture
    from atom_jax.evaluation.reports import memory_picture

    if values.out is not None:
        picture.check_name(values.out)
    memory = memory_picture.read(load(values.checkpoint, adapter=values.adapter), text, values.tokens)
    if values.out is not None:
        memory_picture.draw(memory, values.out)
    print(memory_picture.summary(memory))


def _text(text: str | None, file: str | None) -> str | bytes:
    """What --text or --file says."""
    if (text is None) == (file is None):
        raise AtomError("--text or --file is missing" if text is None else "--text and --file were given: choose one")
    if text is not None:
        return text
    try:
        return read_regular(file).removeprefix(codecs.BOM_UTF8)
    except OSError as e:
        raise AtomError(f"--file={file}: {e.strerror}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv))
