"""The OpenAI HTTP interface as data: what the JSON of a request asks for."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from typing import Any

from atom_jax.fields import meant
from atom_jax.session.decode import NAMED
from atom_jax.typing import AtomError

# Choices of one request.
CHOICES = 128
# Strings that end a text, and characters of each: they are looked for after every token.
STOPS, STOP_LENGTH = 64, 1024
# What a completion is given where it doesn't say; the default of the published interface.
COMPLETION_TOKENS = 16
# Fields that say nothing about the text.
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
# Fields that change nothing at these values, or at null; others are not served.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "echo": (False,),
    "suffix": ("",), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}  # fmt: skip


class Refusal(Exception):
    """What is refused, with an HTTP status; param and code as the published errors have them. The message is at most
    as long as an AtomError's."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(str(AtomError(message)))
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the error."""
        kinds = {429: "rate_limit_error", 404: "not_found_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a request asks for.

    prompts: texts or lists of ids; or, of a chat, one list of messages. n: choices for each. most: tokens of a
    choice, None: as many as there is room for. options: further ones of `Engine.submit`. usage: whether a stream ends
    with it.
    """

    chat: bool
    prompts: list[Any]
    n: int
    most: int | None
    seed: int
    stream: bool
    usage: bool
    options: dict[str, Any]

    @property
    def about(self) -> str:
        """The field that the prompts come from."""
        return "messages" if self.chat else "prompt"


def parse(body: bytes) -> dict[str, Any]:
    """The object that a body is; Refusal for what is none."""
    try:
        data = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise Refusal(400, f"the body is no JSON: {e}"[:200]) from None
    if not isinstance(data, dict):
        raise Refusal(400, "the body is no JSON object")
    return data


def read(data: dict[str, Any], chat: bool, model: str) -> Asked:
    """What a chat or a completion asks of the model with this name.

    Raises Refusal, which names the field, for one that is unknown, has another type, is out of its range or not
    served.
    """
    given = _Given({name: value for name, value in data.items() if value is not None})
    wanted = given.take("model", str, model)
    if wanted != model:
        raise Refusal(404, f"the model {wanted!r:.100} does not exist; this server has {model!r}", "model",
                      "model_not_found")  # fmt: skip
    prompts = [_messages(given.take("messages", list))] if chat else _prompts(given.take("prompt", (str, list)))
    n = given.whole("n", 1, 1, CHOICES)
    if len(prompts) * n > CHOICES:
        raise Refusal(400, f"{len(prompts)} prompts with {n} choices each: at most {CHOICES} in all", "n")
    most = given.whole("max_tokens", None if chat else COMPLETION_TOKENS, 1)
    most = given.whole("max_completion_tokens", most, 1) if chat else most
    stream = given.take("stream", bool, False)
    usage = _usage(given.take("stream_options", dict, None), stream)
    if chat:
        told = given.take("logprobs", bool, False)
        top = given.whole("top_logprobs", 0, 0, NAMED)
        logprobs = top if told else None
        if top and not told:
            raise Refusal(400, "top_logprobs: expected logprobs to be true as well", "top_logprobs")
    else:
        logprobs = given.whole("logprobs", None, 0, NAMED)
    stop = given.take("stop", (str, list), [])
    stop = [stop] if isinstance(stop, str) else stop
    if any(not isinstance(text, str) or not text for text in stop):
        raise Refusal(400, "stop: expected a string that is not empty, or a list of such", "stop")
    if len(stop) > STOPS or any(len(text) > STOP_LENGTH for text in stop):
        raise Refusal(400, f"stop: at most {STOPS} strings of {STOP_LENGTH} characters", "stop")
    if any("\ud800" <= c <= "\udfff" for text in stop for c in text):
        raise Refusal(400, "stop: a lone surrogate, which UTF-8 cannot hold", "stop")
    ends = given.take("stop_token_ids", list, None)
    if ends is not None and any(type(i) is not int for i in ends):
        raise Refusal(400, "stop_token_ids: expected a list of token ids", "stop_token_ids")
    options = {
        "temperature": given.number("temperature", 1.0, 0), "top_p": given.number("top_p", 1.0, 0, 1),
        "top_k": given.whole("top_k", 0, 0, 2**31 - 1), "min_p": given.number("min_p", 0.0, 0, 1),
        "stop": stop, "logprobs": logprobs, "stop_ids": ends,
    }  # fmt: skip
    seed = given.whole("seed", secrets.randbits(31), -(2**63), 2**63 - 1)
    given.done()
    return Asked(chat, prompts, n, most, seed, stream, usage, options)


