"""Every variant of configs/world.py describes a model, its world and stages that follow each other."""

import pathlib

import jax
import pytest

from atom_jax import config, params
from atom_jax.models import registry
from atom_jax.sharding import make_mesh
from atom_jax.training import optim
from atom_jax.training.objectives import Setting
from configs import world


@pytest.mark.parametrize("name", world.VARIANTS)
def test_variant_is_complete(name):
    if name == "minigrid":
        pytest.importorskip("xminigrid", reason="needs xminigrid: pip install 'atom-jax[envs]'")
    exp = config.load_file(f"configs/world.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp
    stages = exp.stages(pathlib.Path("run"))
    assert len(stages) == {"tiny": 2, "minigrid": 2, "video": 2, "codes": 3, "large": 1}.get(
        name, len(world.LOCAL) + len(world.CURRICULUM)
    )
    parts = registry.kind(exp.model).parts(exp.model).values()
    for stage, _ in stages:
        assert stage.model == exp.model or stage.model in parts
        spec = registry.kind(stage.model).spec(stage.model)
        stage.objective.check(stage)
        optim.make(stage.optim, spec, stage.train.steps)
        # All the ways to lose are traced.
        setting = Setting(stage, make_mesh(), None)
        batch = stage.objective.batch(stage.objective.described(setting))
        sums = jax.eval_shape(
            lambda p, b, s=setting: s.exp.objective.judge(p, b, setting=s), params.abstract(spec), batch
        )
        assert sums.bytes is None and ("tokens" if stage.model in parts else "local") in sums.learned


def test_frozen_parts_are_those_of_the_encoder():
    cfg = world.watch().model
    made = optim.make(world.watch().optim, registry.of(cfg).spec(cfg), 10)
    frozen = {path.split("/")[0] for path, factor in made.factors.items() if not factor}
    assert frozen == {"cells", "action", "inlet", "local", "stage0"}
    learns = {"/".join(path.split("/")[:2]) for path, factor in made.factors.items() if factor}
    assert learns == {"head/frame", "head/gate", "head/outcome", "head/secret", "head/up", "stage0/decoder",
                      "stage1/main"}  # fmt: skip
