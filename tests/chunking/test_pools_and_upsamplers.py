"""Every pool with every upsampler: calls, packing and padding change nothing, and the future is not seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.mixing import ema
from atom_jax.chunking.plan import make_plan
from atom_jax.chunking.pooling import POOLS
from atom_jax.chunking.segments import gather
from atom_jax.chunking.types import END, START, Boundary, PlanState
from atom_jax.chunking.upsampling import UPSAMPLERS, carry
from atom_jax.nn.attention import Tokens
from tests.chunking.layouts import random_marks, tokens

T, D = 10, 4
ROWS = T + 1
# Pools, vectors per chunk, and the upsamplers that read so many.
CASES = [(pool, 1, tuple(UPSAMPLERS)) for pool in POOLS] + [("attention", 2, ("cross_attention",))]
# Documents of these pools begin with a chunk that holds nothing.
NULL = ("mean", "attention")


class Unit:
    """Pool, an inner network that knows its chunk's index, smoothing, and upsampling in several ways; called as a
    model calls them."""

    def __init__(self, pool: str, k: int, ups: tuple[str, ...], m: int = T):
        self.cfg = Chunking(pool=pool, slots=k, heads=2, max_positions=2)
        self.pool, self.ups, self.m, self.null = POOLS[pool], ups, m, pool in NULL
        self.kind = START if pool == "first" else END
        spec = {up: UPSAMPLERS[up].spec(self.cfg, D) for up in ups}
        self.p = params.init(jax.random.key(1), {"pool": self.pool.spec(self.cfg, D), **spec})
        self.call = jax.jit(self._call)

    def init(self, b: int):
        return {
            "plan": PlanState.empty(b),
            "pool": self.pool.init_state(self.cfg, D, b, jnp.float32),
            "ema": jnp.zeros((b, D)),
            "z": jnp.broadcast_to(jnp.linspace(-1, 1, D), (b, self.cfg.slots, D)),
        }

    def _call(self, h, mark, where, state):
        boundary = Boundary(mark=mark, p=jax.nn.sigmoid(h[:, :, 0]), kind=self.kind)
        m = min(self.m, h.shape[1]) + self.null
        plan, planned = make_plan(boundary, where, m, state["plan"], null=self.null)
        u, pooled = self.pool.apply(self.p["pool"], h, boundary, plan, state["pool"], cfg=self.cfg)
        real, index = plan.tokens.segments > 0, plan.tokens.positions.astype(jnp.float32)
        u = jnp.where(plan.null[:, :, None, None], 0.7, u)
        v = jnp.tanh(u) + 0.1 * index[:, :, None, None]
        mixed = ema(v[:, :, 0], gather(boundary.p, plan.at), real, plan.tokens.segments, state["ema"])
        v = v.at[:, :, 0].set(mixed)
        ways = [UPSAMPLERS[up].apply(self.p[up], v, h, plan, state["z"], cfg=self.cfg) for up in self.ups]
        y = jnp.stack(ways, axis=2)
        z = carry(v, plan, state["z"])
        smooth = jnp.where((plan.count > 0)[:, None], z[:, 0], state["ema"])
        return y, {"plan": planned, "pool": pooled, "ema": smooth, "z": z}, plan.lost


def same(a, b, where=None):
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_allclose(a if where is None else a[where], b if where is None else b[where], atol=3e-6)


def shift(x, rows_by):
    """Row r of x moved to the left by rows_by[r], junk behind it."""
    index = (np.arange(T) + np.asarray(rows_by)[:, None]) % T
    return np.take_along_axis(np.asarray(x), index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


@pytest.mark.parametrize("pool,k,ups", CASES)
def test_unit(pool, k, ups):
    unit = Unit(pool, k, ups)
    full = tokens(*[[T]] * ROWS, t=T)
    mark = random_marks(0, unit.kind, full)
    h = jax.random.normal(jax.random.key(2), (ROWS, T, D))
    whole, last, _ = unit.call(h, mark, full, unit.init(ROWS))
    assert np.asarray(mark).sum(1).max() > 3

    # Row r is cut after r positions; padding holds what does not belong there.
    cut, place = np.arange(ROWS)[:, None], np.arange(T)[None]
    begun, (junk, _) = place < cut, jax.random.normal(jax.random.key(3), (2, ROWS, T, D)) * 50
    first = Tokens(full.positions, jnp.asarray(begun, jnp.int32))
    y1, state, _ = unit.call(jnp.where(begun[..., None], h, junk), mark & begun, first, unit.init(ROWS))
    same(y1, whole, begun)
    rest = place < T - cut
    second = Tokens(jnp.asarray((place + cut) * rest, jnp.int32), jnp.asarray(rest, jnp.int32))
    h2 = jnp.where(rest[..., None], shift(h, cut[:, 0]), junk)
    y2, state, _ = unit.call(h2, jnp.asarray(shift(mark, cut[:, 0]) & rest), second, state)
    same(y2, shift(whole, cut[:, 0]), rest)
    jax.tree.map(same, state, last)

    state = unit.init(ROWS)
    for t in range(T):
        at = slice(t, t + 1)
        y, state, _ = unit.call(h[:, at], mark[:, at], jax.tree.map(lambda x, at=at: x[:, at], full), state)
        same(y[:, 0], whole[:, t])
    jax.tree.map(same, state, last)

    # What comes from position r on is changed in row r.
    later = jnp.asarray(~begun)
    y, *_ = unit.call(jnp.where(later[..., None], junk, h), mark ^ later, full, unit.init(ROWS))
    same(y, whole, begun)

    # Rows 0 to 3: documents packed, then each alone, padded on the right; rows 4 to 6: padded on the left.
    lengths = [4, 1, 5]
    where = tokens(lengths, *[[n] for n in lengths], *[[]] * (ROWS - 4), t=T)
    left = tokens(*[[]] * 4, *[[n] for n in lengths], *[[]] * (ROWS - 7), t=T, left=True)
    where = jax.tree.map(jnp.add, where, left)
    h, mark = np.array(junk), np.zeros((ROWS, T), bool)
    h[0], mark[0] = np.asarray(junk[0]) / 50, np.asarray(random_marks(5, unit.kind, where))[0]
    ends = np.cumsum(lengths)
    own = [slice(end - n, end) for n, end in zip(lengths, ends)]
    for r, (n, part) in enumerate(zip(lengths, own)):
        for row, target in ((r + 1, slice(0, n)), (r + 4, slice(T - n, T))):
            h[row, target], mark[row, target] = h[0, part], mark[0, part]
    y, *_ = unit.call(jnp.asarray(h), jnp.asarray(mark), where, unit.init(ROWS))
    for r, (n, part) in enumerate(zip(lengths, own)):
        same(y[r + 1, :n], y[0, part])
        same(y[r + 4, T - n :], y[0, part])


@pytest.mark.parametrize("pool,k,ups", [CASES[0], CASES[2], CASES[-1]])
def test_too_many_marks(pool, k, ups):
    """Chunks that fit come out as if there were room for all, later ones are counted; further calls go on."""
    unit, small = Unit(pool, k, ups), Unit(pool, k, ups, m=3)
    where = tokens(*[[T]] * 3, t=T)
    mark = random_marks(0, unit.kind, where, rate=0.6)
    h = jax.random.normal(jax.random.key(2), (3, T, D))
    full, *_ = unit.call(h, mark, where, unit.init(3))
    few, state, lost = small.call(h, mark, where, small.init(3))
    fits = np.cumsum(mark, axis=1) <= 3
    same(few, full, fits)
    np.testing.assert_array_equal(lost, np.asarray(mark).sum(1) - 3)
    np.testing.assert_array_equal(state["plan"].chunks, [3 + small.null] * 3)
    more = Tokens(where.positions + T, where.segments)
    y, state, _ = small.call(h, mark & False, more, state)
    assert np.isfinite(np.asarray(y)).all()
    np.testing.assert_array_equal(state["plan"].chunks, [3 + small.null] * 3)
