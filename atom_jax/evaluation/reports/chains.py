"""What `python -m atom_jax reason` says: chains of problems, their answers, the vote, and what it cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from atom_jax import config
from atom_jax.data import puzzles
from atom_jax.evaluation.metrics import columns
from atom_jax.evaluation.tasks.hyper import check_words
from atom_jax.fields import meant
from atom_jax.inference import chat as template
from atom_jax.inference.scaling import Reasoning, last_match, reason
from atom_jax.typing import LM, AtomError


class Task(NamedTuple):
    """prompts: what the model reads. extract: the answer in a chain. verify: whether one to prompt number p is right,
    where that can be checked. puzzle: the kind of problem, or None."""

    prompts: list[str]
    extract: Callable[[str], str | None]
    verify: Callable[[int, str], bool] | None
    puzzle: puzzles.Puzzle | None = None


def task(kind: str, problem: str | None, prompt: str | None, answer: str) -> Task:
    """The problem of a puzzle of this kind, or a prompt whose answer a regular expression finds.

    Raises AtomError for what is no such puzzle, problem or expression.
    """
    if problem is None:
        return Task([prompt], last_match(answer), None)
    puzzle = puzzles.parse(kind)
    posed = puzzle.read(problem)
    return Task([puzzle.prompt(posed)], puzzle.answer, lambda _, said: puzzle.solves(posed, said), puzzle)


def task_of_lines(text: str, answer: str, name: str) -> Task:
    """A prompt on every line, or the object {"prompt": ..., "answer": ...}, whose answer, if it is there, is the
    right one. answer: a regular expression; name: of the file, for errors.

    Raises AtomError for lines that are neither, and where some have answers and others not.
    """
    prompts, known = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        given = {"prompt": line.strip()}
        if line.lstrip().startswith("{"):
            try:
                given = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise AtomError(f"{name}, line {number}: not a JSON object ({e})") from None
            for field in given.keys() - {"prompt", "answer"}:
                if hint := meant(field, ("prompt", "answer")):
                    raise AtomError(f"{name}, line {number}: unknown field {field!r}{hint}")
        if not isinstance(given.get("prompt"), str) or type(given.get("answer", "")) not in (str, int, float):
            raise AtomError(f'{name}, line {number}: expected a text, or {{"prompt": "...", "answer": "..."}}')
        prompts.append(given["prompt"])
        known.append(str(given["answer"]) if "answer" in given else None)
    if not prompts:
        raise AtomError(f"{name}: no prompts")
    if None in known and set(known) != {None}:
        raise AtomError(f"{name}: prompt {known.index(None) + 1} has no answer, others have")
    verify = None if None in known else lambda p, said: said.strip() == known[p].strip()
    return Task(prompts, last_match(answer), verify)


def run(
    lm: LM, what: Task, chains: int, length: int, temperature: float, seed: int, chat: bool = False, **options: Any
) -> Reasoning:  # fmt: skip
    """Thinks, with progress on a terminal. chat: prompts are messages to a model that was tuned for conversations."""
    seed, prompts = config.in_range("--seed", seed, int), what.prompts
    config.in_range("--length", length, int, 1)
    if what.puzzle is not None:
        check_words(lm, prompts[0])
    if chat:
        asked = [template.prompt(lm, [{"role": "user", "content": prompt}]) for prompt in prompts]
        prompts = [lm.tokenizer.encode(text).tolist() for text in asked]
    with tqdm(total=chains * len(what.prompts), unit="chain", disable=not sys.stderr.isatty(), leave=False) as bar:
        return reason(
            lm, prompts, chains, length, temperature, jax.random.key(seed), extract=what.extract,
            verify=what.verify, on_end=lambda *_: bar.update(), **options,
        )  # fmt: skip


def as_json(what: Task, result: Reasoning) -> dict[str, Any]:
    """The result for JSON: of one prompt {"prompt", "answer", "right", "chains", "stats"}, of several {"problems":
    [...], "accuracy", "stats"}."""
    problems = []
    for p, prompt in enumerate(what.prompts):
        rows = [
            {"text": text, "answer": vote, "tokens": len(one.ids), "ended": one.ended, "cut": one.cut,
             "reads": float(one.read.sum()), "held": float(one.held[-1]) if len(one.held) else 0.0}
            for text, vote, one in zip(result.text[p], result.votes[p], result.chains[p])
        ]  # fmt: skip
        right = None if result.right is None else result.right[p]
        problems.append({"prompt": prompt, "answer": result.answers[p], "right": right, "chains": rows})
    if len(problems) == 1:
        return {**problems[0], "stats": result.stats}
    accuracy = None if result.right is None else sum(result.right) / len(problems)
    return {"problems": problems, "accuracy": accuracy, "stats": result.stats}


def report(what: Task, result: Reasoning, show: bool, grey: bool) -> str:
    """The result as text. show: with the chains; grey: what is dead in them in grey, else in parentheses."""
    out, stats, alone = [], result.stats, len(what.prompts) == 1
    for p, prompt in enumerate(what.prompts if show else ()):
        shown = (_shown(what, prompt, text, grey) for text in result.text[p])
        out += [f"{prompt}\n", *(f"{w}: {text}\n" for w, text in enumerate(shown))]
    out.append(_one(result) if alone else _table(what, result))
    if alone:
        verdict = {None: "", True: ", which is right", False: ", which is wrong"}[result.right and result.right[0]]
        answer, votes = result.answers[0], result.votes[0]
        none = "No chain came to an answer."
        out.append(none if answer is None else f"The vote: {answer} ({votes.count(answer)} chains){verdict}.")
    elif result.right is not None:
        out.append(f"{sum(result.right)} of {len(result.right)} votes are right.")
    out.append(f"{stats['kv_reads']:,.0f} entries read, {stats['kv_entries_peak']:,.0f} held together at most.")
    return "\n".join(out)


def _one(result: Reasoning) -> str:
    lines = [("chain", "tokens", "held", "answer")]
    for w, (vote, one) in enumerate(zip(result.votes[0], result.chains[0])):
        held = f"{one.held[-1]:.0f}" if len(one.held) else "-"
        said = vote if vote is not None else "ended early" if one.cut else "none" if one.ended else "did not end"
        lines.append((str(w), str(len(one.ids)), held, said))
    return columns([(*line[:3], f"  {line[3]}".ljust(2)) for line in lines], 1)


def _table(what: Task, result: Reasoning) -> str:
    lines = [("prompt", "answer", "votes", "ended", "")]
    for p, prompt in enumerate(what.prompts):
        answer, votes, start = result.answers[p], result.votes[p], " ".join(prompt.split())
        verdict = "" if result.right is None else "right" if result.right[p] else "wrong"
        count = f"{0 if answer is None else votes.count(answer)}/{len(votes)}"
        ended = str(sum(one.ended for one in result.chains[p]))
        lines.append(
            (f"{start[:56]}{'...' * (len(start) > 56)}", "-" if answer is None else answer, count, ended, verdict)
        )
    return columns(lines, 1)


def _shown(what: Task, prompt: str, text: str, grey: bool) -> str:
    if what.puzzle is None:
        return text
    words, before = text.split(), prompt.split()
    dead = what.puzzle.dead([*before, *words])[len(before) :]
    begin, end = ("\x1b[90m", "\x1b[0m") if grey else ("(", ")")
    return " ".join(f"{begin}{word}{end}" if d else word for word, d in zip(words, dead))
