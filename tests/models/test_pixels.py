"""World models whose frames are pictures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.surprise import Surprise
from atom_jax.data import envs
from atom_jax.models import world
from atom_jax.models.hnet.ports import Pixels, pixels
from atom_jax.models.world import WorldConfig
from atom_jax.training import loop
from atom_jax.training.objectives import Foresee
from atom_jax.training.record import read
from atom_jax.typing import LM, AtomError, Frames
from configs import world as configs

B, T = 2, 7
CFG = WorldConfig(
    port=Pixels((12, 12, 1), patch=4, actions=3, hidden=24), layout=("T1", "T1", "T1"), d_model=(16, 16),
    d_intermediate=(24, 24), n_heads=(2, 2), rotary_dim=(4, 4), window=(1, -1), init_std=0.3, hidden=24,
    chunking=(Chunking(Surprise(), "first", residual="identity", capacity=1.0),), max_length=512,
)  # fmt: skip


def frames(seed=0):
    rng = np.random.default_rng(seed)
    obs = rng.random((B, T, 12, 12, 1)).astype(np.float32)
    obs[:, 2:4] = obs[:, 1:2]
    index, nothing = np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.zeros((B, T), np.float32)
    return Frames(obs, rng.integers(0, 3, (B, T), np.int32), nothing, nothing > 0, index, np.ones_like(index))


@pytest.fixture(scope="module")
def lm():
    p = params.init(jax.random.key(1), world.spec(CFG))
    made = jax.tree.map(jnp.asarray, frames())
    p["local"]["w"] = 3 * p["local"]["w"]
    nats = pixels.nll(world.local(p, made, cfg=CFG)[:, :-1], made.obs[:, 1:], CFG)
    p["stage0"]["rule"]["tau"] = jnp.median(nats)
    return LM(CFG, p, None)


def test_frames_may_be_seen_at_once_or_one_by_one(lm):
    episode = frames()
    whole = atom_jax.observe(lm, episode)
    assert 1 < float(whole.units.mean()) < T - 1
    begin = atom_jax.observe(lm, jax.tree.map(lambda x: x[:, :1], episode))
    found = atom_jax.imagine(lm, begin, episode.action[:, None, :-1], frames=episode.obs[:, None, 1:])
    np.testing.assert_array_equal(found.units[:, 0].sum(1), whole.units)
    out, _ = world.apply(lm.params, jax.tree.map(jnp.asarray, episode), cfg=CFG)
    np.testing.assert_array_equal(found.units[:, 0], out.aux["boundaries"][0][:, :-1])
    # What is imagined next is the same, whichever way it came to be known.
    one, two = (atom_jax.imagine(lm, state, np.ones((B, 1, 2), np.int32)) for state in (
        whole, atom_jax.observe(lm, jax.tree.map(lambda x: x[:, 3:], episode), atom_jax.observe(
            lm, jax.tree.map(lambda x: x[:, :4], episode)))))  # fmt: skip
    np.testing.assert_allclose(one.frames, two.frames, atol=1e-5)
    assert one.frames.dtype == np.float32 and one.frames.shape == (B, 1, 2, 12, 12, 1)


def test_nothing_depends_on_what_comes_later(lm):
    episode = jax.tree.map(jnp.asarray, frames())
    other = episode.replace(
        obs=episode.obs.at[:, 4:].set(1 - episode.obs[:, 4:]), action=episode.action.at[:, 4:].set(0)
    )
    run = jax.jit(lambda batch: world.apply(lm.params, batch, cfg=CFG)[0].aux)
    one, two = run(episode), run(other)
    cut = lambda aux: jax.tree.map(lambda x: x[:, :4], (aux["foresight"].frame, aux["boundaries"][0]))  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, cut(one), cut(two))
    assert (one["foresight"].frame[:, 4:] != two["foresight"].frame[:, 4:]).any()


def test_what_is_drawn_stays_a_picture_near_the_mean():
    mean = jnp.full((1, 1, 12, 12, 1), 0.5)
    drawn = pixels.sample(mean, jax.random.key(0), CFG)
    np.testing.assert_allclose(np.std(drawn), CFG.port.sigma, rtol=0.2)
    assert pixels.right(drawn * 0.5 + 0.25, mean, CFG).all() and not pixels.right(mean + 0.2, mean, CFG).any()
    np.testing.assert_array_equal(pixels.sample(3 * mean - 1, None, CFG), jnp.full_like(mean, 0.5))
    np.testing.assert_allclose(pixels.nll(mean + 0.1, mean, CFG), [[144 / 2]], rtol=1e-5)


def test_a_run_learns_to_foretell_a_video(tmp_path, one_device):
    cfg = dataclasses.replace(CFG, port=dataclasses.replace(CFG.port, actions=1))
    lesson, source = configs.Lesson(0, 0, 12, 0.0, 200, 1e-2), "env:video:size=12,most=1,glyphs=1"
    loop.fit(configs.stage(None, cfg, lesson, Foresee(only_local=True), batch=16, world=source), tmp_path)
    last = [x["local"] for x in read(tmp_path / "metrics.jsonl") if x["kind"] == "validation"][-1]
    seen = envs.episodes(envs.parse("video:size=12,most=1,glyphs=1"), jax.random.key(0), 32, 12)[0].obs
    assert last < 0.75 * pixels.nll(0 * seen + seen.mean((0, 1))[None, None], seen, cfg).mean()
    lm = atom_jax.load(tmp_path)
    episode = frames().replace(action=np.zeros((B, T), np.int32))
    foretold = atom_jax.imagine(lm, atom_jax.observe(lm, episode), np.zeros((B, 1, 3), int)).frames
    assert foretold.min() >= 0 and foretold.max() <= 1


def test_wrong_frames_are_refused_in_a_sentence(lm):
    episode = frames()
    with pytest.raises(AtomError, match="numbers from 0 to 1, as float32"):
        atom_jax.observe(lm, episode.replace(obs=episode.obs.astype(np.float64)))
    with pytest.raises(AtomError, match="numbers from 0 to 1, as float32"):
        atom_jax.observe(lm, episode.replace(obs=episode.obs * np.nan))
    with pytest.raises(AtomError, match="patch: squares of 5"):
        Pixels((12, 12, 1), patch=5)
