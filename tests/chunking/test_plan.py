"""The layout against a loop over positions that follows its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.chunking.types import END, START, Boundary, PlanState
from atom_jax.nn.attention import Tokens
from tests.chunking.layouts import make_plan, plan_of, random_marks, tokens

T = 14


def by_hand(kind, null, mark, positions, segments, m, chunks, opened):
    """One row as lists: what each position is in, and reads; each chunk's mark, index and document; the new state."""
    t, real = len(mark), segments > 0
    out = {"member": [False] * t, "tail": [False] * t, "offset": [0] * t, "read": [-1] * t, "slot": [None] * t}
    made, pending, seen, latest = [], [], 0, -1
    continues = kind == END and opened > 0 and not any(real & (positions == 0))
    for i in np.flatnonzero(real):
        if positions[i] == 0:
            chunks, opened, latest, pending = 0, 0, -1, []
            seen += null
            if null and seen <= m:
                chunks, latest = 1, len(made)
                made.append((i, 0, segments[i], True))
        fits = mark[i] and seen < m
        seen += mark[i]
        if fits:
            chunks, latest = chunks + 1, len(made)
            made.append((i, chunks - 1, segments[i], False))
        if kind == START:
            opened = 0 if fits else opened
            out["offset"][i], out["member"][i], out["slot"][i] = opened, latest >= 0, latest
            opened += 1
        else:
            out["offset"][i] = opened
            pending.append(i)
            opened = 0 if mark[i] else opened + 1
            for j in pending if fits else []:
                out["member"][j], out["slot"][j] = True, latest
            pending = [] if mark[i] else pending
        out["read"][i] = latest
    for j in pending if kind == END else []:
        out["tail"][j] = True
    return out, made, (chunks, opened), seen, continues


def check_rows(kind, mark, where, m, state, null=False):
    plan, after = make_plan(Boundary(mark=mark, kind=kind), where, m, state, null=null)
    got = jax.tree.map(np.asarray, plan)
    assert (np.diff(got.slot, axis=1) >= 0).all() and got.slot.min() >= 0 and got.slot.max() <= m
    for b in range(mark.shape[0]):
        row = [np.asarray(x[b]) for x in (mark, where.positions, where.segments)]
        before = int(state.chunks[b]), int(state.open[b])
        want, made, last, seen, continues = by_hand(kind, null, *row, m, *before)
        for name in ("member", "tail", "offset", "read"):
            np.testing.assert_array_equal(getattr(got, name)[b], want[name], err_msg=f"{name} of row {b}")
        inside = np.array(want["member"])
        np.testing.assert_array_equal(got.slot[b][inside], np.array(want["slot"])[inside])
        assert (got.slot[b][np.array(want["tail"])] == m).all()
        table = np.array([*made, *[(0, 0, 0, 0)] * (m - len(made))]).reshape(m, 4)
        columns = np.stack([got.at[b], got.tokens.positions[b], got.tokens.segments[b], got.null[b]], axis=1)
        np.testing.assert_array_equal(columns, table)
        assert (int(got.count[b]), int(got.lost[b])) == (seen, max(seen - m, 0))
        assert bool(got.continues[b]) == continues
        assert (int(after.chunks[b]), int(after.open[b])) == last
    return plan, after


@pytest.mark.parametrize("m", [3, T])
@pytest.mark.parametrize("kind,null", [(START, False), (END, False), (END, True)])
def test_documents_and_padding(kind, null, m):
    """Packed rows, padding on either side, rows of padding alone, rows without marks, documents without a mark."""
    packed = tokens([14], [5, 1, 6], [1, 1, 2, 3], [], [9], [4, 4, 4], [12], [3], t=T)
    left = tokens([9], [1], [13], [14], [], [6], [2], [10], t=T, left=True)
    for seed, where in enumerate([packed, left, packed, left]):
        mark = random_marks(seed, kind, where, rate=(0.2, 0.5)[seed // 2], forced=seed < 2).at[4].set(False)
        check_rows(kind, mark, where, m, PlanState.empty(8), null)


@pytest.mark.parametrize("kind,null", [(START, False), (END, False), (END, True)])
def test_calls_continue(kind, null):
    """Rows of a second call go on where the first stopped; some rows have nothing in one of the calls."""
    for m in (2, 6):
        lengths = np.array([6, 3, 0, 1, 6, 0])
        first = tokens(*[[n] if n else [] for n in lengths], t=6)
        _, state = check_rows(kind, random_marks(m, kind, first), first, m, PlanState.empty(6), null)
        more = np.array([4, 6, 0, 1, 0, 5])
        real = np.arange(6) < more[:, None]
        second = Tokens(
            jnp.asarray((lengths[:, None] + np.arange(6)) * real, jnp.int32), jnp.asarray(real, jnp.int32)
        )
        check_rows(kind, random_marks(m + 1, kind, second), second, m, state, null)


@pytest.mark.parametrize("kind", [START, END])
def test_more_marks_than_slots(kind):
    """What a position reads depends on no later mark, and later documents read nothing when the slots are gone."""
    where = tokens([8, 6], t=T)
    mark = random_marks(0, kind, where, rate=0.9)
    _, full = plan_of(mark, where, kind)
    _, few = plan_of(mark, where, kind, m=4)
    fits = np.cumsum(mark, axis=1) <= 4
    np.testing.assert_array_equal(np.asarray(few.read)[fits], np.asarray(full.read)[fits])
    assert int(few.lost[0]) == int(mark.sum()) - 4
    assert (np.asarray(few.read)[0, 8:] == -1).all() and not np.asarray(few.member)[0, 8:].any()
    np.testing.assert_array_equal(few.at, full.at[:, :4])


def test_unused_slots_as_published():
    """With the switch for parity, `at` is the published sort of marked positions before unmarked ones."""
    where = tokens([14], [9], [11], t=T)
    mark = random_marks(3, START, where)
    _, plan = plan_of(mark, where, START, m=10, official=True)
    order = np.argsort(np.arange(T) + T * ~np.asarray(mark), axis=1)[:, :10]
    np.testing.assert_array_equal(plan.at, order)
    np.testing.assert_array_equal(plan.tokens.segments, np.ones((3, 10)))
    np.testing.assert_array_equal(plan.tokens.positions, np.broadcast_to(np.arange(10), (3, 10)))
    _, usual = plan_of(mark, where, START, m=10)
    np.testing.assert_array_equal(plan.read, usual.read)
