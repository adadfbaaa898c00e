"""Commands about checkpoints: convert, merge, mix, adapter, transplant, instructify, info."""

from __future__ import annotations

import collections

from absl import flags

from atom_jax.commands.flags import Flags
from atom_jax.typing import AtomError


def convert(argv: list[str]) -> None:
    """Converts a checkpoint. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags("convert SRC DST", "Converts a checkpoint; DST must not exist yet.")
    known.add(flags.DEFINE_string, "to", None, "hf or orbax; by default orbax for Hugging Face input, else hf")
    values, (source, target) = known.parse(argv, 2)

    from atom_jax.checkpoint import cli

    print(cli.convert(source, target, values.to))


def merge(argv: list[str]) -> None:
    """Puts LoRA into the weights. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "merge SRC DST", "Writes a model with LoRA in its weights, for transformers; DST must not exist yet."
    )
    known.add(flags.DEFINE_string, "adapter", None, "LoRA for SRC, a directory of PEFT's; or evictors, which stay")
    values, (source, target) = known.parse(argv, 2)

    from atom_jax.checkpoint import cli

    print(cli.merge(source, target, values.adapter))


def mix(argv: list[str]) -> None:
    """Makes one model of two. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "mix SRC DECODER DST",
        "Writes two transformers with one tokenizer as one model, whose next token is drawn from a mixture of theirs"
        " (as Memory Decoder's); DST must not exist yet.",
    )
    known.add(flags.DEFINE_float, "weight", 0.25, "DECODER's share of the mixture, from 0 to 1")
    known.add(flags.DEFINE_float, "temperature", 1.0, "DECODER's logits are divided by this first")
    values, (source, decoder, target) = known.parse(argv, 3)

    from atom_jax.checkpoint import cli

    print(cli.mix(source, decoder, target, values.weight, values.temperature))


def adapter(argv: list[str]) -> None:
    """Takes an adapter out of a run. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "adapter WORKDIR DST",
        "Writes what a run has trained beside its model: LoRA, as PEFT has it, learned evictors, or heads for mtp.",
    )
    _, (source, target) = known.parse(argv, 2)

    from atom_jax.checkpoint import cli

    print(cli.adapter(source, target))


def transplant(argv: list[str]) -> None:
    """Gives a model another tokenizer. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "transplant SRC --tokenizer=PATH --out=DIR",
        "Makes the table of SRC anew for another tokenizer; everything else stays. Judges it before and after.",
    )
    known.add(
        flags.DEFINE_string, "tokenizer", None, "a directory, tokenizer.json, .tiktoken file, model id, or bytes"
    )
    known.add(flags.DEFINE_string, "out", None, "a new directory for the model, transplant.json and transplant.png")
    known.add(flags.DEFINE_string, "method", "fvt", "how rows are made for tokens that SRC lacks: fvt, focus, "
              "tokenadapt, hypernet:path=DIR; with a donor omp, neighbours, landmarks; as omp:k=32")  # fmt: skip
    known.add(flags.DEFINE_string, "donor", None, "a model that has this tokenizer already")
    known.add(flags.DEFINE_string, "fallback", "normal", "where that fails: normal, covariance, mean, zero, a method")
    known.add(flags.DEFINE_multi_string, "special", [], "NEW=OLD, special tokens of which NEW gets the row of OLD")
    known.add(flags.DEFINE_string, "text", None, "text that focus learns its vectors from, by default austen")
    known.add(flags.DEFINE_string, "judged", "austen", "text whose validation split is judged")
    known.add(flags.DEFINE_integer, "bytes", 20_000, "how much of it; 0: nothing is judged")
    values, (source,) = known.parse(argv, 1, "tokenizer", "out")
    pairs = [entry.split("=") for entry in values.special]
    if wrong := [entry for entry, pair in zip(values.special, pairs) if len(pair) != 2]:
        raise AtomError(f"--special={wrong[0]}: expected NEW=OLD")
    if twice := [new for new, n in collections.Counter(pair[0] for pair in pairs).items() if n > 1]:
        raise AtomError(f"--special={twice[0]}=...: was given twice")
    if values["judged"].present and not values["bytes"].value:
        raise AtomError("--judged has no meaning beside --bytes=0")

    from atom_jax import config
    from atom_jax.evaluation.reports import transplanted

    order = transplanted.Order(
        source, values.tokenizer, values.method, values.fallback, values.donor, values.text, values.judged,
        config.in_range("--bytes", values["bytes"].value, int, 0), dict(pairs),
    )  # fmt: skip
    transplanted.transplant(order, values.out, lambda text: print(text, flush=True))
    print(f"wrote {values.out}")


def instructify(argv: list[str]) -> None:
    """Adds what tuning changed. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "instructify MODEL TUNED BASE DST",
        "Adds what tuning changed in BASE to what was made of it, a Bolmo or a transplanted model, without training.",
    )
    known.add(flags.DEFINE_float, "alpha", 1.0, "factor on the difference between TUNED and BASE")
    values, (model, tuned, base, target) = known.parse(argv, 4)

    from atom_jax import config
    from atom_jax.checkpoint import load, save_hf
    from atom_jax.checkpoint.atomic import check_new
    from atom_jax.transfer.lessons import add_tuning

    alpha = config.in_range("--alpha", values.alpha, float)
    check_new(target)
    save_hf(add_tuning(load(model), load(tuned), load(base), alpha), target)
    print(f"wrote {target}")


def info(argv: list[str]) -> None:
    """Says what is in a checkpoint, adapter or memory. argv, and errors: as of `convert`."""
    known = Flags("info PATH", "Says what is in a checkpoint, in an adapter, or in a memory on disk.")
    known.add(flags.DEFINE_bool, "tensors", False, "also list every tensor")
    known.add(flags.DEFINE_bool, "verify", False, "read everything and compare it with its checksums")
    known.add(flags.DEFINE_bool, "json", False, "print one JSON object instead of text")
    known.add(flags.DEFINE_string, "out", None, "of a memory: FILE.png for a picture of its entries over its tokens")
    values, (path,) = known.parse(argv, 1)

    from atom_jax.checkpoint import cli
    from atom_jax.commands import lasting
    from atom_jax.lasting import store

    if store.is_memory(path):
        if values.json or values.tensors:
            raise AtomError("--json and --tensors are for checkpoints; this is a memory on disk")
        print(lasting.info(path, values.verify, values.out))
    elif values.out is not None:
        cli.info(path)  # AtomError where nothing is there
        raise AtomError("--out is for memories on disk; this is a checkpoint")
    else:
        print(cli.info(path, values.tensors, values.verify, values.json))
