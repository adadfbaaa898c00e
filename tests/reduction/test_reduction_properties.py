"""What every reducer must do: give every token a place or drop it, count what it keeps, leave rows and protected
tokens alone; and what is done with reductions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import config, reduction
from atom_jax.reduction.globalcom2 import GlobalCom2
from atom_jax.reduction.hiprune import HiPrune
from atom_jax.reduction.kmeans import KMeans
from atom_jax.reduction.kth import Kth
from atom_jax.reduction.pool import Pool
from atom_jax.reduction.random_tokens import RandomTokens
from atom_jax.reduction.todre import ToDRE
from atom_jax.reduction.tome import ToMe
from atom_jax.reduction.types import Seen
from atom_jax.typing import AtomError

GRID, P, D = (4, 6), 24, 5
# With how many tokens each of them leaves of P.
CASES = {
    "tome": (ToMe(10), 14), "kth": (Kth(3), 8), "random": (RandomTokens(7), 7),
    "random_merge": (RandomTokens(7, merge=True), 7), "pool": (Pool(3, 4), 12), "kmeans": (KMeans(6), 6),
    "hiprune": (HiPrune(9, 0.8), 9), "globalcom2": (GlobalCom2(0.5), 12), "kcentre": (ToDRE(5), 5),
    "maxsum": (ToDRE(5, "maxsum"), 5),
}  # fmt: skip
MERGES = {"tome", "kth", "random_merge", "pool", "kmeans"}


def seen(b=3, protected=0, grid=GRID, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    p = grid[0] * grid[1] + protected
    x, key = (jax.random.normal(k, (b, p, D)) for k in keys[:2])
    attention = jax.nn.softmax(jax.random.normal(keys[2], (b, 2, p)), axis=-1)
    return Seen(x, key, attention, None, grid, protected)


@functools.partial(jax.jit, static_argnums=0)
def run(cfg, seen):
    """The reduction, what it makes of x, and that expanded again."""
    found = reduction.reduce(cfg, seen)
    y, size = reduction.apply(seen.x, None, found)
    return found, y, size, reduction.expand(y, found)


@pytest.mark.parametrize("name", CASES)
def test_slots_partition_what_is_kept(name):
    cfg, m = CASES[name]
    given = seen()
    found, y, size, back = jax.device_get(run(cfg, given))
    x = np.asarray(given.x)
    assert found.m == m == reduction.tokens(cfg, P) and y.shape == (3, m, D)
    assert found.slot.min() >= 0 and found.slot.max() <= m
    kept = found.slot < m
    np.testing.assert_array_equal(found.share, kept)
    np.testing.assert_array_equal(size, found.size)
    np.testing.assert_array_equal(found.size, reduction.source(found).sum(2))
    if name in MERGES:
        assert kept.all() and (size.sum(1) == P).all()
    else:
        assert (size <= 1).all() and (size.sum(1) == kept.sum(1)).all() and (size.sum(1) > m - 4).all()
    for row in range(3):
        slot, at, used = found.slot[row], found.at[row], np.flatnonzero(size[row])
        np.testing.assert_array_equal(slot[at[used]], used)
        assert not (y[row, size[row] == 0].any() or at[size[row] == 0].any() or back[row, slot == m].any())
        for i in used:
            np.testing.assert_allclose(y[row, i], x[row, slot == i].mean(0), atol=1e-6)
            assert (back[row, slot == i] == y[row, i]).all()
        if name != "tome":
            assert (np.diff(at[used]) > 0).all()


@pytest.mark.parametrize("name", CASES)
def test_rows_are_alone_and_protected_tokens_stay(name):
    cfg, m = CASES[name]
    given = seen(protected=1)
    found = run(cfg, given)[0]
    assert found.m == reduction.tokens(cfg, P + 1, 1)
    assert (found.slot[:, 0] == 0).all() and ((found.slot == 0).sum(1) == 1).all()
    if name != "tome":
        assert found.m == m + 1
        inner = run(
            cfg, jax.tree.map(lambda x: x[..., 1:] if x.shape[1] == 2 else x[:, 1:], given.replace(protected=0))
        )[0]
        np.testing.assert_array_equal(found.slot[:, 1:], inner.slot + 1)
        np.testing.assert_array_equal(found.at[:, 1:], inner.at + 1)
    turned = run(cfg, jax.tree.map(lambda x: x[::-1], given))[0]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[::-1]), found, turned)


@pytest.mark.parametrize(
    "cfg", [ToMe(0), Kth(1), RandomTokens(P), Pool(*GRID), KMeans(99), HiPrune(P), GlobalCom2(1.0), ToDRE(P)]
)
def test_all_tokens_kept_is_the_identity(cfg):
    given = seen()
    jax.tree.map(np.testing.assert_array_equal, reduction.reduce(cfg, given), reduction.identity(3, P))


def test_two_reductions_are_one():
    given = seen()

    @jax.jit
    def both(given):
        one = reduction.reduce(ToMe(9), given)
        y, size = reduction.apply(given.x, None, one)
        two = reduction.reduce(ToDRE(6), Seen(y))
        z, size = reduction.apply(y, size, two)
        both = reduction.trace(one, two)
        return z, size, reduction.apply(given.x, None, both), both.size, one.at, two.at, both.at

    z, size, (direct, direct_size), counted, one_at, two_at, at = both(given)
    np.testing.assert_allclose(z, direct, atol=1e-6)
    np.testing.assert_array_equal(size, direct_size)
    np.testing.assert_array_equal(size, counted)
    np.testing.assert_array_equal(at, np.take_along_axis(np.asarray(one_at), np.asarray(two_at), 1))


@pytest.mark.parametrize("name", ["tome", "kth", "hiprune", "globalcom2", "kcentre", "maxsum"])
def test_of_equals_the_first_counts(name):
    cfg, m = CASES[name]
    given = Seen(jnp.ones((1, P, D)), None, jnp.full((1, 2, P), 1 / P), jnp.ones((1, 2, 2)), GRID)
    expected = np.array([*range(m), *[m] * (P - m)])
    if name == "tome":  # the first ten at even places go to the first at an odd one
        expected = np.full(P, 2)
        expected[20], expected[22], expected[1::2] = 0, 1, range(2, 14)
    if name == "kth":
        expected = np.zeros(P)
        expected[2::3] = range(8)
    if name == "globalcom2":  # the first row of every crop
        expected = np.array([*range(6), *[m] * 6, *range(6, 12), *[m] * 6])
    np.testing.assert_array_equal(run(cfg, given)[0].slot[0], expected)


def test_neighbours_are_those_of_the_grid():
    attention = np.zeros((1, 2, P), np.float32)
    attention[0, 0, 6] = 1  # the first of the second row
    attention[0, 1] = np.arange(P)
    given = Seen(jnp.zeros((1, P, D)), attention=jnp.asarray(attention), grid=GRID)
    for wrap, expected in ((False, [0, 6, 7, 12, 23]), (True, [0, 5, 6, 7, 12])):
        slot = run(HiPrune(5, 1.0, deep_layer=1, wrap=wrap), given)[0].slot[0]
        np.testing.assert_array_equal(np.flatnonzero(slot < 5), expected)


def test_an_important_crop_may_keep_more():
    thumbnail = jnp.zeros((1, 2, 2)).at[0, 0, 0].set(1.0)
    given = seen(1).replace(thumbnail=thumbnail)
    kept = np.asarray(run(GlobalCom2(0.5, 0.05), given)[0].slot[0] < 12).reshape(2, 2, 2, 3).sum((1, 3))
    assert kept[0, 0] == 5 and (kept.reshape(-1)[1:] == 2).all()


def test_a_reducer_made_to_leave_a_number():
    for cfg, _ in CASES.values():
        assert reduction.tokens(reduction.leaving(cfg, 12, GRID), P) == 12
    assert reduction.leaving(Pool(), 12, GRID) == Pool(3, 4)
    for cfg, m, message in (
        (ToMe(), 5, "one merge leaves at least half of 24 tokens, not 5"), (Kth(), 7, "7 does not divide 24"),
        (Pool(), 14, "14 is no product"), (ToDRE(), 25, "25 of 4 x 6 tokens"),
        (GlobalCom2(), 3, "3 tokens of 2 x 2 crops"),
    ):  # fmt: skip
        with pytest.raises(AtomError, match=message):
            reduction.leaving(cfg, m, GRID)


def test_reducers_are_written_as_texts():
    assert reduction.parse("todre:m=3,mode=maxsum") == ToDRE(3, "maxsum")
    assert reduction.parse("tome") == ToMe()
    cfg = HiPrune(4, object_layer=1)
    assert config.from_json(object, config.to_json(cfg)) == cfg
    with pytest.raises(AtomError, match="'tomes': expected tome, kth, random, pool, kmeans, hiprune"):
        reduction.parse("tomes")
    with pytest.raises(AtomError, match=r"reduction kth: no field 'r'; valid names here: k"):
        reduction.parse("kth:r=3")


def test_what_a_reducer_lacks_is_said():
    for cfg, given, message in (
        (HiPrune(3), seen().replace(attention=None), "hiprune: needs the attention of layer 0; that of 0 layers is"),
        (HiPrune(3), seen().replace(grid=None), "hiprune: needs tokens that fill a grid; there are 24 for None"),
        (Pool(2, 2), seen().replace(grid=(5, 5)), r"pool: needs tokens that fill a grid; there are 24 for \(5, 5\)"),
        (Pool(5, 2), seen(), "pool: 5 x 2 cells of 4 x 6 tokens"),
        (GlobalCom2(rows=3), seen(), "globalcom2: 4 x 6 tokens don't divide into 3 x 2 crops"),
        (ToDRE, seen(), "reduction: expected one of ToMe, Kth"),
    ):
        with pytest.raises(AtomError, match=message):
            reduction.reduce(cfg, given)
    with pytest.raises(AtomError, match="mode: expected kcentre or maxsum"):
        ToDRE(mode="median")
