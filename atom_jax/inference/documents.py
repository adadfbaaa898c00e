"""Documents that are read once, and what is asked of them: every question starts from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from atom_jax import config
from atom_jax.inference.chat import prompt
from atom_jax.inference.generate import Generation, generate
from atom_jax.models import registry
from atom_jax.session import prompts, reading
from atom_jax.session.session import ROOM, Session
from atom_jax.typing import LM, AtomError

# Tokens that a memory which keeps everything reads at once, of a long document.
PART = 1024


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
    after an empty line. on_read: called with (tokens read, tokens in all) before each part of the document and at its
    end. on_text: called with (number, piece) as answers become certain. options: as of `generate`.
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
        session = read(lm, ids, longest - len(ids), on_read)
        for i, row in enumerate(rows):
            # The last question may use the memory up.
            here = session if i == len(rows) - 1 else session.fork()
            say = None if on_text is None else lambda _, piece, number=number: on_text(number, piece)
            before = Generation([ids.tolist()], None, {}, memory=here)
            yield generate(lm, [row], max_new_tokens, after=before, on_text=say, **options)
            number += 1


def read(lm: LM, ids: np.ndarray, room: int = ROOM, on_read: Callable[[int, int], None] | None = None) -> Session:
    """A session that has read the tokens i32 [n] of one text: part by part where the memory keeps everything, or is
    compacted between parts anyway; else in one call. room: further tokens for which there is room. on_read: as for
    `ask`."""
    family, how = registry.of(lm.config), reading.plan(lm.config)
    whole = family.memory(lm.config) is None and not how.waits
    size = PART if whole else how.part or len(ids)
    say = on_read or (lambda done, total: None)
    say(0, len(ids))
    session = Session.prefill(lm, [ids[:size]], room=len(ids[size:]) + room)
    for at in range(size, len(ids), size):
        say(at, len(ids))
        session = session.read(*prompts.padded([ids[at : at + size]], size))[0]
    say(len(ids), len(ids))
    return session
