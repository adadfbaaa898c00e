"""The watched world against a twin in plain numpy, and its oracle against breadth-first search."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.data.envs import Watch, check_actions, episodes, follow, parse
from atom_jax.typing import AtomError

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
KEY, N, FRAMES = jax.random.key(3), 100, 54
ENV = Watch(least=4, most=40)


def pads(size):
    c, e = size // 2, size - 1
    return [(0, c), (c, e), (e, c), (c, 0)]


def twin(env, walls, go, first, again, pad, actions):
    """One episode from what chance decided: frames, rewards, ends and events, by the rules in words."""
    size, agent, treasure, over = env.size, (env.size // 2,) * 2, None, False
    frames, rewards, ends, events = [], [], [], []
    for t in range(len(actions)):
        lit, event = None, t == 0
        if t:
            row, col = (agent[i] + MOVES[actions[t - 1]][i] for i in range(2))
            reward = end = False
            if t - 1 >= go and not over and 0 <= row < size and 0 <= col < size:
                if not walls[row, col] and (row, col) != (0, 0):
                    agent = row, col
                if agent in pads(size):
                    over = end = True
                    reward = pads(size).index(agent) == treasure
            rewards.append(float(reward))
            ends.append(end)
            if t == first or (first < t < go - 1 and again[t - 1]):
                treasure = lit = pad[t - 1]
                event = True
            event |= t == go or end
        cells = np.zeros((size, size), np.uint8)
        cells[walls] = 1
        for where in pads(size):
            cells[where] = 3
        cells[agent] = 2
        shown = treasure if over else lit
        if shown is not None:
            cells[pads(size)[shown]] = 4
        cells[0, 0] = 7 if t >= go else 5 + t % 2
        frames.append(cells)
        events.append(event)
    return frames, rewards, ends, events


@pytest.fixture(scope="module")
def made():
    """100 episodes, and what chance decided in them."""

    def decided(i):
        begin, _, chance = jax.random.split(jax.random.fold_in(KEY, i), 3)
        steps = jax.vmap(lambda t: ENV.chance(jax.random.fold_in(chance, t)))(jnp.arange(FRAMES))
        return *ENV.layout(begin), *steps

    frames, _ = jax.jit(lambda key: episodes(ENV, key, N, FRAMES))(KEY)
    return jax.device_get((frames, jax.jit(jax.vmap(decided))(jnp.arange(N))))


def test_frames_equal_a_numpy_twin(made):
    frames, decided = made
    walls, go, first, again, pad = decided
    assert go.min() == 4 and go.max() == 40 and first.min() == 1 and first.max() == 8
    for i in range(N):
        obs, rewards, ends, events = twin(ENV, walls[i], go[i], first[i], again[i], pad[i], frames.action[i])
        np.testing.assert_array_equal(frames.obs[i], obs)
        np.testing.assert_array_equal(frames.reward[i, :-1], rewards)
        np.testing.assert_array_equal(frames.done[i, :-1], ends)
        np.testing.assert_array_equal(frames.marks[i], events)
    assert frames.obs.dtype == np.uint8 and frames.reward.dtype == np.float32 and frames.action.dtype == np.int32
    # Ends of both kinds came, at most one in an episode.
    assert 10 < frames.reward.sum() < frames.done.sum() - 10 and frames.done.sum(1).max() == 1


def test_chance_and_behaviour(made):
    frames, (walls, _, _, again, pad) = made
    share = again.mean(), (np.diff(frames.action) == 0).mean(), walls[:, 1, 2].mean(), walls[:, 1, 1].mean()
    # Within four standard errors; an action is repeated where it is held, or drawn again.
    assert np.all(np.abs(np.subtract(share, (1 / 16, 0.4 + 0.6 / 4, 0.3, 0.2))) < (0.014, 0.028, 0.19, 0.16))
    assert np.bincount(pad.ravel(), minlength=4).min() > N * FRAMES / 4 * 0.9
    assert walls.sum((1, 2)).max() <= 6 and not walls[:, 0].any()


def test_a_longer_watch_has_as_many_flashes():
    assert Watch().lasting(40) == Watch(least=40, most=40)
    frames, state = jax.jit(lambda key: episodes(Watch().lasting(160), key, 400, 161))(KEY)
    assert (state.t == 160).all() and (frames.obs[:, -1, 0, 0] == 7).all() and (frames.obs[:, -2, 0, 0] < 7).all()
    flashes = np.asarray(frames.marks.sum(1)) - 2  # but for the first frame, and `go`
    assert abs(flashes.mean() - (1 + 33.5 / 16)) < 4 * flashes.std() / 20


def search(size, walls, agent, treasure, within):
    """Breadth-first: the number of steps of a shortest way that steps on no other pad, -1 for none."""
    queue, seen = collections.deque([(tuple(agent), 0)]), {tuple(agent)}
    while queue:
        (row, col), steps = queue.popleft()
        if (row, col) == pads(size)[treasure]:
            return steps if steps <= within else -1
        if (row, col) in pads(size):
            continue
        for dr, dc in MOVES:
            cell = row + dr, col + dc
            free = 0 <= cell[0] < size and 0 <= cell[1] < size and cell != (0, 0) and not walls[cell]
            if free and cell not in seen:
                seen.add(cell)
                queue.append((cell, steps + 1))
    return -1


@pytest.mark.parametrize("size, within", [(5, 6), (7, 3)])
def test_the_oracle_is_breadth_first_search(size, within):
    env = Watch(size=size).lasting(5)

    @jax.jit
    def run(key):
        _, state = episodes(env, key, 200, 6)
        way = jax.vmap(lambda s: env.way(s, within))(state)
        return state, way, follow(env, key, state, way.actions).reward.sum(1)

    state, way, reward = jax.device_get(run(jax.random.key(size)))
    found = [search(size, state.walls[i], state.agent[i], state.treasure[i], within) for i in range(200)]
    np.testing.assert_array_equal(way.steps, found)
    np.testing.assert_array_equal(reward, way.steps > 0)
    if (size, within) == (5, 6):
        assert 0.88 < (way.steps > 0).mean() < 0.99


def test_names_and_bad_input():
    env = parse("watch:size=7,least=4,most=6,reveal=false")
    assert env == Watch(size=7, least=4, most=6, reveal=False) and parse(env) is env
    assert env.shape == (7, 7) and env.actions == 4 and env.classes == 8 and Watch().frames == 54
    wrong = {
        "chess": "env 'chess': expected .*watch", "watch:length=3": "no field 'length'", "watch:size=6": "odd",
        "watch:least=9,most=3": "at least 9", "watch:flash=2": "flash: expected", "watch:least=2": "least: expected",
    }  # fmt: skip
    for text, message in wrong.items():
        with pytest.raises(AtomError, match=message):
            parse(text)
    assert check_actions(env, [[0, 3]]).shape == (1, 2)
    for actions in ([[0, 4]], [-1], [0.5], [[1], [1, 2]], 1, ["up"]):
        with pytest.raises(AtomError, match="--actions"):
            check_actions(env, actions, "--actions")


def test_pictures_of_frames(made):
    picture = ENV.render(made[0].obs[0, 0])
    assert picture.shape == (40, 40, 3) and picture.dtype == np.uint8
    assert tuple(picture[20, 20]) == ENV.palette[2] and tuple(picture[0, 0]) == ENV.palette[5]
