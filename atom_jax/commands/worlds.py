"""Commands about world models: imagine, plan."""

from __future__ import annotations

import pathlib

from absl import flags

from atom_jax.commands.flags import Flags, check_writable
from atom_jax.fields import read_json
from atom_jax.typing import AtomError

# Futures, and steps of one.
MOST = 1024


def imagine(argv: list[str]) -> None:
    """Draws imagined futures. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags("imagine --checkpoint=PATH --actions=1,1,0", "Draws what actions would lead to, as a model has it.")
    known.add(flags.DEFINE_string, "checkpoint", None, "a model of the world")
    known.add(flags.DEFINE_string, "env", "watch", "the world: NAME or NAME:FIELD=VALUE,...")
    known.add(flags.DEFINE_list, "actions", [], "what is done, by number; the first future")
    known.add(flags.DEFINE_integer, "futures", 4, "futures in all; the others do something else, by chance")
    known.add(flags.DEFINE_integer, "length", 0, "frames that are watched before; 0: as many as usual, 40 of watch")
    known.add(flags.DEFINE_integer, "seed", 0, "of the episode and the other futures")
    known.add(flags.DEFINE_bool, "draw", False, "draw frames as the model has them, not the likeliest")
    known.add(flags.DEFINE_string, "out", None, "a PNG (a strip) or a GIF")
    values, _ = known.parse(argv, 0, "checkpoint")
    try:
        actions = [int(a) for a in values.actions]
    except ValueError:
        raise AtomError(f"--actions={','.join(values.actions)}: expected numbers of actions, as 1,1,0") from None
    if not 0 < len(actions) <= MOST:
        raise AtomError(f"--actions: expected 1 to {MOST} of them, as 1,1,0, got {len(actions)}")
    if not 1 <= values.futures <= MOST:
        raise AtomError(f"--futures={values.futures}: expected 1 to {MOST}")

    import atom_jax
    from atom_jax import picture
    from atom_jax.evaluation.reports import future_picture, worlds

    picture.check(values.out, moves=True)
    how = {"futures": values.futures, "length": values.length, "seed": values.seed, "draw": values.draw}
    found = worlds.imagined(atom_jax.load(values.checkpoint), values.env, actions, **how)
    if values.out is not None:
        future_picture.draw(found.said, values.out)
    print(found.text)


def plan(argv: list[str]) -> None:
    """Plans in a world. argv: the command and its arguments. Raises AtomError for bad input."""
    known = Flags("plan --checkpoint=PATH --env=watch", "Watches episodes, plans by imagining, acts, and counts.")
    known.add(flags.DEFINE_string, "checkpoint", None, "a model of the world")
    known.add(flags.DEFINE_string, "env", "watch", "the world: NAME or NAME:FIELD=VALUE,...")
    known.add(
        flags.DEFINE_string, "planner", "shooting:n=48,horizon=6", "random, shooting, cem, tree or mpc, with fields"
    )
    known.add(
        flags.DEFINE_string, "memory", None, "a cache policy for units, as streaming_llm:budget=6; else all are kept"
    )
    known.add(flags.DEFINE_integer, "episodes", 200, "how many, all planned at once")
    known.add(flags.DEFINE_integer, "length", 0, "frames that are watched before; 0: as many as usual, 40 of watch")
    known.add(flags.DEFINE_integer, "seed", 0, "of the episodes and the planner")
    known.add(flags.DEFINE_string, "out", None, "JSON file for the results")
    values, _ = known.parse(argv, 0, "checkpoint")
    check_writable("--out", values.out, parents=True, read=read_json)

    import atom_jax
    from atom_jax.evaluation import cache
    from atom_jax.evaluation.tasks.plan import PlanSettings, planned, text
    from atom_jax.inference import planners

    settings = PlanSettings(values.env, values.planner, values.episodes, values.length, values.seed)
    planners.parse(settings.planner)
    report = planned(atom_jax.load(values.checkpoint, memory=values.memory), settings)
    if values.out is not None:
        cache.write_json(pathlib.Path(values.out), report)
    print(text(report))
