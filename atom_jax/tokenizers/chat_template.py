"""Conversations as the text that a model was tuned on, by the template that came with its tokenizer."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from atom_jax.tokenizers.base import Tokenizer
from atom_jax.typing import AtomError

# Seconds that writing a conversation may take, and characters that it may have.
SECONDS, MOST = 10, 1 << 27
_BITS = 4096
ROLES = ("system", "user", "assistant", "tool")


def render(template: str, messages: Sequence[dict[str, Any]], answer: bool = True, **variables: Any) -> str:
    """The text of a conversation: `template` is rendered by Jinja2, sandboxed, with what published templates expect.

    messages: {"role": one of ROLES, "content": text} each, in order. answer: whether the text ends where the model is
    to answer. variables: such as bos_token and eos_token.
    Raises AtomError for messages that are none, and for a template that is malformed, refuses them, breaks out,
    takes more than SECONDS, or writes more than MOST characters.
    """
    check(messages)
    try:
        with _limited():
            text = _compiled(template).render(
                messages=[dict(message) for message in messages], add_generation_prompt=answer, **variables
            )
    except AtomError:
        raise
    except Exception as e:  # a program that somebody else wrote may raise anything
        said = " ".join(str(e).split()) or type(e).__name__
        raise AtomError(f"the chat template cannot write this conversation: {said:.200}") from None
    if len(text) > MOST:
        raise AtomError(f"the chat template writes {len(text):,} characters; at most {MOST:,} are read")
    return text


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """AtomError out of a template's loops after SECONDS, in whatever thread."""
    end, before = time.monotonic() + SECONDS, sys.gettrace()

    def line(frame: Any, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise AtomError(f"the chat template takes more than {SECONDS} seconds")
        return line

    sys.settrace(lambda frame, event, arg: line if frame.f_code.co_filename == "<template>" else None)
    try:
        yield
    finally:
        sys.settrace(before)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """A jinja2.Template; Jinja2's errors for one that is malformed."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Bounded(ImmutableSandboxedEnvironment):
        """Refuses products and powers of a size that nothing interrupts while they are made."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = (len(x) if isinstance(x, str | list | tuple) else x for x in (left, right))
            a, b = (x if isinstance(x, int) else 0 for x in sizes)
            if operator == "*" and abs(a * b) > MOST:
                raise AtomError(f"the chat template multiplies to more than {MOST:,}")
            if operator == "**" and abs(a).bit_length() * abs(b) > _BITS:
                raise AtomError(f"the chat template takes a power of more than {_BITS:,} bits")
            return super().call_binop(context, operator, left, right)

    extensions = ["jinja2.ext.loopcontrols"]
    environment = Bounded(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    del environment.globals["lipsum"]
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def of(tokenizer: Tokenizer) -> str | None:
    """The chat template of a tokenizer, the one called "default" where there are several; or None."""
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict) and one.get("name") == "default"]
        found = named[-1].get("template") if named else None
    if found is not None and not isinstance(found, str):
        raise AtomError(f"the tokenizer's chat template is no text: {found!r:.80}")
    return found


def written(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], answer: bool = True) -> str:
    """The text of a conversation by the template of a tokenizer, which has one; answer, errors: as of `render`."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": next(iter(tokenizer.eos_ids), None)}
    names = {name: "" if i is None else tokenizer.decode([i]) for name, i in ids.items()}
    return render(of(tokenizer), messages, answer, **names)


def answers(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a whole conversation, and where its answers stand in it: first and one past the last character, of
    what follows the text with which the answer would be asked for, without white space at the end.

    An answer that a template writes otherwise once the conversation goes on (without its thoughts, say) is left out:
    the text before it is not what a model would be asked with. Raises AtomError where all are.
    """
    text, found = written(tokenizer, messages, answer=False), []
    # Nothing asks for an answer that comes first.
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
    for i in turns:
        asked = written(tokenizer, messages[:i])
        told = written(tokenizer, messages[: i + 1], answer=False).rstrip()
        if told.startswith(asked) and text.startswith(told):
            found.append((len(asked), len(told)))
    if turns and not found:
        raise AtomError("the chat template writes answers otherwise than it asks for them, so none can be learned")
    return text, found


def check(messages: Any) -> None:
    """Raises AtomError for what is no list of messages."""
    if isinstance(messages, str | bytes | dict) or not isinstance(messages, Sequence) or not messages:
        raise AtomError("messages: expected a list of {'role': ..., 'content': ...}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise AtomError(f"messages[{i}]: expected {{'role': ..., 'content': text}}, got {message!r:.80}")
        if message.get("role") not in ROLES:
            raise AtomError(f"messages[{i}]: role {message.get('role')!r}; expected one of {', '.join(ROLES)}")


def _refuse(reason: str) -> None:
    raise AtomError(f"the chat template refuses this conversation: {reason}")
