"""Every field of every configuration knows its type and its range: found from the registries, not from a list."""

import dataclasses
import math
import typing

import pytest

from atom_jax import config
from atom_jax.data.envs import ENVS
from atom_jax.data.images import PICTURES
from atom_jax.data.puzzles import PUZZLES
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.inference.planners import PLANNERS
from atom_jax.kvcache.policies import POLICIES, parse
from atom_jax.models import registry
from atom_jax.models.hnet.ports import PORTS
from atom_jax.nn.rope import RopeScaling
from atom_jax.reduction import REDUCERS
from atom_jax.training.config import Experiment, Group
from atom_jax.training.objectives import OBJECTIVES, Byteify
from atom_jax.transfer.byteify import Weights
from atom_jax.transfer.hypernet import Projector, Zett
from atom_jax.typing import AtomError
from tests.reliability.rows import policy

# Where a number below zero has a meaning: what is left, no window, a threshold that lets more leave.
NEGATIVE = {
    ("MeshConfig", name) for name in ("data", "fsdp", "tensor", "context")
} | {
    ("HNetConfig", "window"), ("WorldConfig", "window"), ("HiPrune", "object_layer"), ("HiPrune", "deep_layer"),
    ("ReductionSettings", "inflections"),
    *((name, field) for name in ("DMS", "DMC", "Revised") for field in ("scale", "offset")),
}  # fmt: skip


def inside(value):
    """The configurations that one consists of, itself included."""
    if dataclasses.is_dataclass(value):
        yield value
        for field in dataclasses.fields(value):
            yield from inside(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from inside(item)


def everything():
    """One configuration of every type."""
    roots = [EvalConfig(), Experiment(), Group("x"), RopeScaling("yarn"), parse("none;1=tova:budget=4")]
    roots += [cfg for kind in registry.KINDS.values() for cfg in kind.examples().values()]
    roots += [made() for made in (*PUZZLES.values(), *PICTURES.values(), *REDUCERS, *PLANNERS.values())]
    # xminigrid need not be installed.
    roots += [env() for name, env in ENVS.items() if name != "minigrid"]
    roots += [Projector(1, 8), Zett(1, 8, width=16, heads=2)] + [port() for port in PORTS]
    roots += [policy(name) for name in POLICIES] + [objective() for objective in OBJECTIVES.values()]
    return {type(cfg): cfg for root in roots for cfg in inside(root)}


EACH = everything()


def test_all_registered_types_are_looked_at():
    # Other tests register classes of their own.
    ours = {cls for cls in config._CLASSES.values() if cls.__module__.split(".")[0] == "atom_jax"}
    assert ours - {ENVS["minigrid"]} <= set(EACH) and len(EACH) > 40


def kind(hint):
    """int or float for fields of such numbers, also optional ones and tuples of them."""
    args = [a for a in typing.get_args(hint) if a not in (type(None), Ellipsis)]
    return kind(args[0]) if args else hint if hint in (int, float) else None


def wrong(hint, value, cls, name):
    """Values that no field of this type holds."""
    number = kind(hint)
    if number is not None:
        bad = [math.nan, math.inf, -math.inf, 10**40, 1e40, "1", True, [], {}]
        bad += [-1] if (cls.__name__, name) not in NEGATIVE else []
        bad += [0.5] if number is int else []
        # Of a tuple, one of its numbers.
        return [*bad, *[(*value[1:], x) for x in bad]] if isinstance(value, tuple) else bad
    if hint in (bool, str) or dataclasses.is_dataclass(hint):
        return [math.nan, 7, -1, (), b"x", {}, *(["no"] if hint is bool else [])]
    return [math.nan, 7, {}] if isinstance(value, tuple) else []


@pytest.mark.parametrize("cls", sorted(EACH, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_fields_refuse_what_they_cannot_hold(cls):
    for name, hint in config._hints(cls).items():
        for value in wrong(hint, getattr(EACH[cls], name), cls, name):
            with pytest.raises(AtomError) as e:
                one = dataclasses.replace(EACH[cls], **{name: value})
                # A tree of arrays, too, which its owner looks at.
                Byteify(weights=one) if cls is Weights else None
            assert name in str(e.value) and len(str(e.value)) < 300, (name, value, str(e.value))
