"""World models that read frames as codes of a tokenizer of images."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.data import envs
from atom_jax.evaluation.tasks import frames as frames_task
from atom_jax.inference import image_tokens as offered
from atom_jax.models import image_tokens, world
from atom_jax.models.hnet.ports import Codes, codes
from atom_jax.models.image_tokens import Continuous
from atom_jax.training import loop, start
from atom_jax.training.objectives import Foresee
from atom_jax.typing import LM, AtomError
from configs import world as configs
from tests.models.tiny_images import lively

SOURCE = "video:size=12,most=1,glyphs=1"
EXAMPLE = world.FAMILY.examples()["codes"]
OWN = dataclasses.replace(EXAMPLE.port.tokenizer, size=12, patch=4, registers=4)
CFG = dataclasses.replace(EXAMPLE, port=dataclasses.replace(EXAMPLE.port, tokenizer=OWN, actions=1))
SHORT = ["train.steps=2", "train.eval_every=2", "train.eval_batches=1"]


def experiment():
    """A tokenizer, and a world that reads its codes."""
    exp = configs.codes()
    data = dataclasses.replace(exp.data, sources=(f"env:{SOURCE}",), seq_len=8, batch_size=4)
    source = f"image:sprites:{SOURCE.removeprefix('video:').replace(',', ':')}"
    seen = dataclasses.replace(exp.first.first.data, sources=(source,), seq_len=OWN.max_length, batch_size=8)
    first = dataclasses.replace(exp.first.first, model=OWN, data=seen)
    exp = dataclasses.replace(exp, model=CFG, data=data, first=first)
    return config.override(exp, [*SHORT, *(f"first.{s}" for s in SHORT)])


def parameters():
    p = params.init(jax.random.key(0), world.spec(CFG))
    return p | {"tokenizer": lively(p["tokenizer"])}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_device):
    """Where such a run lies."""
    path = tmp_path_factory.mktemp("codes") / "run"
    loop.fit(experiment(), path)
    return path


def test_a_frame_is_read_as_the_tokenizer_offers_it():
    p = parameters()
    images = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 1), np.uint8)
    own = LM(OWN, p["tokenizer"], None)
    found = offered.offers(own, images)
    bound = float(np.median(found.errors))
    cfg = dataclasses.replace(CFG, port=dataclasses.replace(CFG.port, error=bound))
    wanted = found.codes[offered.within(found, bound), np.arange(6)]
    obs = jnp.asarray(images / np.float32(255)).reshape(2, 3, 12, 12, 1)
    read = codes.encode(p, obs, cfg)
    assert read.shape == (2, 3, 4) and len(np.unique((wanted >= 0).sum(1))) > 1 and len(np.unique(wanted[:, 0])) > 1
    np.testing.assert_array_equal(np.where(read < cfg.port.absent, read, -1).reshape(6, 4), wanted)
    shown = codes.decode(p, read, cfg).reshape(images.shape)
    np.testing.assert_allclose(shown, offered.decoded(own, wanted), atol=1e-5)


def test_tokens_that_are_not_there_are_foretold_and_add_nothing():
    p = parameters()
    absent, r = CFG.port.absent, OWN.registers
    none = jnp.full((1, 2, r), absent)
    even = jnp.zeros((1, 2, r, absent + 1))
    np.testing.assert_allclose(codes.nll(even, none, CFG), r * math.log(absent + 1), rtol=1e-6)
    assert (codes.sample(even.at[..., -1].set(1), None, CFG) == none).all()
    drawn = codes.sample(jnp.zeros((1, 200, r, absent + 1)), jax.random.key(0), CFG)
    assert drawn.dtype == jnp.int32 and set(np.unique(drawn)) == set(range(absent + 1))
    frame = envs.episodes(envs.parse(SOURCE), jax.random.key(0), 1, 2)[0]
    other = p | {"codes": p["codes"] + 1}
    local = jax.jit(lambda p, obs: world.local(p, frame.replace(obs=obs), cfg=CFG))
    for obs, same in ((none, True), (none.at[:, 1, 2].set(3), False)):
        assert np.array_equal(local(p, obs), local(other, obs)) == same


def test_a_run_reads_through_the_tokenizer_that_it_began_with(trained):
    before, lm = atom_jax.load(trained / "first"), atom_jax.load(trained)
    assert lm.config == CFG and before.config == OWN and lm.tokenizer is None
    jax.tree.map(np.testing.assert_array_equal, lm.params["tokenizer"], before.params)
    drawn = params.init(jax.random.key(experiment().seed), world.spec(CFG))
    np.testing.assert_allclose(lm.params["codes"], drawn["codes"], atol=1e-6)  # frozen, and not from there
    assert not np.array_equal(lm.params["head"]["gate"], drawn["head"]["gate"])
    found = frames_task.Foretold().run(
        lm, frames_task.FrameSettings(f"{SOURCE}", episodes=2, length=5, horizon=3), None, None
    )
    assert 0 < found.metrics["nats"].value < OWN.registers * 2 * math.log(CFG.port.absent + 1)
    episode = envs.episodes(envs.parse(SOURCE), jax.random.key(1), 2, 6)[0]
    state = atom_jax.observe(lm, episode)
    assert state.obs.shape == (2, OWN.registers)
    plan = atom_jax.plan(lm, state, "shooting:n=2,horizon=3")
    seen = atom_jax.imagine(lm, state, plan.actions[:, None]).frames
    assert seen.shape == (2, 1, 3, 12, 12, 1) and seen.min() >= 0 and seen.max() <= 1


def test_of_frames_only_those_that_are_compared_are_decoded():
    shapes = (
        params.abstract(world.spec(CFG)),
        jax.eval_shape(lambda: envs.episodes(envs.parse(SOURCE), jax.random.key(0), 2, 9)[0]),
    )
    found = jax.eval_shape(functools.partial(frames_task._read, cfg=CFG, watched=6), *shapes)
    assert found["ahead"].shape == (2, 3, *CFG.port.grid)


def test_another_tokenizer_is_refused_before_one_is_trained(tmp_path):
    exp = config.override(experiment(), ["first.model.d_ff=16"])
    with pytest.raises(AtomError, match=r"the model's tokenizer is another one \(d_ff: 16 -> 8\)"):
        loop.fit(exp, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_does_not_go_together_is_said_in_a_sentence(trained):
    exp = dataclasses.replace(experiment(), first=None)
    with pytest.raises(AtomError, match="the model's tokenizer is trained before it: init_from should be"):
        exp.objective.check(exp)
    exp = dataclasses.replace(exp, init_from=str(trained / "first"))
    exp.objective.check(exp)
    with pytest.raises(AtomError, match=r"tokenizer/.* must not learn"):
        Foresee().check(dataclasses.replace(exp, optim=dataclasses.replace(exp.optim, groups=())))
    with pytest.raises(AtomError, match=r"the model's tokenizer is another one \(d_ff: 8 -> 16\)"):
        start.parameters(config.override(exp, ["model.port.tokenizer.d_ff=16"]), None)
    with pytest.raises(AtomError, match="tokenizer: Continuous makes no codes"):
        Codes(dataclasses.replace(OWN, quantiser=Continuous()))


@pytest.mark.parametrize("length", [c.length for c in image_tokens.FAMILY.examples().values()], ids=repr)
def test_all_ways_to_vary_tokens_are_counted(length):
    cfg = dataclasses.replace(OWN, mask="full", length=length)
    encoder, decoder = length.tries(cfg)
    assert 1 <= encoder <= decoder == len(length.labels(cfg))
    port = dataclasses.replace(CFG.port, tokenizer=cfg)
    without = 2.0 * CFG.d_model[0] * (OWN.registers * (port.absent + 1) + 2 * port.hidden)
    found = codes.operations(dataclasses.replace(CFG, port=port))
    assert found == pytest.approx(without + image_tokens.operations(cfg, (encoder, decoder)))
