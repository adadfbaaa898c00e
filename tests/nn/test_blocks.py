"""Long axes in blocks."""

import numpy as np
import pytest

from atom_jax.nn.blocks import in_blocks


@pytest.mark.parametrize("shape, axis", [((7,), 0), ((2, 7, 3), 1), ((2, 3, 6), 2)])
@pytest.mark.parametrize("mode", ["constant", "edge"])
def test_blocks_hold_all_entries_in_order(shape, axis, mode):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    out = np.asarray(in_blocks(x, axis, 3, mode))
    assert out.shape == (-(-shape[axis] // 3), *shape[:axis], 3, *shape[axis + 1 :])
    flat = np.concatenate(list(out), axis)
    t = shape[axis]
    np.testing.assert_array_equal(flat.take(range(t), axis), x)
    rest = flat.take(range(t, flat.shape[axis]), axis)
    np.testing.assert_array_equal(rest, x.take([t - 1] * rest.shape[axis], axis) if mode == "edge" else 0 * rest)
