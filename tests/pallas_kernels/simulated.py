"""The TPU's semantics on any machine: uninitialised memory is NaN, bounds are checked, races are reported."""

import jax
from jax.experimental.pallas import tpu as pltpu


def run(capfd, function, *args):
    """What `function` (with implementation="tpu") returns; fails when copies and computations race."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        out = jax.block_until_ready(jax.jit(function)(*args))
    assert "RACE DETECTED" not in capfd.readouterr().out
    return out
