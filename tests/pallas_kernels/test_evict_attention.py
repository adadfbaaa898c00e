"""The kernel's program against the reference, in values and gradients, and the reference against a loop in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.evict_attention import plan, specs, tuning
from pallas_kernels.evict_attention.api import evict_attention
from pallas_kernels.evict_attention.tuning import Blocks

NOTHING = -1e30
BLOCKS = Blocks(q_block=128, k_block=256, q_tile=64, k_tile=128)


def inputs(t, s, *, b=1, h=2, g=2, k=16, dtype=jnp.float32, keep="soft"):
    keys = jax.random.split(jax.random.key(t + s), 5)
    q = jax.random.normal(keys[0], (b, h, g, t, k)).astype(dtype)
    key, value = (jax.random.normal(x, (b, h, s, k)).astype(dtype) for x in keys[1:3])
    if keep is None:
        return q, key, value
    if keep == "soft":
        return q, key, value, -5 * jax.random.uniform(keys[3], (b, h, s))
    return q, key, value, jnp.where(jax.random.bernoulli(keys[4], 0.7, (b, h, s)), -jnp.inf, 0.0)


def documents(*rows):
    """Segments i32 [b, n]: documents of the lengths in each row, numbered from 1, the last one of several padding."""
    made = []
    for row in rows:
        ids = [np.full(n, i + 1) for i, n in enumerate(row[:-1])]
        made.append(np.concatenate([*ids, np.full(row[-1], 0 if len(row) > 1 else 1)]))
    return jnp.asarray(np.stack(made), jnp.int32)


def by_hand(q, k, v, keep, keep_window, window, segments, q_start):
    q, k, v, keep = (np.asarray(x, np.float64) for x in (q, k, v, keep))
    out, lse = np.zeros_like(q), np.full(q.shape[:4], NOTHING)
    for b, h, g, t in np.ndindex(*q.shape[:4]):
        distance = q_start + t - np.arange(k.shape[2])
        seen = (distance >= 0) & (distance < (window or 10**9))
        if segments is not None:
            own = np.asarray(segments[0])[b, t]
            seen &= (np.asarray(segments[1])[b] == own) & (own > 0)
        score = k[b, h] @ q[b, h, g, t] / np.sqrt(q.shape[4]) + np.where(distance > keep_window, keep[b, h], 0)
        seen &= score > -1e29
        if seen.any():
            top = score[seen].max()
            weight = np.exp(score[seen] - top)
            out[b, h, g, t] = weight @ v[b, h, seen] / weight.sum()
            lse[b, h, g, t] = top + np.log(weight.sum())
    return out, lse


@pytest.mark.parametrize(
    "options",
    [
        {"keep_window": 3},
        {"keep_window": 0, "window": 9, "segments": (documents([5, 1, 1, 9, 4]), documents([5, 1, 1, 9, 4]))},
        {"keep_window": 2, "q_start": 20},
        {"keep_window": 2, "q_start": -7},
    ],
)
@pytest.mark.parametrize("keep", ["soft", "hard"])
def test_reference_equals_a_loop(options, keep):
    x = inputs(20, 20, h=1, keep=keep)
    out, lse = evict_attention(*x, **options, implementation="reference")
    options = {"window": None, "segments": None, "q_start": 0} | options
    expected, expected_lse = by_hand(*x, **options)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-6)


def test_reference_in_rows_equals_all_at_once(monkeypatch):
    x, seg = inputs(45, 45), documents([20, 16, 9])
    options = {"keep_window": 7, "segments": (seg, seg), "implementation": "reference"}
    whole = evict_attention(*x, **options)
    monkeypatch.setattr("pallas_kernels.evict_attention.ref.ROWS", 16)
    for got, expected in zip(evict_attention(*x, **options), whole):
        np.testing.assert_allclose(got, expected, atol=2e-6)


def results(arrays, implementation, **options):
    """Output, log-sum-exp and the gradients of a random sum of both."""
    weight = jax.random.normal(jax.random.key(7), arrays[0].shape)

    def total(*arrays):
        out, lse = evict_attention(*arrays, **options, implementation=implementation)
        seen = lse > -1e29
        return jnp.sum(out * weight) + jnp.sum(jnp.where(seen, lse, 0.0) * weight[..., 0]), (out, lse)

    run = jax.jit(jax.grad(total, argnums=tuple(range(len(arrays))), has_aux=True))
    gradients, (out, lse) = run(*arrays)
    return out, lse, *gradients


CASES = {
    # Odd lengths, several blocks both ways, every kind of tile.
    "soft": (inputs(300, 300), {"keep_window": 20}),
    # Documents of one token, a long one, padding; a sliding window.
    "packed": (
        inputs(300, 300, b=2),
        {
            "keep_window": 20,
            "window": 150,
            "segments": (documents([100, 1, 1, 1, 180, 17], [5, 290, 5]),) * 2,
        },
    ),
    # Every key of the first two tiles is evicted; queries at an offset that is known only at run time.
    "part": (inputs(140, 500, h=1, b=2, keep="hard"), {"keep_window": 30, "q_start": jnp.asarray([360, 250])}),
    "dense": (inputs(200, 130, h=1, g=3, keep=None), {"q_start": -20}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", ["interpret", "triton_interpret"])
def test_kernel_equals_reference(name, implementation):
    arrays, options = CASES[name]
    if name == "part":
        arrays = (*arrays[:3], arrays[3].at[:, :, :256].set(-jnp.inf))
    blocks = {} if name == "dense" or "triton" in implementation else {"blocks": BLOCKS}
    got = results(arrays, implementation, **options, **blocks)
    for x, expected in zip(got, results(arrays, "reference", **options)):
        assert x.dtype == expected.dtype
        np.testing.assert_allclose(x, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", ["interpret", "triton_interpret"])
def test_kernel_equals_reference_in_bfloat16(implementation):
    arrays, options = inputs(257, 257, h=1, dtype=jnp.bfloat16), {"keep_window": 64}
    got = results(arrays, implementation, **options)
    exact = results([x.astype(jnp.float32) for x in arrays], "reference", **options)
    for x, expected in zip(got, exact):
        np.testing.assert_allclose(np.float32(x), expected, atol=2e-2 * max(1, float(jnp.abs(expected).max())))


def test_parts_merge_to_the_whole():
    """Also where the older part holds nothing that some queries see."""
    q, k, v, keep = inputs(150, 290, h=1, keep="hard")
    keep = keep.at[:, :, :150].set(-jnp.inf)
    run = jax.jit(
        functools.partial(evict_attention, keep_window=40, implementation="interpret", blocks=BLOCKS),
        static_argnames="q_start",
    )
    parts = []
    for at in (slice(None, 150), slice(150, None)):
        parts.append(run(q, *(x[:, :, at] for x in (k, v, keep)), q_start=140 - (at.start or 0)))
    empty = [np.mean(np.asarray(lse) < -1e29) for _, lse in parts]
    assert 0 < empty[0] < 1 and 0 < empty[1] < 1
    top = jnp.maximum(parts[0][1], parts[1][1])
    weights = [jnp.exp(lse - top) for _, lse in parts]
    merged = sum(w[..., None] * out for w, (out, _) in zip(weights, parts)) / sum(weights)[..., None]
    expected, lse = evict_attention(q, k, v, keep, keep_window=40, q_start=140, implementation="reference")
    np.testing.assert_allclose(merged, expected, atol=2e-6)
    np.testing.assert_allclose(top + jnp.log(sum(weights)), lse, atol=2e-6)


def test_queries_that_see_nothing():
    q, k, v = inputs(130, 130, h=1, keep=None)
    keep = jnp.full((1, 1, 130), -jnp.inf)
    arrays, options = (q, k, v, keep), {"keep_window": 0, "q_start": 60}
    out, lse, *gradients = results(arrays, "interpret", **options)
    assert not np.any(out[:, :, :, 70:]) and np.all(lse[..., 70:] == np.float32(NOTHING))
    assert np.any(out[:, :, :, :70]) and np.all(lse[..., :70] > -100)
    for x, expected in zip(gradients, results(arrays, "reference", **options)[2:]):
        np.testing.assert_allclose(x, expected, atol=2e-5)


def test_no_races(capfd):
    """In the simulator of a TPU's memories, which fills them with NaN; two steps add to the same queries."""
    arrays = inputs(256, 384, h=1, k=8)
    options = {"keep_window": 30, "q_start": 128}
    blocks = Blocks(q_block=128, k_block=128, q_tile=64, k_tile=128)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        got = results(arrays, "tpu", **options, blocks=blocks)
    assert "RACE" not in "".join(capfd.readouterr())
    for x, expected in zip(got, results(arrays, "reference", **options)):
        np.testing.assert_allclose(x, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("window", [None, 220])
def test_plan_says_what_a_mask_says(segments, window):
    """No tile with something to see is left out, and no tile with something to hide counts as whole."""
    t, s, start = 300, 420, jnp.asarray([110, -40])
    seg = documents([250, 1, 30, 110, 29], [380, 40])
    pair = (seg[:, 120:], seg) if segments else None
    padded = None if pair is None else tuple(jnp.pad(x, ((0, 0), (0, -x.shape[1] % 256))) for x in pair)
    made = plan.make(start, t, s, padded, None, 1, window, 0, Blocks(256, 256, 64, 128))
    made = plan.Plan(*map(np.asarray, made))
    distance = (np.asarray(start)[:, None] + np.arange(t))[:, :, None] - np.arange(s)
    seen = (distance >= 0) & (distance < (window or 10**9))
    if segments:
        q_seg = np.asarray(pair[0])[:, :, None]
        seen &= (q_seg == np.asarray(pair[1])[:, None, :]) & (q_seg > 0)
    seen = np.pad(seen, ((0, 0), (0, 512 - t), (0, 512 - s))).reshape(2, 8, 64, 4, 128)
    some, whole = seen.any((2, 4)), seen.all((2, 4))
    tiles = np.arange(4)
    inside = (made.first[..., None] <= tiles) & (tiles < made.end[..., None])
    assert not np.any(some & ~inside)
    called_whole = (made.whole[..., None] <= tiles) & (tiles < made.whole_end[..., None])
    assert not np.any(called_whole[:, :4] & ~whole[:, :4])
    assert np.any(called_whole) and np.any(~inside)
    blocks = np.arange(2)
    held = (made.block_first[..., None] <= blocks) & (blocks < made.block_end[..., None])
    by_block = some.reshape(2, 2, 4, 2, 2).any((2, 4))
    assert not np.any(by_block & ~held)
    wanted = (made.q_first[..., None] <= blocks) & (blocks < made.q_end[..., None])
    assert not np.any(by_block.swapaxes(1, 2) & ~wanted)


def test_wrong_input_is_named():
    q, k, v, keep = inputs(8, 8)
    for match, call in {
        "q_bhgtk": lambda: evict_attention(q[0], k, v),
        "v_bhsk": lambda: evict_attention(q, k, v[:, :, :7]),
        "k_bhsk: expected bfloat16 or float32": lambda: evict_attention(q, k.astype(jnp.bfloat16), v),
        "keep_bhs": lambda: evict_attention(q, k, v, keep[:, :1]),
        r"segments\[1\]": lambda: evict_attention(q, k, v, segments=(documents([8]), documents([7]))),
        "q_start": lambda: evict_attention(q, k, v, q_start=jnp.zeros(3, jnp.int32)),
        "keep_window, window": lambda: evict_attention(q, k, v, window=0),
        "no axis of length 0": lambda: evict_attention(q[:, :, :, :0], k, v),
        "implementation": lambda: evict_attention(q, k, v, implementation="cuda"),
        "whole tiles": lambda: Blocks(128, 128, 100, 128),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tuned_blocks_are_whole_and_fit(dtype):
    for t, s, g in ((1, 1, 1), (5, 300, 8), (130, 130, 3), (4096, 131072, 4), (2048, 2048, 16)):
        blocks = tuning.blocks(t, s, g, jnp.dtype(dtype))
        assert blocks.q_block % 128 == 0 and blocks.q_block * g <= max(2048, 256 * g)
        assert blocks.k_block <= 2048


def test_kernels_lower_for_tpu():
    """The block shapes and primitives are those that a TPU has (a compiler has the last word: `make aot`)."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=types, abstract_device=device)
    for name in ("8b_packed_grad", "8b_part"):
        run, shapes = specs.tpu()[name]
        with jax.sharding.use_abstract_mesh(mesh):
            text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
        assert "tpu_custom_call" in text


def test_memory_is_linear():
    for name in ("8b", "8b_grad"):
        case = specs.CASES["8b"]._replace(t=8192, s=8192, h=1, g=1, k=8)
        run = case.call("reference")
        loss = jax.grad(lambda *x, run=run: run(*x)[0].astype(jnp.float32).sum()) if "grad" in name else run
        compiled = jax.jit(loss).lower(*case.shapes().values()).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 8192 * 8192
