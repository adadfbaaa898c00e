"""Generation with drafts next to generation without, in one run: the ids are to be the same, and the speed is not.

    make smollm2
    python -m benchmarks.drafts [--draft=ngram] [--draft_tokens=7] [--tasks=rewrite,code,...] [--out=FILE.json]

Every task is a prompt to SmolLM2-Instruct, answered with and without drafts in turns. "faster" is the median seconds
after the first token without drafts over those with them. "per call" are new tokens by calls of the model, "accepted"
the share of drafted tokens that stayed. "ids" says whether the text is the same; a call of several tokens rounds
otherwise than as many calls, so that sampled or nearly tied tokens may part after a while, which "same for" shows.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from typing import Any

import jax
from absl import flags

import atom_jax
from atom_jax.files import write_text
from atom_jax.typing import LM, AtomError
from benchmarks import command

CHECKPOINT = flags.DEFINE_string("checkpoint", "models/smollm2-135m-instruct", "Hugging Face directory.")
DRAFT = flags.DEFINE_string("draft", "ngram", "Who makes drafts.")
TOKENS = flags.DEFINE_integer("draft_tokens", 7, "Their greatest length.", lower_bound=1)
NEW = flags.DEFINE_integer("new_tokens", 120, "Tokens per answer.", lower_bound=2)
REPEATS = flags.DEFINE_integer("repeats", 3, "Answers of each kind, after one that compiles.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Also write all numbers to this JSON file.")

TEXT = (
    "The harbour of Lindholm was built in 1847, when the herring trade still fed the whole coast. Its two piers were "
    "made of granite that barges brought from the northern quarries, and its light could be seen from eleven miles "
    "away. For sixty years the boats left before dawn and came back at noon, and the women of the village salted the "
    "catch in the long sheds behind the church. When the herring moved to other waters, the sheds fell silent. Today "
    "the harbour is home to a small museum, a school of sailing and three restaurants, and in the summer the piers "
    "are full of visitors who come to see the old light."
)
CODE = (
    "def area(shape):\n    if shape.kind == 'circle':\n        return 3.14159 * shape.radius ** 2\n"
    "    if shape.kind == 'square':\n        return shape.side ** 2\n    return shape.width * shape.height\n"
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A question to the model, and the temperature of the answer."""

    question: str
    temperature: float = 0.0


TASKS = {
    "rewrite": Task(f"Copy this text, and change the name Lindholm to Westby:\n\n{TEXT}"),
    "code": Task(f"Rewrite this Python code with the name figure in place of shape:\n\n{CODE}"),
    "more-code": Task("Write a Python class for a stack with push, pop, peek, size and is_empty, with docstrings."),
    "summary": Task(f"Summarize this text in three sentences:\n\n{TEXT}"),
    "prose": Task("Write a story about a lighthouse keeper who finds a map.", 0.8),
    "summary-sampled": Task(f"Summarize this text in three sentences:\n\n{TEXT}", 0.8),
}
CHOSEN = flags.DEFINE_list("tasks", list(TASKS), f"Which of {', '.join(TASKS)}.")


def answer(lm: LM, task: Task, new: int, draft: str | None, tokens: int) -> Any:
    """What the model answers, to the last token: an answer does not end early."""
    prompt = f"<|im_start|>user\n{task.question}<|im_end|>\n<|im_start|>assistant\n"
    return atom_jax.generate(
        lm, [prompt], new, task.temperature, jax.random.key(1), stop_ids=(), draft=draft, draft_tokens=tokens
    )


def measure(lm: LM, task: Task, new: int, draft: str, tokens: int, repeats: int) -> dict[str, Any]:
    """Answers in turns."""
    seconds: dict[str | None, list[float]] = {None: [], draft: []}
    last: dict[str | None, Any] = {}
    for i in range(repeats + 1):
        for kind, found in seconds.items():
            last[kind] = made = answer(lm, task, new, kind, tokens)
            if i:
                found.append((new - 1) / made.stats["tokens_per_second"])
    plain, drafted = last[None].ids[0], last[draft].ids[0]
    same = next((i for i, (a, b) in enumerate(zip(plain, drafted)) if a != b), new)
    return {
        "plain": seconds[None], "drafts": seconds[draft], "same": same, "accepted": last[draft].acceptance[0],
        "faster": statistics.median(seconds[None]) / statistics.median(seconds[draft]),
        "per_call": last[draft].stats["tokens_per_call"], "text": last[None].text[0],
    }  # fmt: skip


def main() -> None:
    """Prints a line per task."""
    if unknown := [name for name in CHOSEN.value if name not in TASKS]:
        raise AtomError(f"--tasks: unknown {unknown[0]!r}; known: {', '.join(TASKS)}")
    lm, rows = atom_jax.load(CHECKPOINT.value, dtype="float32"), {}
    print(f"{'task':<18}{'T':>5}{'tokens/s':>10}{'drafts':>10}{'faster':>9}{'per call':>10}{'accepted':>10}  ids")
    for name in CHOSEN.value:
        row = rows[name] = measure(lm, TASKS[name], NEW.value, DRAFT.value, TOKENS.value, REPEATS.value)
        rates = [(NEW.value - 1) / statistics.median(row[kind]) for kind in ("plain", "drafts")]
        ids = "same" if row["same"] == NEW.value else f"same for {row['same']}"
        print(f"{name:<18}{TASKS[name].temperature:>5}{rates[0]:>10.1f}{rates[1]:>10.1f}{row['faster']:>8.2f}x"
              f"{row['per_call']:>10.2f}{row['accepted']:>10.0%}  {ids}", flush=True)  # fmt: skip
    if OUT.value:
        write_text(OUT.value, json.dumps(rows, indent=1))


if __name__ == "__main__":
    command.run("drafts", main)
