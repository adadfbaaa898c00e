"""The table of tasks. A new one is a new entry (and, if its data are new, an entry of `evaldata.FILES`).

Its name becomes a field of EvalConfig with the task's settings, so that --set NAME.FIELD=VALUE works.
"""

from __future__ import annotations

import dataclasses

from atom_jax import config
from atom_jax.data.fetch import evaldata
from atom_jax.evaluation.tasks.bpb import TextBpb
from atom_jax.evaluation.tasks.characters import Characters
from atom_jax.evaluation.tasks.choice import Choice
from atom_jax.evaluation.tasks.frames import Foretold
from atom_jax.evaluation.tasks.gold import Gold
from atom_jax.evaluation.tasks.hyper import Hyper
from atom_jax.evaluation.tasks.images import ImageTokens
from atom_jax.evaluation.tasks.kv import Kv
from atom_jax.evaluation.tasks.lasting import Lasting
from atom_jax.evaluation.tasks.plan import Planning
from atom_jax.evaluation.tasks.reduction import Reducing
from atom_jax.evaluation.tasks.task import Runner, Task
from atom_jax.sharding import MeshConfig


def _choice(name: str) -> Choice:
    """A multiple-choice task in all the formats of its set."""
    return Choice(name, tuple(f.partition("/")[2] for f in evaldata.FILES if f.startswith(f"{name}/")))


TASKS: dict[str, Task | Runner] = {
    "bpb": TextBpb(),
    "lambada": Gold("lambada/bpb_0shot", last_word=True),
    "hellaswag": _choice("hellaswag"),
    "piqa": _choice("piqa"),
    "winogrande": _choice("winogrande"),
    "arc_easy": _choice("arc_easy"),
    "arc_challenge": _choice("arc_challenge"),
    "boolq": _choice("boolq"),
    "basic_skills_arithmetic": _choice("basic_skills_arithmetic"),
    "basic_skills_coding": _choice("basic_skills_coding"),
    "basic_skills_common_knowledge": _choice("basic_skills_common_knowledge"),
    "basic_skills_logical_reasoning": _choice("basic_skills_logical_reasoning"),
    "basic_skills_pattern": _choice("basic_skills_pattern"),
    "basic_skills_string_operations": _choice("basic_skills_string_operations"),
    "characters": Characters(),
    "copycolors": _choice("copycolors"),
    "gsm8k": Gold("gsm8k/gold_bpb_5shot"),
    "minerva_math_500": Gold("minerva_math_500/gold_bpb_0shot"),
    "codex_humaneval": Gold("codex_humaneval/gold_bpb_0shot"),
    "codex_mbpp": Gold("codex_mbpp/gold_bpb_3shot"),
    "squad": Gold("squad/bpb_5shot"),
    "coqa": Gold("coqa/bpb_0shot"),
    "jeopardy": Gold("jeopardy/bpb_5shot"),
    "kv": Kv(),
    "hyper": Hyper(),
    "lasting": Lasting(),
    "images": ImageTokens(),
    "reduction": Reducing(),
    "plan": Planning(),
    "frames": Foretold(),
}


@dataclasses.dataclass(frozen=True)
class _Common:
    """What all tasks share.

    batch_tokens: tokens of one batch.
    max_length: tokens that the model sees at once (0: the row length it was trained with, where the checkpoint is a
        training directory, else what the model was made for, but no more than 2048).
    front: "yes" puts the front before every context, "no" only before texts that are scored from their
        first token on, "auto" follows the tokenizer's own.
    mesh: how the devices are used when there are several.
    """

    batch_tokens: int = 8192
    max_length: int = 0
    front: str = "auto"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self):
        config.check(self, batch_tokens=(1, 2**22), max_length=(0, 2**31 - 1))


EvalConfig = dataclasses.make_dataclass(
    "EvalConfig",
    [(name, type(task.settings), task.settings) for name, task in TASKS.items()],
    bases=(_Common,),
    frozen=True,
)
