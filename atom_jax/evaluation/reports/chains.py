"""What `python -m atom_jax reason` says: chains of one problem, their answers, the vote, and what it cost."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from atom_jax import config
from atom_jax.data import puzzles
from atom_jax.evaluation.metrics import columns
from atom_jax.evaluation.tasks.hyper import check_words
from atom_jax.inference.scaling import Reasoning, last_match, reason
from atom_jax.typing import LM


class Task(NamedTuple):
    """prompt: what the model reads. extract: the answer in a chain. verify: whether one is right, where that can be
    checked. puzzle: the kind of problem, or None."""

    prompt: str
    extract: Callable[[str], str | None]
    verify: Callable[[int, str], bool] | None
    puzzle: puzzles.Puzzle | None


def task(kind: str, problem: str | None, prompt: str | None, answer: str) -> Task:
    """The problem of a puzzle of this kind, or a prompt whose answer a regular expression finds.

    Raises AtomError for what is no such puzzle, problem or expression.
    """
    if problem is None:
        return Task(prompt, last_match(answer), None, None)
    puzzle = puzzles.parse(kind)
    posed = puzzle.read(problem)
    return Task(puzzle.prompt(posed), puzzle.answer, lambda _, said: puzzle.solves(posed, said), puzzle)


def run(
    lm: LM, what: Task, chains: int, length: int, temperature: float, seed: int, **options: Any
) -> Reasoning:  # fmt: skip
    """Thinks, with progress on a terminal."""
    seed = config.in_range("--seed", seed, int)
    if what.puzzle is not None:
        check_words(lm, what.prompt)
    with tqdm(total=chains, unit="chain", disable=not sys.stderr.isatty(), leave=False) as bar:
        return reason(
            lm, [what.prompt], chains, length, temperature, jax.random.key(seed), extract=what.extract,
            verify=what.verify, on_end=lambda *_: bar.update(), **options,
        )  # fmt: skip


def as_json(what: Task, result: Reasoning) -> dict[str, Any]:
    """The result for JSON."""
    rows = [
        {"text": text, "answer": vote, "tokens": len(one.ids), "ended": one.ended, "cut": one.cut,
         "reads": float(one.read.sum()), "held": float(one.held[-1]) if len(one.held) else 0.0}
        for text, vote, one in zip(result.text[0], result.votes[0], result.chains[0])
    ]  # fmt: skip
    right = None if result.right is None else result.right[0]
    return {"prompt": what.prompt, "answer": result.answers[0], "right": right, "chains": rows, "stats": result.stats}


def report(what: Task, result: Reasoning, show: bool, grey: bool) -> str:
    """The result as text. show: with the chains; grey: what is dead in them in grey, else in parentheses."""
    lines = [("chain", "tokens", "held", "answer")]
    for w, (vote, one) in enumerate(zip(result.votes[0], result.chains[0])):
        held = f"{one.held[-1]:.0f}" if len(one.held) else "-"
        said = vote if vote is not None else "ended early" if one.cut else "none" if one.ended else "did not end"
        lines.append((str(w), str(len(one.ids)), held, said))
    out = [columns([(*line[:3], f"  {line[3]}".ljust(2)) for line in lines], 1)]
    if show:
        shown = (_shown(what, text, grey) for text in result.text[0])
        out = [f"{what.prompt}\n", *(f"{w}: {text}\n" for w, text in enumerate(shown)), *out]
    verdict = {None: "", True: ", which is right", False: ", which is wrong"}[result.right and result.right[0]]
    answer = result.answers[0]
    counts = sum(vote == answer for vote in result.votes[0])
    stats = result.stats
    out.append("No chain came to an answer." if answer is None else f"The vote: {answer} ({counts} chains){verdict}.")
    out.append(f"{stats['kv_reads']:,.0f} entries read, {stats['kv_entries_peak']:,.0f} held together at most.")
    return "\n".join(out)


def _shown(what: Task, text: str, grey: bool) -> str:
    if what.puzzle is None:
        return text
    words, before = text.split(), what.prompt.split()
    dead = what.puzzle.dead([*before, *words])[len(before) :]
    begin, end = ("\x1b[90m", "\x1b[0m") if grey else ("(", ")")
    return " ".join(f"{begin}{word}{end}" if d else word for word, d in zip(words, dead))
