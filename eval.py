"""Evaluates a checkpoint.

    python eval.py --checkpoint=PATH --tasks=bpb,lambada [--set lambada.limit=1000 ...] [--out=FILE.json]

PATH is anything `atom_jax.load` takes: a training directory, a Hugging Face directory, an Orbax directory, a .gguf
file. Settings are the fields of atom_jax.evaluation.tasks.EvalConfig. Most tasks need `make evaldata` once; bpb on
the built-in text needs nothing. With --out the results go to a JSON file, and an interrupted evaluation goes on where
it was when the same command is given again.

The task kv compares cache policies: python eval.py --checkpoint=PATH --tasks=kv --out=FILE.json --set
kv.policies=tova,snapkv:window=64 kv.budgets=512,256 kv.parts=loss,needle; FILE.png: added loss over entries held.

On two CPU cores SmolLM2-135M reads about 300 tokens a second: 1,000 documents of LAMBADA take 5 minutes.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags, logging

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "what to evaluate")
_ADAPTER = flags.DEFINE_string("adapter", None, "learned evictors for it: a shipped name or a directory")
_TASKS = flags.DEFINE_list("tasks", [], "names of tasks; a wrong name prints the list")
_SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE or TASK.FIELD=VALUE")
_CONFIG = flags.DEFINE_string("config", None, "with --compile_only, instead of a checkpoint: FILE.py:variant")
_COMPILE_ONLY = flags.DEFINE_bool("compile_only", False, "compile, say what scoring texts needs per chip, stop")
_TOPOLOGY = flags.DEFINE_string("topology", None, "with --compile_only: chips nobody has to have, such as v5e:2x2")
_OUT = flags.DEFINE_string("out", None, "JSON file for the results")


def run(settings: list[str]) -> int:
    """Evaluates as the flags say and prints a table; returns the exit status. Raises AtomError for bad input."""
    import atom_jax
    from atom_jax import config
    from atom_jax.evaluation import run as evaluation
    from atom_jax.evaluation.tasks import EvalConfig

    if _COMPILE_ONLY.value:
        from atom_jax.aot.generation import described
        from atom_jax.aot.scoring import scoring

        lm = described(_CHECKPOINT.value, _CONFIG.value, _ADAPTER.value)
        cfg = evaluation.resolve(config.override(EvalConfig(), settings), _CHECKPOINT.value or "")
        report = scoring(lm, cfg, _TOPOLOGY.value)
        print(report)
        return 0 if report.fits else 1
    if not _CHECKPOINT.value:
        raise atom_jax.AtomError("--checkpoint is missing: give the path of a model")
    evaluation.check_tasks(_TASKS.value)
    cfg = evaluation.resolve(config.override(EvalConfig(), settings), _CHECKPOINT.value)
    out = pathlib.Path(_OUT.value) if _OUT.value else None
    lm = atom_jax.load(_CHECKPOINT.value, adapter=_ADAPTER.value)
    results = evaluation.evaluate(lm, _TASKS.value, cfg, out)
    print(evaluation.table(results))
    return 0


def main(arguments: list[str]) -> int:
    """Returns the exit status; settings may follow one --set without repeating it."""
    from atom_jax import terminal

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax reports every file that it reads.
    return terminal.run("eval.py", lambda: run([*_SET.value, *arguments[1:]]))


if __name__ == "__main__":
    from atom_jax import terminal

    # Also for what is said about flags before `main`.
    sys.exit(terminal.run("eval.py", lambda: app.run(main)))
