"""Conversations as documents: records with messages, or with a prompt and its completion, and their tokens, of which
the answers alone are learned."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from atom_jax.data.packing import Tokens
from atom_jax.tokenizers import chat_template
from atom_jax.tokenizers.base import Tokenizer, beginning
from atom_jax.typing import AtomError


def conversation(record: Any, where: str, field: str = "messages") -> bytes:
    """A record as a document, JSON of {"messages": [...]} or of {"prompt": ..., "completion": ...}.

    A record has a list of messages, {"role": ..., "content": ...} each, under `field`; or "prompt" and "completion",
    two texts or two such lists, which are one conversation. AtomErrors begin with `where`.
    """
    if not isinstance(record, dict):
        raise AtomError(f"{where} is no record with fields.")
    messages, prompt, completion = (record.get(name) for name in (field, "prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str) and messages is None:
        found = {"prompt": prompt, "completion": completion}
    else:
        if messages is None and isinstance(prompt, list) and isinstance(completion, list):
            messages = [*prompt, *completion]
        if not isinstance(messages, list):
            raise AtomError(f"{where} has no messages under the field {field!r}, and no prompt with a completion.")
        # Columns that only some messages have are empty in the others.
        messages = [{k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages]
        try:
            chat_template.check(messages)
        except AtomError as e:
            raise AtomError(f"{where}: {e}") from None
        found = {"messages": messages}
    try:
        return json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise AtomError(f"{where} has a lone surrogate.") from None
    except (TypeError, ValueError) as e:
        raise AtomError(f"{where} holds what JSON cannot: {e}.") from None


def conversation_tokens(piece: dict, tokenizer: Tokenizer) -> Tokens:
    """Returns the tokens of a document of `conversation`, {"text": ...}, as its template has them; learned are those
    of answers, up to and with what ends each.

    A prompt with a completion is a question with its answer. Where the tokenizer has no template, the completion
    follows the prompt, after what `beginning` says and before eos; messages need a template, or AtomError is raised.
    """
    record = json.loads(piece["text"])
    if chat_template.of(tokenizer) is None:
        if "messages" in record:
            raise AtomError(
                "the tokenizer has no chat template, which data.chat needs for messages: put one beside its "
                "tokenizer.json, as chat_template.jinja"
            )
        head, tail = beginning(tokenizer), list(tokenizer.eos_ids[:1])
        text, answers = record["prompt"] + record["completion"], [(len(record["prompt"]), None)]
    else:
        roles = {"user": "prompt", "assistant": "completion"}
        turns = record.get("messages") or [{"role": role, "content": record[name]} for role, name in roles.items()]
        text, answers = chat_template.answers(tokenizer, turns)
        head, tail = [], []
    ids, spans = tokenizer.spans(text)
    starts, learned = spans[:, 0], np.zeros(len(ids), bool)
    for begin, end in answers:
        first, last = (None if at is None else len(text[:at].encode("utf-8")) for at in (begin, end))
        learned |= (starts >= first) & (True if last is None else starts < last)
    ids = np.concatenate([np.array(head, np.int32), ids, np.array(tail, np.int32)])
    learned = np.concatenate([np.zeros(len(head), bool), learned, np.ones(len(tail), bool)])
    return Tokens(ids.astype(np.int32, copy=False), learned=learned)
