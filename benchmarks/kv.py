"""Cache policies next to kvpress's, what they forget, and what decoding gains: three tables in one run.

    make smollm2 heldout install-kvpress
    python -m benchmarks.kv [--parts=parity,recall,speed] [--windows=2] [--budgets=512,256] [--out=FILE.json]

parity  The same weights in float32 and the same windows: a context is read and compressed, and the mean nats of the
        tokens after it are measured with what is left, by us and by kvpress in an environment of its own. They are
        to agree; a "*" marks those that don't, and the exit code is then 1. Policies that kvpress lacks, and learned
        evictors, stand in the same table. Without kvpress there is only our side.
recall  Facts that are planted in as many contexts of the held-out novel, 24 in each, and asked for afterwards
        (`eval.py --tasks=kv`, kv.parts=facts): the share of answers of which every token is the likeliest.
speed   Steps of decoding after a long context: the dense cache, learned evictors and a budget policy, in turns.
        "faster" is the dense time over the method's, "by bytes" what to expect where reading the weights and the
        held entries takes all the time. The budget policy is also measured after fewer tokens.
"""

from __future__ import annotations

import pathlib

from absl import flags

from atom_jax.evaluation.tasks.kv import KvSettings
from benchmarks import command, kv_parity
from benchmarks.kv_speed import Speed
from benchmarks.kv_tables import PARTS, Plan, measure

_TEXTS = ("austen", "corpora/heldout/bible.txt", "corpora/heldout/debian-reference.txt")
_SPEED = Speed()

CHECKPOINT = flags.DEFINE_string("checkpoint", "models/smollm2-135m-instruct", "Hugging Face directory.")
ADAPTERS = flags.DEFINE_list("adapters", ["smollm2-135m-dms-4x", "smollm2-135m-dms-8x"], "Learned evictors.")
PART = flags.DEFINE_list("parts", list(PARTS), "What to measure.")
KVPRESS = flags.DEFINE_string("kvpress", ".venv-kvpress/bin/python", "Python of the environment with kvpress.")
POLICIES = flags.DEFINE_list("policies", list(kv_parity.default_policies()), "Policies by name.")
BUDGETS = flags.DEFINE_list("budgets", ["512", "256"], "Entries per head.")
SOURCES = flags.DEFINE_list("sources", list(_TEXTS), "Texts; of austen what is held out.")
WINDOWS = flags.DEFINE_integer("windows", 2, "Windows per text.", lower_bound=1)
CONTEXT = flags.DEFINE_integer("context", 2048, "Tokens before those that are scored.", lower_bound=1)
SCORED = flags.DEFINE_integer("scored", 256, "Tokens that are scored.", lower_bound=1)
SPEED_CONTEXT = flags.DEFINE_integer("speed_context", _SPEED.context, "Tokens seen when speed is measured.")
SEEN = flags.DEFINE_list("seen", list(map(str, _SPEED.seen)), "Fewer tokens, for the budget policy.")
ROWS = flags.DEFINE_list("rows", list(map(str, _SPEED.rows)), "Batch sizes; 1 comes first.")
REPEATS = flags.DEFINE_integer("repeats", _SPEED.repeats, "Measurements of a step's time.", lower_bound=1)
NEW = flags.DEFINE_integer("new_tokens", _SPEED.new, "Tokens per measurement.", lower_bound=1)
BUDGET = flags.DEFINE_string(
    "speed_policy", "", "Budget policy for speed; empty: tova with an eighth of the context."
)
OUT = flags.DEFINE_string("out", None, "Also write all numbers to this JSON file.")


def _plan() -> Plan:
    settings = KvSettings(
        policies=tuple(POLICIES.value), budgets=command.numbers("budgets", BUDGETS.value),
        sources=tuple(SOURCES.value), context=CONTEXT.value, scored=SCORED.value, windows=WINDOWS.value,
        fact_texts=WINDOWS.value,
    )  # fmt: skip
    seen = command.numbers("seen", SEEN.value) if SEEN.value else ()
    speed = Speed(SPEED_CONTEXT.value, command.numbers("rows", ROWS.value), seen, REPEATS.value, NEW.value)
    return Plan(
        CHECKPOINT.value, tuple(ADAPTERS.value), tuple(PART.value), KVPRESS.value, settings, speed, BUDGET.value
    )


def main() -> int:
    """Exit code 1 where the two sides differ."""
    return 0 if measure(_plan(), pathlib.Path(OUT.value) if OUT.value else None) else 1


if __name__ == "__main__":
    command.run("kv", main)
