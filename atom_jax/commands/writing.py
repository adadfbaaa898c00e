"""Commands that write text: generate, chat, reason."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from absl import flags

from atom_jax import terminal
from atom_jax.commands import lasting
from atom_jax.commands.flags import Flags, Progress, document_of
from atom_jax.typing import AtomError


def generate(argv: list[str]) -> int | None:
    """Writes what follows prompts. argv: the command and its arguments. Raises AtomError for bad input."""
    values, _ = _generate_flags().parse(argv, 0)
    if values.compile_only:
        return _compile(values)
    if not values.checkpoint:
        raise AtomError("--checkpoint is missing")
    if not values.prompt and not values.question:
        raise AtomError("--prompt is missing" if values.file is None else "--question or --prompt is missing")
    if values.file is not None and values.memory_dir is not None:
        raise AtomError("--file and --memory_dir: choose one; remember reads documents into a memory")
    prompts = _prompts(values.prompt)
    if values.twice and values.file is not None:
        raise AtomError("--twice: reads prompts a second time, and a --file is read once")
    document = None if values.file is None else _document(values.file)

    import jax

    from atom_jax import config
    from atom_jax.checkpoint import load
    from atom_jax.inference import chat as chat_lib
    from atom_jax.inference.generate import generate as write
    from atom_jax.kvcache.lasting.chosen import Choice
    from atom_jax.lasting.memory import Memory
    from atom_jax.lasting.store import KNN, LEVELS
    from atom_jax.models import registry
    from atom_jax.nn.neighbours import Neighbours
    from atom_jax.session.drafts import drafters

    seed = config.in_range("--seed", values.seed, int)
    choice = config.build(Choice, values.choice, "--choice:")
    near = config.build(Neighbours, values.neighbours, "--neighbours:")
    if values.memory_dir is not None:
        lasting.there(values.memory_dir)
        if values.remember:
            lasting.writable(values.memory_dir)
    draft = drafters.parse(values.draft)
    lm = load(values.checkpoint, adapter=values.adapter, dtype=values.dtype, memory=values.memory)
    if isinstance(draft, drafters.Local) and registry.of(lm.config).stale is None:
        raise AtomError(
            f"--draft=local: is for models with units of their own; this is a {lm.family}, use ngram or spine"
        )
    read = None if values.memory_dir is None else Memory.open(values.memory_dir, lm, choice=choice, neighbours=near)
    if values.neighbours and (read is None or KNN not in read.settings.parts):
        raise AtomError("--neighbours: is for a memory of states (--memory_dir of remember --parts=knn)")
    if values.choice and LEVELS not in read.settings.parts:
        raise AtomError("--choice: is for a memory of entries (--memory_dir of remember --parts=levels)")
    if read is not None and LEVELS in read.settings.parts and registry.of(lm.config).memory(lm.config) is not None:
        raise AtomError(
            "--memory_dir: is read whole, which the cache policy of this model, by --memory, --adapter or its own"
            " files, would not do; --memory=none keeps everything"
        )
    options = {
        "max_new_tokens": values.max_new_tokens, "temperature": values.temperature, "key": jax.random.key(seed),
        "top_k": values.top_k, "top_p": values.top_p, "min_p": values.min_p, "stop": values.stop, "draft": draft,
        "draft_tokens": values.draft_tokens,
    }  # fmt: skip
    if document is not None:
        _ask(lm, document, values.question, prompts, values.json, values.stats, options)
        return
    alone = len(prompts) == 1 and not values.json
    own = {"memory": read, "remember": values.remember, "reread": values.reread, "twice": values.twice}
    result = write(lm, prompts, on_text=_write if alone else None, **own, **options)
    if values.json:
        _print_json(result.text, result.ids, result.stats)
    elif alone:
        print()
    else:
        for prompt, text in zip(prompts, result.text):
            print(f"--- {prompt}\n{text}")
    _report(result.stats, everything=values.stats)
    if (leaning := result.stats.get("leaning", 1)) < 1:
        which = f"{round(leaning * len(prompts))} of {len(prompts)} prompts lean"
        print(f"--memory_dir: {which} on what was remembered; with --choice=gated=false all do", file=sys.stderr)
    if any(not ids for ids in result.ids) and chat_lib.template_of(lm) is not None:
        print("the model ended at once; it was tuned for conversations: python -m atom_jax chat", file=sys.stderr)


def _generate_flags() -> Flags:
    known = Flags("generate --checkpoint=PATH --prompt=TEXT", "Writes the new text to the terminal.")
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "adapter", None, "learned evictors for it: a shipped name or a directory")
    known.add(flags.DEFINE_multi_string, "prompt", [],
              "text to continue, or - for what the input says; several --prompt run as one batch",
              empty=True)  # fmt: skip
    known.add(flags.DEFINE_string, "file", None, "a document that is read once, before every question and prompt")
    known.add(flags.DEFINE_multi_string, "question", [],
              "what is asked of it, by the model's chat template; may be repeated", "file")  # fmt: skip
    known.add(flags.DEFINE_integer, "max_new_tokens", 64, "most tokens to add to each prompt")
    known.add(flags.DEFINE_float, "temperature", 0.0, "0 always takes the most likely token")
    known.add(flags.DEFINE_integer, "top_k", 0, "draw from the k most likely tokens; 0: from all", "temperature")
    known.add(flags.DEFINE_float, "top_p", 1.0,
              "draw from the fewest tokens that together have this probability", "temperature")  # fmt: skip
    known.add(flags.DEFINE_float, "min_p", 0.0,
              "draw from tokens at least this fraction as likely as the best", "temperature")  # fmt: skip
    known.add(flags.DEFINE_integer, "seed", 0, "seed of the draws", "temperature")
    known.add(flags.DEFINE_multi_string, "stop", [], "end before this string; may be repeated")
    known.add(flags.DEFINE_string, "dtype", None, "float32 or bfloat16; by default what the checkpoint names")
    known.add(flags.DEFINE_string, "memory", None,
              "what of the keys and values is kept: none (all), or a policy such as tova:budget=512, or (a quarter "
              "of the prompt, and all that follows) tova:ratio=0.25,prompt_only=true")  # fmt: skip
    known.add(flags.DEFINE_string, "memory_dir", None,
              "a memory on disk (remember) on which prompts lean that it makes likelier")  # fmt: skip
    known.add(flags.DEFINE_list, "choice", [], "how prompts choose in a large one, by default "
              "whole=2048,pages=16,page=32,stride=16 and queries=8,gated=true", "memory_dir")  # fmt: skip
    known.add(flags.DEFINE_list, "neighbours", [], "how states (knn) are mixed in, by default "
              "nearest=1024,temperature=0,weight=0.05", "memory_dir")  # fmt: skip
    known.add(flags.DEFINE_bool, "remember", False, "afterwards read prompts and answers into it", "memory_dir")
    known.add(flags.DEFINE_integer, "reread", 0, "passages by words to read again before a prompt", "memory_dir")
    known.add(flags.DEFINE_bool, "twice", False, "read every prompt, with what --reread puts in front, twice")
    known.add(flags.DEFINE_string, "draft", None, "who guesses tokens ahead, for speed: ngram, recycle, spine, "
              "mtp:heads=PATH or, in models with units, local")  # fmt: skip
    known.add(flags.DEFINE_integer, "draft_tokens", 7, "most tokens to guess at once", "draft")
    known.add(flags.DEFINE_bool, "stats", False, "print tokens, seconds and cache use to stderr")
    known.add(flags.DEFINE_bool, "json", False, "print one JSON object with texts, ids and stats instead of text")
    known.add(flags.DEFINE_bool, "compile_only", False, "compile, say what it needs per chip, stop; needs no weights")
    known.add(flags.DEFINE_string, "topology", None, "chips nobody has to have: v5p:2x2x1", "compile_only")
    known.add(flags.DEFINE_string, "config", None, "instead of a checkpoint, FILE.py:variant", "compile_only")
    known.add(flags.DEFINE_integer, "rows", 1, "prompts in a batch", "compile_only")
    known.add(flags.DEFINE_integer, "length", 1024, "tokens of each prompt", "compile_only")
    known.add(flags.DEFINE_multi_string, "mesh", [],
              "AXIS=N, how chips are used; by default one is", "compile_only")  # fmt: skip
    known.alone("compile_only", "checkpoint", "adapter", "memory", "topology", "config", "rows", "length", "mesh")
    return known


def _ask(
    lm: Any, document: str, questions: list[str], texts: list[str], as_json: bool, everything: bool, options: dict
) -> None:  # fmt: skip
    """Prints what follows a document that is read once: the answer to every question, then what continues texts."""
    from atom_jax.inference import documents

    asked, results = [*questions, *texts], []
    many = len(asked) > 1
    with Progress("reading") as progress:
        said = None if as_json else _write
        answers = documents.ask(lm, document, questions, texts, on_read=progress, on_text=said, **options)
        for text in asked:
            if many and not as_json:
                print(f"--- {text}")
            results.append(next(answers))
            if not as_json:
                print()
                _report(results[-1].stats, everything)
    if as_json:
        ids = [result.ids[0] for result in results]
        _print_json([result.text[0] for result in results], ids, [result.stats for result in results])


def _print_json(texts: list[str], ids: list[list[int]], stats: Any) -> None:
    print(json.dumps({"text": texts, "ids": ids, "stats": stats}, ensure_ascii=not terminal.is_utf8()))


def _prompts(given: list[str]) -> list[str]:
    """The prompts, of which one may be the input."""
    if given.count("-") > 1:
        raise AtomError("--prompt=- was given twice, and there is one input")
    return [terminal.received(sys.stdin.read) if prompt == "-" else prompt for prompt in given]


def _document(file: str) -> str:
    text = document_of(file)
    if not text.strip():
        raise AtomError(f"--file={file}: the document is empty")
    return text


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


def chat(argv: list[str]) -> int:
    """Talks with a model. argv: the command and its arguments. Returns 1 where a message over a pipe had no answer.
    Raises AtomError for bad input."""
    known = Flags(
        "chat --checkpoint=PATH",
        "Talks with a model: a line is a message. /stats says what the memory holds, /reset begins anew, /quit ends;"
        " Ctrl-C ends an answer.",
    )
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "adapter", None, "learned evictors for it: a shipped name or a directory")
    known.add(flags.DEFINE_string, "memory", None, "what of the keys and values is kept, such as tova:budget=512")
    known.add(flags.DEFINE_string, "system", None, "what the model is told before the conversation", empty=True)
    known.add(flags.DEFINE_string, "file", None, "a document that the first message brings along")
    known.add(flags.DEFINE_integer, "max_new_tokens", 512, "most tokens of an answer")
    known.add(flags.DEFINE_float, "temperature", 0.0, "0 always takes the most likely token")
    known.add(flags.DEFINE_float, "top_p", 1.0,
              "draw from the fewest tokens that together have this probability", "temperature")  # fmt: skip
    known.add(flags.DEFINE_integer, "seed", 0, "seed of the draws", "temperature")
    known.add(flags.DEFINE_string, "dtype", None, "float32 or bfloat16; by default what the checkpoint names")
    values, _ = known.parse(argv, 0, "checkpoint")

    import jax

    from atom_jax import config
    from atom_jax.checkpoint import load
    from atom_jax.inference import talk
    from atom_jax.inference.chat import Chat
    from atom_jax.session import sampling

    seed = config.in_range("--seed", values.seed, int)
    most = config.in_range("--max_new_tokens", values.max_new_tokens, int, 1)
    sampling.sampler(values.temperature, top_p=values.top_p)
    document = None if values.file is None else _document(values.file)
    lm = load(values.checkpoint, adapter=values.adapter, dtype=values.dtype, memory=values.memory)
    options = {"temperature": values.temperature, "top_p": values.top_p, "key": jax.random.key(seed)}
    whole = talk.talk(lambda: Chat(lm, values.system, **options), most, document)
    return 0 if whole or sys.stdin.isatty() else 1


def reason(argv: list[str]) -> None:
    """Thinks in several chains. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags("reason --checkpoint=PATH --problem=TEXT", "Thinks in several chains, whose answers vote.")
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "adapter", None, "learned evictors for it: a shipped name or a directory")
    known.add(flags.DEFINE_string, "puzzle", "subset", "of what kind --problem is")
    known.add(flags.DEFINE_string, "problem", None, "such as 'a 10 b 18 c 15 d 11 goal 26'; its answer is checked")
    known.add(flags.DEFINE_string, "prompt", None, "instead: any text, whose answer --answer finds", empty=True)
    known.add(flags.DEFINE_string, "file", None,
              'instead: a file with a prompt on every line, or {"prompt": "...", "answer": "..."}')  # fmt: skip
    known.add(flags.DEFINE_bool, "chat", False, "prompts are messages to a model that was tuned for conversations")
    known.add(flags.DEFINE_string, "answer", "boxed",
              "a regular expression (its first group, where it has one); the last match of a chain is its answer; "
              "boxed: what stands in \\boxed{}")  # fmt: skip
    known.add(flags.DEFINE_integer, "chains", 8, "how many times the problem is thought about")
    known.add(flags.DEFINE_integer, "length", 512, "most tokens of a chain; one that has not ended abstains")
    known.add(flags.DEFINE_float, "temperature", 1.0, "0 always takes the most likely token")
    known.add(flags.DEFINE_float, "min_p", 0.4, "draw from tokens at least this fraction as likely as the best")
    known.add(flags.DEFINE_integer, "seed", 0, "seed of the draws")
    known.add(flags.DEFINE_string, "memory", None, "what of the keys and values is kept, such as tova:budget=64")
    known.add(flags.DEFINE_string, "vote", "majority", "majority, or verify: the first answer that is right")
    known.add(flags.DEFINE_string, "stop", "none",
              "end chains early: decided (the vote can't change), first:M (M have answered), verified")  # fmt: skip
    known.add(flags.DEFINE_integer, "rows", 64, "chains at a time")
    known.add(flags.DEFINE_bool, "show", False, "print the chains; what later steps can do without is grey")
    known.add(flags.DEFINE_bool, "json", False, "print one JSON object instead of text")
    values, _ = known.parse(argv, 0, "checkpoint")
    given = [f"--{name}" for name in ("problem", "prompt", "file") if values[name].value is not None]
    if values.json and values.show:
        raise AtomError("--show has no meaning beside --json, which has the chains")
    if len(given) != 1:
        raise AtomError(f"{' and '.join(given)}: choose one" if given else "--problem, --prompt or --file is missing")
    for name, other in (("puzzle", given != ["--problem"]), ("answer", given == ["--problem"])):
        if other and values[name].present:
            raise AtomError(f"--{name} has no meaning beside {given[0]}")

    from atom_jax.checkpoint import load
    from atom_jax.evaluation.reports import chains

    if values.file is None:
        task = chains.task(values.puzzle, values.problem, values.prompt, values.answer)
    else:
        task = chains.task_of_lines(document_of(values.file), values.answer, f"--file={values.file}")
    lm = load(values.checkpoint, adapter=values.adapter, memory=values.memory)
    result = chains.run(
        lm, task, values.chains, values.length, values.temperature, values.seed, values.chat, min_p=values.min_p,
        vote=values.vote, stop=values.stop, rows=values.rows,
    )  # fmt: skip
    if values.json:
        print(json.dumps(chains.as_json(task, result), ensure_ascii=not terminal.is_utf8()))
        return
    grey = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(chains.report(task, result, values.show, grey))
