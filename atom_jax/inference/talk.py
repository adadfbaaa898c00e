"""A conversation on a terminal, or over pipes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from atom_jax import terminal
from atom_jax.inference.chat import Chat
from atom_jax.typing import AtomError

COMMANDS = "/stats, /reset, /quit"


def talk(begin: Callable[[], Chat], max_new_tokens: int, document: str | None = None) -> bool:
    """Reads messages line by line until the input ends, and writes the answers as they come.

    begin: makes a new conversation. document: goes before the first message. Returns whether all messages were
    answered. Raises AtomError for input that is no text.
    """
    conversation = begin()
    brought = document
    person, whole = sys.stdin.isatty(), True
    if person:
        print(f"A line is a message; {COMMANDS}; Ctrl-C ends an answer.", file=sys.stderr)
    while True:
        try:
            if person:
                sys.stdout.write("> ")
                sys.stdout.flush()
            line = terminal.received(sys.stdin.readline)
        except KeyboardInterrupt:
            line = ""
        if not line or line.strip() == "/quit":
            if person:
                print()
            return whole
        text = line.strip()
        if text == "/stats":
            print(stats(conversation), file=sys.stderr)
        elif text == "/reset":
            conversation, brought = begin(), document
        elif text.startswith("/"):
            print(f"no command {text.split()[0]}; known: {COMMANDS}", file=sys.stderr)
        elif text:
            said = text if brought is None else f"{brought}\n\n{text}"
            if _answered(conversation, said, max_new_tokens):
                brought = None
            else:
                whole = False


def _answered(conversation: Chat, text: str, max_new_tokens: int) -> bool:
    try:
        conversation.say(text, max_new_tokens, _write)
    except KeyboardInterrupt:
        print("\n(stopped; this message and its answer are forgotten)", file=sys.stderr)
        return False
    except AtomError as e:
        print(f"error: {e}", file=sys.stderr)
        return False
    print()
    return True


def stats(conversation: Chat) -> str:
    """What the conversation holds, and how fast it went."""
    last = conversation.last
    if last is None:
        return "nothing was said yet"
    session = last.memory
    held = float(session.use()[0][0])
    return (
        f"{int(session.length[0]):,} tokens read, {held:,.0f} entries held (mean of layers and heads), buffers of"
        f" {session.nbytes / 1e6:,.1f} MB; {last.stats['new_tokens']} tokens at {last.stats['tokens_per_second']:.1f}"
        f" tokens/s, the first after {last.stats['prefill_seconds']:.1f} s"
    )


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
