"""Conversations as the text that a model was tuned on, by the template that came with its tokenizer."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

from atom_jax.typing import AtomError

ROLES = ("system", "user", "assistant", "tool")


def render(template: str, messages: Sequence[dict[str, Any]], answer: bool = True, **variables: Any) -> str:
    """The text of a conversation: `template` is rendered by Jinja2, sandboxed, with what published templates expect.

    messages: {"role": one of ROLES, "content": text} each, in order. answer: whether the text ends where the model is
    to answer. variables: such as bos_token and eos_token.
    Raises AtomError for messages that are none, and for a template that is malformed, refuses them, or breaks out.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    check(messages)
    extensions = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=answer, **variables
        )
    except AtomError:
        raise
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as e:
        said = " ".join(str(e).split()) or type(e).__name__
        raise AtomError(f"the chat template cannot write this conversation: {said:.200}") from None


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
