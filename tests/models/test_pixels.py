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
    return LM(CFG, params.init(jax.random.key(1), world.spec(CFG)), None)


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
