"""The command that answers others over HTTP: serve."""

from __future__ import annotations

import pathlib
import re
import sys

from absl import flags

from atom_jax.commands.flags import Flags
from atom_jax.typing import AtomError


def serve(argv: list[str]) -> None:
    """Serves a model. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags(
        "serve --checkpoint=PATH",
        "Serves a model over the OpenAI HTTP interface, many requests at once; Ctrl-C lets them end, and a second one"
        " ends them. See docs/serving.md.",
    )
    known.add(flags.DEFINE_string, "checkpoint", None, "what to load")
    known.add(flags.DEFINE_string, "adapter", None, "learned evictors for it: a shipped name or a directory")
    known.add(flags.DEFINE_string, "memory", None, "what of the keys and values is kept, such as tova:budget=512")
    known.add(flags.DEFINE_string, "dtype", None, "float32 or bfloat16; by default what the checkpoint names")
    known.add(flags.DEFINE_string, "host", "127.0.0.1", "address to listen at; 0.0.0.0: all of this machine")
    known.add(flags.DEFINE_integer, "port", 8000, "port to listen at; 0: one that is free")
    known.add(flags.DEFINE_string, "name", None, "what clients call the model; by default the checkpoint's last part")
    known.add(flags.DEFINE_integer, "rows", 16, "texts that are made at once")
    known.add(flags.DEFINE_integer, "length", 0, "most tokens of a prompt and its text; 0: the model's positions")
    known.add(flags.DEFINE_string, "cache_memory", None,
              "what the memory of all texts may take, such as 4G; by default --rows alone decide")  # fmt: skip
    known.add(flags.DEFINE_integer, "waiting", 256, "requests that may wait; further ones are refused")
    known.add(flags.DEFINE_string, "max_body", "4M", "largest body of a request")
    known.add(flags.DEFINE_float, "grace", 30.0, "seconds that running requests have to end when the server stops")
    values, _ = known.parse(argv, 0, "checkpoint")

    from atom_jax import config
    from atom_jax.checkpoint import load
    from atom_jax.inference.engine import Engine

    try:
        from atom_jax.serving import http
    except ModuleNotFoundError as e:
        if e.name != "aiohttp":
            raise
        raise AtomError("serve needs aiohttp: pip install 'atom-jax[serve]'") from None

    port = config.in_range("--port", values.port, int, 0, 65535)
    grace = config.in_range("--grace", values.grace, float, 0)
    options = {
        "rows": config.in_range("--rows", values.rows, int, 1),
        "length": config.in_range("--length", values.length, int, 0) or None,
        "waiting": config.in_range("--waiting", values.waiting, int, 1),
        "cache_memory": None if values.cache_memory is None else size_of("--cache_memory", values.cache_memory),
    }
    body = size_of("--max_body", values.max_body)
    http.check_address(values.host, port)
    lm = load(values.checkpoint, adapter=values.adapter, dtype=values.dtype, memory=values.memory)
    if lm.tokenizer is None:
        raise AtomError(
            f"--checkpoint={values.checkpoint}: this model has no tokenizer, without which no text is made"
        )
    name = values.name or pathlib.Path(values.checkpoint).name or values.checkpoint

    def say(address: str) -> None:
        print(f"serving {name} at {address}/v1 (Ctrl-C ends)", file=sys.stderr, flush=True)

    http.serve(Engine(lm, **options), name, values.host, port, body, grace, say)


def size_of(flag: str, text: str) -> int:
    """A number of bytes, such as 500M or 4G (in powers of 1024)."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * 1024 ** ("", "K", "M", "G", "T").index(found[2].upper())) if found else 0
    if not size:
        raise AtomError(f"{flag}={text}: expected a number of bytes, such as 500M or 4G")
    return size
