"""Documents that are read once, and what is asked of them: every question starts from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from atom_jax import config
from atom_jax.inference.chat import prompt
from atom_jax.inference.generate import Generation, generate
from atom_jax.session import prompts, reading
from atom_jax.session.session import Session
from atom_jax.typing import LM, AtomError


def ask(
    lm: LM,
    document: str,
    questions: Sequence[str] = (),
    texts: Sequence[str] = (),
    max_new_tokens: int = 64,
    on_read: Callable[[int, int], None] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    **options: Any,
) -> Iterator[Generation]:
    """Reads a document and answers each of the questions, then continues it with each of the texts, one after the
    other; yields what `generate` gives, whose prompt_tokens are those of the question alone.

    questions are put as the model's chat template has it, in one message with the document. texts follow the document
    after an empty line. on_read: called with (tokens read, tokens in all) after each part of a long document, unless
    the memory has to see it whole. on_text: called with (number, piece) as answers become certain. options: as of
    `generate`.
    Raises AtomError for an empty document, one that is too long, no question, and what `generate` refuses.
    """
    if not questions and not texts:
        raise AtomError("there is no question about the document")
    max_new_tokens = config.whole("max_new_tokens", max_new_tokens, 1)
    plans = []
    if questions:
        *whole, zero, one = (
            prompt(lm, [{"role": "user", "content": f"{document}\n\n{asked}"}]) for asked in (*questions, "0", "1")
        )
        # The document with what the template puts before it.
        begins = zero[: next(i for i, (a, b) in enumerate(zip(zero, one)) if a != b)]
        plans.append((lm.tokenizer.encode(begins), [text[len(begins) :] for text in whole]))
    if texts:
        begins = document.rstrip("\n") + "\n\n"
        plans.append((prompts.token_rows(lm, [begins], first=True)[0], list(texts)))
    number = 0
    for ids, tails in plans:
        rows = prompts.token_rows(lm, tails, first=False)
        longest = len(ids) + max(map(len, rows)) + 1 + max_new_tokens
        if longest > lm.config.max_length:
            raise AtomError(
                f"the document with a question and max_new_tokens {max_new_tokens} takes {longest} positions, the"
                f" model has {lm.config.max_length}"
            )
        total = len(ids)
        hear = None if on_read is None else lambda done, total=total: on_read(min(done, total), total)
        session = Session.prefill(lm, [ids], room=longest - total, on_part=hear)
        for i, row in enumerate(rows):
            # Memory that is compacted while it reads is used up, which it may be by the last question.
            spent = reading.plan(lm.config).shrinks and i < len(rows) - 1
            here = session.fork() if spent else session
            say = None if on_text is None else lambda _, piece, number=number: on_text(number, piece)
            before = Generation([ids.tolist()], None, {}, memory=here)
            yield generate(lm, [row], max_new_tokens, after=before, on_text=say, **options)
            number += 1
