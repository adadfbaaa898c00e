"""Pictures of streams of frames, imagined futures and plans: what they show is what they were given."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from atom_jax.evaluation.reports import frame_strip, future_picture, plan_picture
from atom_jax.evaluation.reports.frame_strip import Strip
from atom_jax.evaluation.reports.future_picture import Imagination
from atom_jax.evaluation.reports.plan_picture import Point
from atom_jax.typing import AtomError

RNG = np.random.default_rng(0)
RED, GREEN = (255, 0, 0), (0, 255, 0)


def has(path, color):
    with Image.open(path) as found:
        assert found.size[0] > 100
        return (np.asarray(found.convert("RGB")).astype(int) == np.array(color)).all(-1).sum()


def strip(t, begins, **more):
    frames = np.zeros((t, 8, 8, 3), np.uint8)
    frames[-1] = RED
    marks = np.zeros(t, bool)
    marks[list(begins)] = True
    return Strip(frames, marks, **more)


def test_units_of_frames_as_text():
    surprise = np.array([2.5, 0, 0, 1.25, 0], np.float32)
    found = strip(5, (0, 3), surprise=surprise, threshold=1.0)
    assert found.spans == [(0, 3), (3, 5)]
    assert frame_strip.render(found).splitlines() == [
        "frames  number  surprise", "   0-2       3      2.50", "   3-4       2      1.25",
        "2 units of 5 frames: 2.5 frames per unit",
    ]  # fmt: skip
    # What comes before the first mark is a unit as well, and without a surprise there is none to show.
    assert strip(5, (2,)).spans == [(0, 2), (2, 5)] and strip(5, ()).spans == [(0, 5)]
    assert frame_strip.render(strip(5, ())).splitlines()[0] == "frames  number"


def test_frame_strip(tmp_path):
    surprise = RNG.random(30).astype(np.float32)
    path = tmp_path / "strip.png"
    frame_strip.draw(strip(30, (0, 7, 29), surprise=surprise, threshold=0.5), path)
    assert has(path, RED) > 100
    frame_strip.draw(strip(30, (0, 7, 29)), path)
    assert has(path, RED) > 100
    # Of a stream that is too long for a picture the end is not there.
    frame_strip.draw(strip(300, (0,)), path)
    assert has(path, RED) == 0
    with pytest.raises(AtomError, match=r"end in \.png$"):
        frame_strip.draw(strip(3, (0,)), tmp_path / "strip.gif")


def imagination(n=3, h=4):
    futures = np.zeros((n, h, 8, 8, 3), np.uint8)
    futures[1, 2] = GREEN
    real = np.zeros((h, 8, 8, 3), np.uint8)
    real[1] = RED
    return Imagination(futures, np.arange(n, dtype=np.float32), real, 1, [["up"] * h] * n)


def test_futures_as_a_strip(tmp_path):
    path = tmp_path / "futures.png"
    future_picture.draw(imagination(), path)
    assert has(path, RED) > 100 and has(path, GREEN) > 100
    framed = has(path, (214, 39, 40))
    future_picture.draw(dataclasses.replace(imagination(), chosen=None, real=None), path)
    assert has(path, RED) == 0 and has(path, (214, 39, 40)) == 0 < framed


def test_futures_move(tmp_path):
    path = tmp_path / "futures.gif"
    said = imagination()
    assert [label for label, _ in said.rows] == ["real", "0.00", "1.00", "2.00"] and said.framed == 2
    future_picture.draw(said, path)
    with Image.open(path) as found:
        assert found.n_frames == 4 and found.info["loop"] == 0
        shown = []
        for t in range(4):
            found.seek(t)
            frame = np.asarray(found.convert("RGB")).astype(int)
            shown.append([(np.abs(frame - color).max(-1) < 40).sum() > 5000 for color in (RED, GREEN)])
    assert shown == [[False, False], [True, False], [False, True], [False, False]]


def test_futures_that_cannot_be_shown(tmp_path):
    with pytest.raises(AtomError, match=r"PNG or GIF.*\.png or \.gif$"):
        future_picture.draw(imagination(), tmp_path / "a.jpg")
    with pytest.raises(AtomError, match="17 futures of 4 steps"):
        future_picture.draw(imagination(n=17), tmp_path / "a.gif")
    with pytest.raises(AtomError, match="3 futures of 17 steps"):
        future_picture.draw(imagination(h=17), tmp_path / "a.png")
    with pytest.raises(AtomError, match="cannot be written"):
        future_picture.draw(imagination(), tmp_path / "none" / "a.gif")


def test_plans(tmp_path):
    points = [
        Point("a unit per frame", 40, 0.8, 0.7, 0.9),
        Point("none", 0, 0.3, 0.2, 0.4),
        Point("chance", None, 0.25, 0.2, 0.3),
    ]
    path = tmp_path / "plan.png"
    plan_picture.draw({"W = 40": points, "W = 160": points[:1]}, path)
    with Image.open(path) as found:
        assert found.size[0] > found.size[1]
    with pytest.raises(AtomError, match=r"end in \.png$"):
        plan_picture.draw({"W = 40": points}, tmp_path / "plan.pdf")
