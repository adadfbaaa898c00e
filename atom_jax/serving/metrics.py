"""What an engine does, in the text format that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator

from atom_jax.inference.engine import Engine
from atom_jax.inference.request import ENDS


def text(engine: Engine) -> str:
    """All metrics now."""
    return "\n".join(_lines(engine)) + "\n"


def _lines(engine: Engine) -> Iterator[str]:
    tally = engine.tally
    yield from _about("requests_total", "counter", "Requests that have ended, by why.")
    for end in ENDS:
        yield f'atom_jax_requests_total{{end="{end}"}} {tally.ended[end]}'
    counters = (
        ("prompt_tokens_total", tally.prompt_tokens, "Tokens of prompts."),
        ("prompt_tokens_known_total", tally.known, "Of these, tokens known from earlier prompts, not read again."),
        ("new_tokens_total", tally.new_tokens, "Tokens of texts that have ended."),
        ("row_steps_total", tally.row_steps, "Steps of rows of the batch."),
        ("row_steps_idle_total", tally.idle, "Of these, steps of rows without a text."),
    )
    gauges = (
        ("requests_running", tally.running, "Texts that are being made."),
        ("requests_reading", tally.reading, "Requests whose prompts are being read."),
        ("requests_waiting", tally.waiting, "Requests that wait."),
        ("rows", tally.rows, "Rows of the batch."),
        ("cache_bytes", tally.nbytes, "Bytes of the buffers of all memory."),
        ("cache_entries", tally.entries, "Entries that running texts hold, averaged over layers and heads."),
        ("cache_bytes_limit", engine.cache_memory or 0, "Bytes that the memory of the batch may take; 0: any."),
    )
    for kind, table in (("counter", counters), ("gauge", gauges)):
        for name, value, what in table:
            yield from _about(name, kind, what)
            yield f"atom_jax_{name} {value}"
    yield from _about("first_token_seconds", "summary", "Seconds from a request to its first token.")
    yield f"atom_jax_first_token_seconds_sum {tally.first_seconds}"
    yield f"atom_jax_first_token_seconds_count {tally.started}"


def _about(name: str, kind: str, what: str) -> tuple[str, str]:
    return f"# HELP atom_jax_{name} {what}", f"# TYPE atom_jax_{name} {kind}"