class _Given:
    """The fields of a request that have not been read yet; null counts as absent."""

    def __init__(self, fields: dict[str, Any]):
        self._fields, self._known = fields, [*NEUTRAL]

    def take(self, name: str, kind: Any, *default: Any) -> Any:
        self._known.append(name)
        if name not in self._fields:
            if default:
                return default[0]
            raise Refusal(400, f"{name} is missing", name, "missing_required_parameter")
        value = self._fields.pop(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            names = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a whole number",
                     float: "a number"}  # fmt: skip
            kinds = kind if isinstance(kind, tuple) else (kind,)
            expected = " or ".join(names[k] for k in kinds if k in names and (k is not int or float not in kinds))
            raise Refusal(400, f"{name}: expected {expected}, got {json.dumps(value)[:80]}", name, "invalid_type")
        return value

    def whole(self, name: str, default: int | None, low: int, high: int = 2**31 - 1) -> int | None:
        return self._within(name, self.take(name, int, default), low, high)

    def number(self, name: str, default: float, low: float, high: float = math.inf) -> float:
        return self._within(name, self.take(name, (int, float), default), low, high)

    def _within(self, name: str, value: Any, low: float, high: float) -> Any:
        if value is not None and not low <= value <= high:
            upper = f" and at most {high}" if high not in (math.inf, 2**31 - 1) else ""
            raise Refusal(400, f"{name} is {value}; expected at least {low}{upper}", name, "invalid_value")
        return value

    def done(self) -> None:
        for name, value in self._fields.items():
            if name in IGNORED:
                continue
            if name not in NEUTRAL:
                hint = meant(name[:80], self._known)
                raise Refusal(400, f"unknown field {name!r:.80}{hint}", name[:80], "unknown_parameter")
            if value not in NEUTRAL[name]:
                raise Refusal(400, f"{name}: this server does not do that", name, "unsupported_parameter")


def _usage(given: dict[str, Any] | None, stream: bool) -> bool:
    """Whether a stream ends with its usage."""
    if given is None:
        return False
    if not stream:
        raise Refusal(400, "stream_options: expected stream to be true as well", "stream_options")
    for name, value in given.items():
        if name not in ("include_usage", "include_obfuscation"):
            raise Refusal(
                400, f"unknown field {f'stream_options.{name}'!r:.80}", "stream_options", "unknown_parameter"
            )
        if type(value) not in (bool, type(None)):
            raise Refusal(400, f"stream_options.{name}: expected true or false", "stream_options", "invalid_type")
    return given.get("include_usage") is True


def _prompts(given: Any) -> list[Any]:
    """One prompt or several, texts or lists of ids, as a list."""
    several = [given] if isinstance(given, str) or (given and all(type(x) is int for x in given)) else given
    if not several:
        raise Refusal(400, "prompt: there is none", "prompt")
    for one in several:
        if not isinstance(one, str) and not (isinstance(one, list) and all(type(x) is int for x in one)):
            raise Refusal(400, "prompt: expected a text, token ids, or a list of texts or of lists of ids", "prompt",
                          "invalid_type")  # fmt: skip
    return several


def _messages(given: list[Any]) -> list[Any]:
    """Messages whose contents are texts, where parts are all text; what is wrong with others the template says."""
    return [_message(one) if isinstance(one, dict) else one for one in given]


def _message(given: dict[str, Any]) -> dict[str, Any]:
    content = given.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if any(not isinstance(part, str) for part in parts):
            raise Refusal(400, "messages: only contents of type text are served", "messages", "unsupported_content")
        content = "".join(parts)
    role = "system" if given.get("role") == "developer" else given.get("role")
    return {**given, "role": role, "content": content}


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
