"""Sprites that fly, rest, and fly on: a stream of pixels in which long stretches hold nothing new."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from atom_jax import config
from atom_jax.data.envs.environment import Environment
from atom_jax.typing import AtomError

_SPRITE = 8  # pixels of a side of a sprite
_FASTEST = 2  # pixels per frame and axis


@struct.dataclass
class State:
    """which i32 [k], the sprites; there bool [k], whether they are; at and speed i32 [k, 2], row and column, in
    pixels and pixels per frame; moving bool; left i32, the frames that it stays so; event bool."""

    which: jax.Array
    there: jax.Array
    at: jax.Array
    speed: jax.Array
    moving: jax.Array
    left: jax.Array
    event: jax.Array


@config.register
@dataclasses.dataclass(frozen=True)
class Video(Environment):
    """size: pixels of a side. most: from 1 to so many sprites fly, straight on, each by up to 2 pixels per frame
    along each axis, and bounce off the borders. Together they fly for `flight_least` to `flight_most` frames, rest
    for `rest_least` to `rest_most`, and suddenly fly on with other speeds. glyphs: what sprites show, drawn in 8x8
    pixels with DejaVu Sans Bold. Nobody acts: there is one action, and no reward.

    A frame is an event where flying begins or ends. Sprites that overlap show the brighter pixel.
    """

    size: int = 32
    most: int = 3
    flight_least: int = 8
    flight_most: int = 24
    rest_least: int = 8
    rest_most: int = 64
    glyphs: str = "0123456789"

    name: ClassVar[str] = "video"
    actions: ClassVar[int] = 1
    classes: ClassVar[int] = 0
    frames: ClassVar[int] = 128

    def __post_init__(self):
        length = (1, 2**20)
        lengths = ("flight_least", "flight_most", "rest_least", "rest_most")
        config.check(self, size=(_SPRITE + 2 * _FASTEST, 512), most=(1, 16), **dict.fromkeys(lengths, length))
        if not self.glyphs:
            raise AtomError("glyphs: expected at least one character")
        for name in ("flight", "rest"):
            if getattr(self, f"{name}_least") > getattr(self, f"{name}_most"):
                raise AtomError(f"{name}_least: more than {name}_most")
        sprites(self.glyphs)

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `Environment.shape`."""
        return self.size, self.size, 1

    def reset(self, key: jax.Array) -> tuple[State, jax.Array]:
        """See `Environment.reset`."""
        which, number, at, fly = jax.random.split(key, 4)
        there = jnp.arange(self.most) < jax.random.randint(number, (), 1, self.most + 1)
        places = jax.random.randint(at, (self.most, 2), 0, self.size - _SPRITE + 1)
        speed, left = self._flight(fly)
        shown = jax.random.randint(which, (self.most,), 0, len(self.glyphs))
        yes = jnp.ones((), bool)
        state = State(shown, there, places, speed, yes, left, yes)
        return state, self._seen(state)

    def step(self, key: jax.Array, state: State, action: jax.Array) -> tuple[State, jax.Array, jax.Array, jax.Array]:
        """See `Environment.step`."""
        fly, rest = jax.random.split(key)
        speed, flight = self._flight(fly)
        pause = jax.random.randint(rest, (), self.rest_least, self.rest_most + 1)
        turns = state.left == 0
        moving = state.moving ^ turns
        left = jnp.where(turns, jnp.where(moving, flight, pause), state.left) - 1
        speed = jnp.where(turns & moving, speed, state.speed)
        room = self.size - _SPRITE
        at = state.at + speed * moving
        speed = jnp.where((at < 0) | (at > room), -speed, speed)
        at = jnp.abs(at)
        at = jnp.where(at > room, 2 * room - at, at)
        state = State(state.which, state.there, at, speed, moving, left, turns)
        return state, self._seen(state), jnp.float32(0), jnp.zeros((), bool)

    def _flight(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Speeds i32 [k, 2], none of which is 0 along both axes; frames of the flight, i32."""
        direction, frames = jax.random.split(key)
        every = [(r, c) for r in range(-_FASTEST, _FASTEST + 1) for c in range(-_FASTEST, _FASTEST + 1) if r or c]
        drawn = jax.random.randint(direction, (self.most,), 0, len(every))
        return jnp.array(every)[drawn], jax.random.randint(frames, (), self.flight_least, self.flight_most + 1)

    def _seen(self, state: State) -> jax.Array:
        """The frame, f32 [size, size, 1]."""
        images = jnp.asarray(sprites(self.glyphs))[state.which] * state.there[:, None, None]
        empty = jnp.zeros((self.size, self.size))
        place = lambda image, at: jax.lax.dynamic_update_slice(empty, image, (at[0], at[1]))  # noqa: E731
        return jax.vmap(place)(images, state.at).max(0)[..., None]


@functools.lru_cache
def sprites(glyphs: str) -> np.ndarray:
    """Characters as pictures, f32 [n, 8, 8] in [0, 1]. Raises AtomError for one that the font does not have, or that
    cannot be seen."""
    from matplotlib import font_manager
    from PIL import Image, ImageDraw, ImageFont

    path = font_manager.findfont("DejaVu Sans:bold")
    known = font_manager.get_font(path)
    font = ImageFont.truetype(path, 8 * _SPRITE)
    out = np.zeros((len(glyphs), _SPRITE, _SPRITE), np.float32)
    for i, glyph in enumerate(glyphs):
        left, top, right, bottom = font.getbbox(glyph)
        if not known.get_char_index(ord(glyph)) or right <= left or bottom <= top:
            raise AtomError(f"glyphs: {glyph!r} cannot be drawn")
        picture = Image.new("L", (right - left, bottom - top))
        ImageDraw.Draw(picture).text((-left, -top), glyph, fill=255, font=font)
        out[i] = np.asarray(picture.resize((_SPRITE, _SPRITE), Image.Resampling.BOX), np.float32) / 255
    return out
