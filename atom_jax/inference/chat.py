"""Conversations: the model's chat template, and a memory that stays between turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from atom_jax.inference.generate import Generation, generate
from atom_jax.session.prompts import check_model
from atom_jax.tokenizers import chat_template
from atom_jax.typing import LM, AtomError


def template_of(lm: LM) -> str | None:
    """The chat template of the model's tokenizer, the one called "default" where there are several; or None."""
    check_model(lm)
    return chat_template.of(lm.tokenizer)


def prompt(lm: LM, messages: Sequence[dict[str, Any]]) -> str:
    """The text of a conversation, up to where the model is to answer.

    Raises AtomError for a model without a chat template, and for messages that it does not take.
    """
    if template_of(lm) is None:
        raise AtomError("this model has no chat template: it was not tuned for conversations; use generate")
    return chat_template.written(lm.tokenizer, messages)


def chat(lm: LM, messages: Sequence[dict[str, Any]], max_new_tokens: int = 256, **options: Any) -> str:
    """The answer to a conversation, {"role": ..., "content": ...} each. options: as of `generate`."""
    text = prompt(lm, messages)
    ids = lm.tokenizer.encode(text).tolist()
    return generate(lm, [ids], max_new_tokens, **options).text[0].strip()


class Chat:
    """A conversation that goes on: what was read stays in the model's memory, and each turn reads only what is new.

    messages: what was said so far. last: the newest generation, None before the first; its stats and memory say what
    the conversation costs.
    """

    def __init__(self, lm: LM, system: str | None = None, **options: Any):
        """options: as of `generate`, for all turns; key: turn t draws with fold_in(key, t)."""
        self.lm, self.options = lm, options
        self.key = options.pop("key", None)
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.last: Generation | None = None
        self._read: str | None = None
        prompt(lm, [*self.messages, {"role": "user", "content": ""}])

    def say(
        self, text: str, max_new_tokens: int = 256, on_text: Callable[[str], None] | None = None
    ) -> str:  # fmt: skip
        """The answer to the next message. on_text: called with pieces of it as they become certain.

        What was said counts only when the answer is whole: after an exception, such as KeyboardInterrupt out of
        `on_text`, the conversation is as it was, and its next turn reads it again.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        whole = prompt(self.lm, said)
        after = self.last if self._read is not None and whole.startswith(self._read) else None
        # Templates that write earlier turns otherwise than they were read (without the thoughts, say) begin anew.
        new = whole if after is None else whole[len(self._read) :]
        key = None if self.key is None else jax.random.fold_in(self.key, len(said))
        self._read, self.last = None, None
        self.last = generate(
            self.lm, [self.lm.tokenizer.encode(new).tolist()], max_new_tokens, key=key, keep_memory=True, after=after,
            on_text=None if on_text is None else lambda _, piece: on_text(piece), **self.options,
        )  # fmt: skip
        answer = self.last.text[0]
        self._read = whole + answer + self._end()
        self.messages = [*said, {"role": "assistant", "content": answer}]
        return answer

    def _end(self) -> str:
        """The text of the stop id that ended the answer, which the memory has taken; "" where there was none."""
        newest = int(self.last.memory.token[0])
        ends = {*self.lm.tokenizer.eos_ids, *self.lm.config.eos_ids}
        return self.lm.tokenizer.decode([newest]) if newest in ends else ""
