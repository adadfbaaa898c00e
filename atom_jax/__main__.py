"""The commands of `python -m atom_jax`: see USAGE."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable

import atom_jax
from atom_jax import terminal
from atom_jax.commands import completion, images, lasting, models, reports, running, serving, worlds, writing
from atom_jax.commands.flags import Done, named
from atom_jax.fields import meant
from atom_jax.typing import AtomError

USAGE = """atom-jax COMMAND [...], or python -m atom_jax COMMAND [...]

  train     --config=FILE.py --workdir=DIR    train a model
  eval      --checkpoint=PATH --tasks=NAMES   evaluate a model
  generate  --checkpoint=PATH --prompt=TEXT   continue a text
  reason    --checkpoint=PATH --problem=TEXT  think in several chains, whose answers vote
  chat      --checkpoint=PATH                 talk with a model that was tuned for it
  serve     --checkpoint=PATH                 answer many at once over the OpenAI HTTP interface
  units     --checkpoint=PATH --text=TEXT     a text cut into the model's units
  tokens    --checkpoint=PATH --image=FILE    codes of an image, as many as it needs
  imagine   --checkpoint=PATH --actions=1,1,0 what actions would lead to, as a model of a world has it
  plan      --checkpoint=PATH --env=NAME      watch a world, plan by imagining, act
  memory    --checkpoint=PATH --text=TEXT     the tokens that each head keeps, of models with learned evictors
  remember  --checkpoint=PATH --memory_dir=DIR FILE...  read texts into a memory on disk
  recall    --checkpoint=PATH --memory_dir=DIR --prompt=TEXT  what of it a prompt looks at
  forget    --memory_dir=DIR --source=NAME    take a text out of it
  fit_memory --checkpoint=PATH --out=FILE TEXT...  learn what is worth remembering, in closed form
  convert   SRC DST                           Hugging Face directory <-> Orbax directory, GGUF -> either
  merge     SRC DST                           LoRA in the weights of a model, for transformers
  mix       SRC DECODER DST                   two models of one tokenizer, whose next tokens are mixed
  adapter   WORKDIR DST                       what a run has trained beside its model, alone, for PEFT
  transplant SRC --tokenizer=PATH --out=DIR   give a model another tokenizer
  transplants SRC --tokenizer=PATH --out=DIR  several tokenizers and methods next to each other, judged
  instructify MODEL TUNED BASE DST            give what was made of a model what tuning changed in it
  info      PATH                              what is in a checkpoint, or in a memory
  summary   WORKDIR                           a training run next to baselines, with a sample and a picture
  fairness  --checkpoint=PATH                 languages next to each other, on parallel texts
  completion SHELL                            what makes bash, zsh or fish complete all this

`python -m atom_jax COMMAND --help` lists the flags of a command. A checkpoint is a Hugging Face directory, an Orbax
directory (converted, or the --workdir of a training run), a .gguf file or a Hugging Face model id."""


def main(argv: list[str]) -> int:
    """Runs one command and returns the exit code: 0, 1 after bad input (one sentence on stderr), 130 after Ctrl-C."""
    if argv[1:2] == ["help"] and len(argv) > 2:
        argv = [argv[0], argv[2], "--help"]

    def command() -> int | None:
        if len(argv) < 2 or argv[1] in ("--help", "-h", "help"):
            print(USAGE)
            return 0 if len(argv) > 1 else 1
        if argv[1] == "--version":
            print(atom_jax.__version__)
            return 0
        known = _commands()
        if argv[1] not in known:
            raise AtomError(f"unknown command {argv[1]!r}{meant(argv[1], known)}; known: {', '.join(known)}")
        with contextlib.suppress(Done), named(argv[2:]):
            return known[argv[1]](argv[1:])

    return terminal.run("error", command)


def script(name: str, argv: list[str]) -> int:
    """Runs the command `name` as the script NAME.py, with the script's arguments; returns the exit code."""

    def command() -> int | None:
        with contextlib.suppress(Done), named(argv[1:]):
            return _commands()[name]([name, *argv[1:]])

    return terminal.run(f"{name}.py", command)


def entry() -> int:
    """The program atom-jax."""
    return main(sys.argv)


def _commands() -> dict[str, Callable[[list[str]], int | None]]:
    known: dict[str, Callable[[list[str]], int | None]] = {
        "train": running.train,
        "eval": running.evaluate,
        "generate": writing.generate,
        "reason": writing.reason,
        "chat": writing.chat,
        "remember": lasting.remember,
        "recall": lasting.recall,
        "forget": lasting.forget,
        "fit_memory": lasting.fit_memory,
        "serve": serving.serve,
        "convert": models.convert,
        "merge": models.merge,
        "mix": models.mix,
        "adapter": models.adapter,
        "info": models.info,
        "transplants": reports.transplants,
        "instructify": models.instructify,
        "transplant": models.transplant,
        "summary": reports.summary,
        "fairness": reports.fairness,
        "units": reports.units,
        "memory": reports.memory,
        "tokens": images.tokens,
        "imagine": worlds.imagine,
        "plan": worlds.plan,
    }
    known["completion"] = functools.partial(completion.completion, known)
    return known


if __name__ == "__main__":
    sys.exit(entry())
