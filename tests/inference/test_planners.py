"""Planners find what is best where the optimum is known; the simulator is a ceiling; nothing is traced anew."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from atom_jax.data.envs import Environment, Watch, episodes, follow
from atom_jax.inference import planners
from atom_jax.inference.planners import Cem, Futures, Mpc, Random, Shooting, Tree, parse, returns
from atom_jax.inference.play import play, simulator
from atom_jax.typing import AtomError

GAMMA = 0.9
# Row 0: action 1 gives a little at once, and ends; 2, 0, 1 gives most. Row 1: everything is worth nothing, so that
# the first future is as good as any. Row 2: two equally good ones.
REWARDS = np.zeros((3, 3, 3, 3, 3), np.float32)  # row, step, the actions up to there (0 for those after it)
REWARDS[0, 0, 1, 0, 0], REWARDS[0, 2, 2, 0, 1], REWARDS[0, 2, 2, 0, 2] = 0.5, 2, 1
REWARDS[2, 1, 0, 2, 0] = REWARDS[2, 1, 2, 1, 0] = 1


def end_of(first):
    return (first == 1).astype(jnp.float32)


def imagine(actions_bnh):
    """The table, all at once."""
    row = jnp.arange(3)[:, None]
    a = [actions_bnh[:, :, i] for i in range(3)]
    z = jnp.zeros_like(a[0])
    rewards = [REWARDS_J[row, 0, a[0], z, z], REWARDS_J[row, 1, a[0], a[1], z], REWARDS_J[row, 2, a[0], a[1], a[2]]]
    end = jnp.stack([end_of(a[0]), jnp.zeros(z.shape), jnp.zeros(z.shape)], -1)
    return jnp.stack(rewards, -1), end, {"asked": jnp.int32(1)}


REWARDS_J = jnp.asarray(REWARDS)


def fork(n):
    return jnp.int32(0), jnp.zeros((3, n, 3), jnp.int32)


def step(futures, parent_bn, action_bn):
    t, past_bnh = futures
    past_bnh = jnp.take_along_axis(past_bnh, parent_bn[..., None], axis=1).at[:, :, t].set(action_bn)
    a = [past_bnh[:, :, i] for i in range(3)]
    end = jnp.where(t == 0, end_of(action_bn), 0.0)
    return (t + 1, past_bnh), REWARDS_J[jnp.arange(3)[:, None], t, *a], end, {"asked": jnp.int32(1)}


TABLE = Futures(3, 3, False, GAMMA, fork, step, imagine)


def naive(row, actions):
    value, alive = 0.0, 1.0
    for s in range(3):
        past = [a if i <= s else 0 for i, a in enumerate(actions)]
        value += GAMMA**s * alive * float(REWARDS[row, s, *past])
        alive *= 0.0 if s == 0 and actions[0] == 1 else 1.0
    return value


def test_values_are_discounted_until_the_end():
    every = np.array(list(itertools.product(range(3), repeat=3)))
    slow = dataclasses.replace(TABLE, imagine=None)
    actions = np.tile(every[None], (3, 1, 1))
    (at_once, cost), (by_steps, costs) = jax.jit(lambda a: (TABLE.values(a), slow.values(a)))(actions)
    expected = [[naive(row, actions) for actions in every.tolist()] for row in range(3)]
    np.testing.assert_allclose(at_once, expected, rtol=1e-6)
    np.testing.assert_allclose(by_steps, expected, rtol=1e-6)
    assert cost["asked"] == 1 and costs["asked"] == 3
    half = jax.jit(lambda x: returns(x, x / 2, GAMMA))(jnp.ones((1, 1, 3)))
    np.testing.assert_allclose(half, [[1 + 0.9 * 0.5 + 0.81 * 0.25]], rtol=1e-6)


@pytest.mark.parametrize(
    "planner",
    [Shooting(256, 3), Cem(64, 3, 8, 4, 0.1), Tree(9, 3, bound=2.0), Mpc(1, Shooting(256, 3))],
    ids=lambda p: p.name,
)
def test_every_planner_finds_the_optimum(planner):
    traces = []

    def counted(actions):
        traces.append(actions.shape)
        return imagine(actions)

    futures = dataclasses.replace(TABLE, imagine=counted)
    program = jax.jit(lambda key: planner.plan(futures, key))
    plan = program(jax.random.key(0))
    np.testing.assert_allclose(plan.value, [GAMMA**2 * 2, 0, GAMMA], rtol=1e-6)
    assert plan.actions[0].tolist() == [2, 0, 1] and plan.actions.dtype == jnp.int32
    assert plan.actions[2, :2].tolist() in ([0, 2], [2, 1])
    found = [naive(row, plan.actions[row].tolist()) for row in range(3)]
    np.testing.assert_allclose(plan.value, found, rtol=1e-6)
    # Iterations are one program, and another key needs no other one.
    before = len(traces)
    program(jax.random.key(1))
    assert len(traces) == before == (0 if planner.name == "tree" else 1)
    inner = getattr(planner, "inner", planner)
    many = getattr(inner, "n", 27) * getattr(inner, "iterations", 1)
    assert plan.stats["futures"] == many and plan.stats["steps"] == 3 * many
    assert plan.stats["asked"] == {"cem": 4, "tree": 3}.get(planner.name, 1)


def test_one_iteration_is_shooting_and_the_first_of_equals_is_taken():
    @jax.jit
    def run(key):
        law = planners._law(TABLE)
        drawn = law.draw(jax.random.fold_in(key, 0), law.begin(3), 16)
        plans = [p.plan(TABLE, key) for p in (Shooting(16, 3), Cem(16, 3, 4, 1), Cem(16, 3, 4, 3), Random(3))]
        actions = jnp.array([[[0, 1, 1], [0, 2, 1], [2, 1, 0]]] * 3)
        equals = planners._best(actions, TABLE.values(actions)[0])[0]
        return plans, drawn, equals

    (one, other, third, random), drawn, equals = jax.device_get(run(jax.random.key(5)))
    np.testing.assert_array_equal(one.actions, other.actions)
    np.testing.assert_array_equal(one.value, other.value)
    # Row 1: all are worth nothing, in later iterations too. Row 2: two are worth the most.
    np.testing.assert_array_equal(one.actions[1], drawn[1, 0])
    np.testing.assert_array_equal(third.actions[1], drawn[1, 0])
    assert equals[2].tolist() == [0, 2, 1]
    assert random.stats["futures"] == 1 and random.value[1] == 0


def test_a_narrow_tree_keeps_what_can_still_bring_more():
    """All but action 2 ends it at once. Three futures are kept: those that ended with a little, or that go on."""

    def ends(futures, parent_bn, action_bn):
        after, reward, _, cost = step(futures, parent_bn, action_bn)
        return after, reward, ((futures[0] == 0) & (action_bn != 2)), cost

    futures = dataclasses.replace(TABLE, step=ends)
    hopes = [Tree(3, 3, bound=bound) for bound in (2.0, 0.0)]
    much, little = jax.jit(lambda key: [p.plan(futures, key) for p in hopes])(jax.random.key(0))
    assert much.actions[0].tolist() == [2, 0, 1] and little.actions[0, 0] == 1
    np.testing.assert_allclose([much.value[0], little.value[0]], [GAMMA**2 * 2, 0.5], rtol=1e-6)


def test_the_law_moves_to_the_elites_but_not_wholly():
    law, drawn = planners._law(TABLE), np.tile(np.float32([0.7, 0.2, 0.1]), (3, 2, 1))
    fitted = jax.jit(lambda a: law.floored(law.fit(a)))(np.zeros((3, 4, 3), np.int32))
    np.testing.assert_allclose(fitted[0, 0], np.array([1, 0.02, 0.02]) / 1.04, rtol=1e-6)
    draws = np.asarray(jax.jit(lambda key, x: law.draw(key, x, 2000))(jax.random.key(0), drawn))
    shares = [(draws[1] == a).mean() for a in range(3)]
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=0.04)


def test_actions_that_are_numbers():
    goal = jnp.array(
        [[0.5, -0.3], [-1.5, 0.2], [0.0, 0.9]]
    )  # two numbers at each of three steps; one is out of reach

    def imagine(actions_bnha):
        reward = -((actions_bnha - goal[None, None]) ** 2).sum(-1)
        return reward, jnp.zeros(reward.shape, bool), {}

    futures = Futures(2, 2, True, 1.0, lambda n: None, None, imagine)
    several = Cem(128, 3, 12, 8), Cem(128, 3, 12, 1), Shooting(128, 3), Cem(128, 3, 12, 2, alpha=1.0)

    @jax.jit
    def run(key):
        law = planners._law(futures)
        again = law.draw(jax.random.fold_in(key, 1), law.begin(3), 128)
        return [p.plan(futures, key) for p in several], futures.values(again)[0].max(1)

    (plan, one, shot, still), again = run(jax.random.key(0))
    # A law that does not move draws as it began.
    np.testing.assert_allclose(still.value, jnp.maximum(shot.value, again), rtol=1e-5)
    assert plan.actions.shape == (2, 3, 2) and float(jnp.abs(plan.actions).max()) <= 1
    np.testing.assert_allclose(plan.actions, np.tile(np.clip(goal, -1, 1), (2, 1, 1)), atol=0.2)
    assert (plan.value > shot.value).all() and (plan.value < -0.25 + 1e-6).all()
    np.testing.assert_array_equal(one.actions, shot.actions)
    with pytest.raises(AtomError, match="not numbered"):
        Tree(4, 3).plan(futures, jax.random.key(0))


@struct.dataclass
class Place:
    at: jax.Array
    over: jax.Array
    event: jax.Array


@dataclasses.dataclass(frozen=True)
class Wind(Environment):
    """A line from -3 to 3, on which one goes left, stays or goes right, and is blown to a side half of the time;
    reward at 2, which ends it."""

    actions: ClassVar[int] = 3
    shape: ClassVar[tuple[int, ...]] = (1,)
    classes: ClassVar[int] = 7

    def reset(self, key):
        no = jnp.zeros((), bool)
        return Place(jnp.int32(0), no, no), jnp.full((1,), 3, jnp.uint8)

    def step(self, key, state, action):
        blow = jax.random.choice(key, jnp.array([-1, 0, 0, 1]))
        at = jnp.where(state.over, state.at, jnp.clip(state.at + action - 1 + blow, -3, 3))
        done = (at == 2) & ~state.over
        state = Place(at, state.over | done, done)
        return state, (at[None] + 3).astype(jnp.uint8), done.astype(jnp.float32), done


def test_planning_anew_answers_the_wind():
    """What was planned once is blown away; planning anew after every step is not."""
    env, b = Wind(), 64
    state = jax.jit(lambda key: episodes(env, key, b, 1)[1])(jax.random.key(0))

    def run(planner):
        def think(mind, state, key):
            return simulator(env, state, key, GAMMA)

        def notice(mind, actions, led):
            return mind + led.obs.shape[1]

        return jax.jit(lambda key: play(env, planner, key, state, jnp.int32(0), think, notice, steps=6))(
            jax.random.key(1)
        )

    anew, once = run(Mpc(1, Shooting(64, 4))), run(Shooting(64, 6))
    assert anew.mind == once.mind == 6 and anew.actions.shape == (b, 6) and anew.obs.shape == (b, 6, 1)
    assert anew.plans.value.shape == (6, b) and once.plans.value.shape == (1, b)
    assert anew.reward.sum(1).max() == 1 and (anew.done.sum(1) == anew.reward.sum(1)).all()
    assert anew.reward.sum() > once.reward.sum() + 6


def test_the_simulator_reaches_what_the_oracle_reaches():
    env, n = Watch().lasting(8), 48

    @jax.jit
    def run(key):
        _, state = episodes(env, key, n, 9)
        plans = [p.plan(simulator(env, state, key), key) for p in (Tree(64, 6), Shooting(48, 6))]
        led = jax.vmap(lambda actions: follow(env, key, state, actions))(jnp.stack([p.actions for p in plans]))
        return jax.vmap(env.way)(state).steps > 0, led.reward.sum(2), jnp.stack([p.value for p in plans])

    reachable, rewards, values = jax.device_get(run(jax.random.key(2)))
    # It sees the treasure in the state; what it promises is what comes.
    np.testing.assert_array_equal(rewards, values > 0)
    np.testing.assert_array_equal(rewards[0], reachable)
    assert not (rewards[1] > reachable).any() and rewards[1].sum() > reachable.sum() - 8


def test_names_and_bad_input():
    assert parse("shooting:n=48,horizon=6") == Shooting(48, 6) and parse("random") == Random()
    planner = parse("mpc:every=2,inner=cem:n=32,horizon=4")
    assert planner == Mpc(2, Cem(32, 4)) and planner.horizon == 4 and planner.played == 2
    assert parse("mpc:every=9").played == 6 and parse(planner) is planner and parse("tree:width=3").played == 6
    wrong = {
        "magic": "planner 'magic': expected shooting", "cem:elites=65": "elites: 65 of n=64",
        "cem:m=3": "no field 'm'", "shooting:n=0": "n: expected", "mpc:horizon=3": "no field 'horizon'",
        "mpc:inner=x": "planner 'x'", "tree:width=a": "not an integer", "cem:alpha=2": "alpha: expected",
    }  # fmt: skip
    for text, message in wrong.items():
        with pytest.raises(AtomError, match=message):
            parse(text)
