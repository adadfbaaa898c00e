"""What evaluation needs on chips that nobody has to have: its programs are compiled as `eval.py` does, and not
executed."""

from __future__ import annotations

import jax

from atom_jax.aot.generation import Loaded, at
from atom_jax.aot.report import Report
from atom_jax.evaluation import loglik, run
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.typing import LM


def scoring(lm: LM, cfg: EvalConfig, topology: str | None) -> Report:
    """What scoring texts needs, at the longest rows.

    lm: its parameters are not looked at. topology: as in `topology.devices`. Errors: as of `Loaded`, and AtomError
    for bad settings.
    """
    chips, length = Loaded(lm, topology, cfg.mesh), run.row_length(lm, cfg)
    rows = loglik.row_count(length, cfg.batch_tokens, chips.mesh.shape["data"] * chips.mesh.shape["fsdp"])
    size = max(rows * length, cfg.batch_tokens)
    batch = chips.rows((chips.ints(rows, length), chips.ints(rows), chips.suffix(rows, length)))
    block = chips.ints(max(1, min(size, loglik.BLOCK // lm.config.vocab_size)))
    with jax.set_mesh(chips.mesh):
        states = loglik.states.lower(chips.params, *batch, cfg=lm.config, size=size)
        places, (x, _) = chips.compile("states", states).places, states.out_info
        x = chips.whole(x) if places is None else at(x, places[0])
        chips.compile("scores", loglik.head.lower(chips.params, x, block, block, cfg=lm.config))
    return chips.done(f"{rows} rows of {length:,} tokens")
