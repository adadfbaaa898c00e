"""Flying sprites: straight on, off the borders, with rests; and nothing else happens."""

import itertools

import jax
import numpy as np
import pytest

from atom_jax.data.envs import Video, episodes, parse
from atom_jax.data.envs.video import sprites
from atom_jax.typing import AtomError

ENV = Video(size=16, most=1, flight_least=3, flight_most=9, rest_least=2, rest_most=5, glyphs="AB")
FRAMES = 60


@pytest.fixture(scope="module")
def frames():
    return jax.device_get(jax.jit(lambda key: episodes(ENV, key, 6, FRAMES)[0])(jax.random.key(0)))


# From the pixels of a frame to the sprite, its row and its column.
PLACES = {
    np.pad(sprites("AB")[i], ((r, 8 - r), (c, 8 - c))).tobytes(): (i, r, c)
    for i, r, c in itertools.product(range(2), range(9), range(9))
}


def flies(at, speed):
    """Whether a flight of positions [t, 2] began with this speed; of what leaves on one side the rest leads back."""
    for before, after in itertools.pairwise(at):
        to = before + speed
        speed = np.where((to < 0) | (to > 8), -speed, speed)
        if (after != 8 - np.abs(8 - np.abs(to))).any():
            return False
    return True


def test_it_flies_straight_on_bounces_and_rests(frames):
    assert frames.obs.shape == (6, FRAMES, 16, 16, 1) and frames.obs.dtype == np.float32
    speeds = [np.array(s) for s in itertools.product(range(-2, 3), repeat=2) if any(s)]
    lengths = {True: set(), False: set()}
    for obs, marks in zip(frames.obs[..., 0], frames.marks):
        which, *at = np.array([PLACES[picture.tobytes()] for picture in obs]).T
        at, moving = np.stack(at, 1), True
        assert (which == which[0]).all() and marks[0]
        # A flight ends at the last frame before a mark, and so does a rest.
        edges = [0, *(np.flatnonzero(marks)[1:] - 1).tolist()]
        for start, end in itertools.pairwise([*edges, FRAMES - 1]):
            part = at[start : end + 1]
            assert any(flies(part, s) for s in speeds) if moving else (part == part[0]).all()
            if end < FRAMES - 1:
                lengths[moving].add(end - start)
            moving = not moving
    assert {3, 9} <= lengths[True] <= set(range(3, 10)) and {2, 5} <= lengths[False] <= set(range(2, 6))
    assert not frames.reward.any() and not frames.done.any() and not frames.action.any()


def test_several_sprites():
    env = Video(size=32, most=3)
    obs, state = jax.device_get(
        jax.jit(jax.vmap(lambda key: env.reset(key)[::-1]))(jax.random.split(jax.random.key(1), 40))
    )
    seen = state.there.sum(1)
    assert set(seen) == {1, 2, 3}
    for i in range(40):
        expected = np.zeros((32, 32), np.float32)
        for k in range(seen[i]):
            (r, c), image = state.at[i, k], sprites(env.glyphs)[state.which[i, k]]
            expected[r : r + 8, c : c + 8] = np.maximum(expected[r : r + 8, c : c + 8], image)
        np.testing.assert_array_equal(obs[i, ..., 0], expected)
    picture = env.render(obs[0])
    assert picture.shape == (32, 32, 3) and picture.max() == np.rint(obs[0].max() * 255)


def test_glyphs():
    drawn = sprites("0123456789")
    assert drawn.shape == (10, 8, 8) and drawn.min() == 0 and len(np.unique(drawn.reshape(10, -1), axis=0)) == 10
    wrong = {
        "video:glyphs=\N{CJK UNIFIED IDEOGRAPH-4E2D}": "cannot be drawn",
        "video:rest_least=9,rest_most=8": "rest_least: more than", "video:size=8": "size: expected",
        "video:glyphs=": "at least one",
    }  # fmt: skip
    for text, message in wrong.items():
        with pytest.raises(AtomError, match=message):
            parse(text)
    with pytest.raises(AtomError, match="' ' cannot be drawn"):
        Video(glyphs="0 1")
