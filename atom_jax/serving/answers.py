"""The OpenAI HTTP interface as data: what the JSON of an answer says, whole or piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from atom_jax.inference.request import Mark, Piece, Request


class Answers:
    """The answers to one request: those of a chat or of a completion."""

    def __init__(self, chat: bool, model: str, tokenizer: Any):
        self.chat, self._model, self._tokenizer = chat, model, tokenizer
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}

    def whole(self, requests: Sequence[Request], n: int) -> dict[str, Any]:
        """All choices, which have ended, with their usage. n: choices of each prompt."""
        choices = [self._choice(i, Piece(r.text, r.ids, r.marks, r.end), False) for i, r in enumerate(requests)]
        return {**self._head(False), "choices": choices, "usage": usage(requests, n)}

    def begin(self, i: int) -> dict[str, Any]:
        """The first piece of a chat's choice, which names its role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._head(True), "choices": [choice]}

    def piece(self, i: int, piece: Piece) -> dict[str, Any]:
        """A piece of choice number i."""
        return {**self._head(True), "choices": [self._choice(i, piece, True)]}

    def end(self, requests: Sequence[Request], n: int) -> dict[str, Any]:
        """The last piece of a stream, with the usage."""
        return {**self._head(True), "choices": [], "usage": usage(requests, n)}

    def _head(self, streams: bool) -> dict[str, Any]:
        kind = ("chat.completion" + ".chunk" * streams) if self.chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, i: int, piece: Piece, streams: bool) -> dict[str, Any]:
        end = piece.end if piece.end in ("stop", "length") else None
        if not self.chat:
            said = self._named(i, piece) if piece.marks else None
            return {"index": i, "text": piece.text, "logprobs": said, "finish_reason": end}
        said = {"content": [self._mark(mark) for mark in piece.marks], "refusal": None} if piece.marks else None
        if streams:
            delta = {"content": piece.text} if piece.text else {}
            return {"index": i, "delta": delta, "logprobs": said, "finish_reason": end}
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": i, "message": message, "logprobs": said, "finish_reason": end}

    def _token(self, i: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.decode_bytes([i])
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    def _mark(self, mark: Mark) -> dict[str, Any]:
        return {**self._token(mark.id, mark.logprob), "top_logprobs": [self._token(i, p) for i, p in mark.top]}

    def _named(self, i: int, piece: Piece) -> dict[str, Any]:
        """What a completion says of its tokens."""
        tokens = [self._token(mark.id, mark.logprob) for mark in piece.marks]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.get(i, 0))
            self._offsets[i] = offsets[-1] + len(token["token"])
        tops = [{self._token(j, p)["token"]: p for j, p in mark.top} for mark in piece.marks]
        return {
            "tokens": [token["token"] for token in tokens], "token_logprobs": [mark.logprob for mark in piece.marks],
            "top_logprobs": tops, "text_offset": offsets,
        }  # fmt: skip


def usage(requests: Sequence[Request], n: int) -> dict[str, Any]:
    """Tokens read and made, each prompt counted once; and `cache_entries`, which the model held of all choices at
    their ends, averaged over layers and key/value heads."""
    prompt = sum(len(request.prompt) for request in requests[::n])
    made = sum(len(request.ids) for request in requests)
    return {
        "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(request.known for request in requests[::n])},
        "cache_entries": round(sum(request.entries for request in requests), 2),
    }  # fmt: skip


def model(name: str, created: int, length: int) -> dict[str, Any]:
    """What a model is called, and how many tokens a prompt and its continuation may have."""
    return {"id": name, "object": "model", "created": created, "owned_by": "atom_jax", "max_model_len": length}
