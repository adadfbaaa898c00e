"""The adapter to xminigrid against the package itself. Without the package it says what is missing."""

import importlib.util

import jax
import numpy as np
import pytest

from atom_jax.data.envs import Minigrid, episodes, follow, parse
from atom_jax.inference.planners import Shooting
from atom_jax.inference.play import simulator
from atom_jax.typing import AtomError

THERE = importlib.util.find_spec("xminigrid") is not None
needs = pytest.mark.skipif(not THERE, reason="needs xminigrid: pip install 'atom-jax[envs]'")


@pytest.fixture(autouse=True)
def promotes():
    """The package adds arrays of different ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.skipif(THERE, reason="xminigrid is there")
def test_without_the_package():
    with pytest.raises(AtomError, match=r"xminigrid is missing: pip install 'atom-jax\[envs\]'"):
        parse("minigrid")


@needs
def test_the_package_is_followed_until_the_end():
    import xminigrid

    env, n, t = Minigrid(world="MiniGrid-MemoryS8", tour=False), 40, 60
    frames = jax.device_get(jax.jit(lambda key: episodes(env, key, n, t)[0])(jax.random.key(0)))
    inner, params = xminigrid.make("MiniGrid-MemoryS8", view_size=3)
    assert frames.obs.shape == (n, t, 3, 3, 2) and frames.obs.dtype == np.uint8 and frames.obs.max() < env.classes
    assert 0 < frames.reward.sum() < frames.done.sum() and frames.done.sum(1).max() == 1 and frames.action.max() == 2
    np.testing.assert_array_equal(frames.marks.sum(1), 1)
    step = jax.jit(lambda state, action: inner.step(params, state, action))
    for i in range(4):
        begin = jax.random.split(jax.random.fold_in(jax.random.key(0), i), 3)[0]
        state, over = inner.reset(params, begin), False
        for s in range(t):
            np.testing.assert_array_equal(frames.obs[i, s], state.observation)
            after = state if over else step(state, frames.action[i, s])
            assert frames.done[i, s] == (not over and bool(after.last()))
            assert frames.reward[i, s] == pytest.approx(0.0 if over else float(after.reward))
            state, over = after, over or bool(after.last())


@needs
def test_it_stands_still_after_the_end_and_can_be_drawn():
    env = parse("minigrid:world=MiniGrid-MemoryS8,view=5,tour=false")
    assert env.shape == (5, 5, 2) and env.actions == 3 and env.frames == env.watched == 64 and env.touring == 0
    frames, state = jax.jit(lambda key: episodes(env, key, 30, 60))(jax.random.key(1))
    led = jax.jit(lambda s, a: follow(env, jax.random.key(2), s, a))(state, np.zeros((30, 2), np.int32))
    over = np.asarray(frames.done[:, :-1].any(1))
    assert over.any() and not np.asarray(led.reward)[over].any() and not np.asarray(led.done)[over].any()
    np.testing.assert_array_equal(led.obs[over][:, 1], led.obs[over][:, 0])
    picture = env.render(frames.obs[0, 0])
    assert picture.shape == (80, 80, 3) and picture.dtype == np.uint8
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 2


@needs
def test_the_tour_ends_where_one_has_to_decide():
    """Both objects were in sight, and a few steps lead to either end; of the right one a planner knows."""
    env, n = Minigrid(), 40
    assert env.touring == env.watched == 31 and env.frames == 41
    simulated = Shooting(48, 6)

    @jax.jit
    def run(key):
        frames, state = episodes(env, key, n, env.touring + 1)
        plan = simulated.plan(simulator(env, state, key), key)
        return frames, follow(env, key, state, plan.actions), state

    frames, led, state = jax.device_get(run(jax.random.key(3)))
    agent, grid = state.inner.state.agent, state.inner.state.grid
    assert (agent.position == [3, 14]).all() and (agent.direction == 0).all() and not frames.done[:, :-1].any()
    np.testing.assert_array_equal(frames.obs[:, -1, 0, 1], grid[:, 1, 14])
    objects = (frames.obs[:, :-1, :, :, 0] == 3) | (frames.obs[:, :-1, :, :, 0] == 7)
    seen = frames.obs[:, :-1, :, :, 0][objects]
    assert objects.any((1, 2, 3)).all() and set(seen.tolist()) == {3, 7}
    assert 0.3 < (grid[:, 1, 14] == grid[:, 2, 1]).all(-1).mean() < 0.7
    assert (led.reward.sum(1) > 0).mean() > 0.9


@needs
def test_bad_input():
    for text, message in {
        "minigrid:world=Maze": "world 'Maze'",
        "minigrid:view=4": "odd",
        "minigrid:acts=7": "acts",
    }.items():
        with pytest.raises(AtomError, match=message):
            parse(text)
