"""What the benchmark of world models aims at, and its table and picture, from results that are made up."""

import copy

import pytest
from PIL import Image

from atom_jax.typing import AtomError
from benchmarks import command, world_tables, world_targets

ROW = {
    "success": 0.9, "interval": [0.85, 0.93], "wrong": 0.05, "ceiling": 0.95, "simulator": 0.94, "random": 0.2,
    "main_steps_watch": 4.0, "main_steps_decision": 0.5, "main_steps_imagined": 0.05, "units": 4.0, "futures": 256.0,
    "bytes": 3e4, "bytes_future": 1e3, "mflop": 0.3, "seconds": 2.0,
}  # fmt: skip
EVERY = ROW | {"main_steps_watch": 40.0, "main_steps_decision": 1.0, "main_steps_imagined": 5.0, "units": 41.0}
EVERY |= {"success": 0.88, "mflop": 100.0}
FOUND = {
    "lengths": [40, 160], "episodes": 200, "train_seconds": {"watch": [300.0, None], "watch_every": [None]},
    "secret_right": {"watch": [1.0, 1.0], "watch_every": [1.0, 0.97]},
    "rows": {
        "watch": [[ROW, ROW | {"units": 4.4, "main_steps_watch": 4.4}]] * 2, "watch_every": [[EVERY, EVERY]],
        "watch_every, tova": [[EVERY | {"units": 4.0}] * 2],
        "watch_every, random": [[EVERY | {"success": 0.3}] * 2],
        "watch_fixed": [[ROW | {"success": 0.4}] * 2],
        "watch_change": [[ROW | {"units": 35.0}] * 2],
    },
}  # fmt: skip
# Of every target: whose figure, after which watch, makes it fail.
FAILS = {
    "below the ceiling": ("watch", 0, "ceiling", 1.01), "below the simulator's": ("watch", 0, "simulator", 1.01),
    "main steps per frame": ("watch", 0, "main_steps_watch", 7.0),
    "per imagined future": ("watch", 0, "main_steps_imagined", 0.11), "entries": ("watch_every", 0, "units", 20.0),
    "below that after 40": ("watch", 1, "success", 0.79),
    "as a multiple of those of 40": ("watch", 1, "main_steps_watch", 6.0),
    "40 frames: success below every frame's": ("watch_every", 0, "success", 0.96),
    "160 frames: success below every frame's": ("watch_every", 1, "success", 0.91),
    "40 frames: success above fixed": ("watch_fixed", 0, "success", 0.76),
    "160 frames: success above fixed": ("watch_fixed", 1, "success", 0.76),
    "40 frames: success far above fixed": ("watch_fixed", 0, "success", 0.6),
    "160 frames: success far above fixed": ("watch_fixed", 1, "success", 0.6),
    "40 frames: success below the best cache's": ("watch_every, random", 0, "success", 0.91),
    "160 frames: success below the best cache's": ("watch_every, tova", 1, "success", 0.91),
    "of the watch, as a share of the best": ("watch_every, tova", 0, "main_steps_watch", 20.0),
    "of a decision, as a share of the best": ("watch_every, tova", 0, "main_steps_imagined", 1.0),
    "as a share of changes": ("watch_change", 0, "units", 20.0), "operations": ("watch", 0, "mflop", 1.0),
    "memory of one more future": ("watch", 1, "bytes_future", 1.1e3),
}  # fmt: skip


def changed(name, i, column, value):
    found = copy.deepcopy(FOUND)
    for seed in found["rows"][name]:
        seed[i][column] = value
    return found


def test_every_target_is_reached_or_not():
    rows = world_targets.targets(FOUND)
    assert [row["target"] for row in rows if not row["holds"]] == []
    assert all(("most" in row) != ("least" in row) for row in rows)
    found = copy.deepcopy(FOUND)
    found["secret_right"]["watch_every"][0] = 0.94
    assert [row["target"] for row in world_targets.targets(found) if not row["holds"]] == [
        "every frame a unit: knows what is hidden"
    ]


@pytest.mark.parametrize("part", FAILS)
def test_a_target_can_be_missed(part):
    (row,) = [row for row in world_targets.targets(changed(*FAILS[part])) if part in row["target"]]
    assert row["holds"] is False
    assert len(FAILS) + 1 == len(world_targets.TARGETS)


def test_what_was_not_measured_is_said():
    found = copy.deepcopy(FOUND) | {"lengths": [40]}
    for name in ("watch_change", "watch_every, tova", "watch_every, random", "watch_every"):
        del found["rows"][name]
    rows = {row["target"]: row for row in world_targets.targets(found)}
    assert sum(row["holds"] is True for row in rows.values()) == 7
    assert all(row["value"] is None for row in rows.values() if row["holds"] is None)
    lines = world_targets.table(list(rows.values())).splitlines()
    assert "| 40 frames: main steps per frame | 0.167 |  | 0.100 | holds |" in lines
    assert "| 40 frames: units, as a share of changes | 0.167 |  |  | not measured |" in lines


def test_table_and_picture(tmp_path):
    lines = world_tables.table(FOUND).splitlines()
    assert lines[0] == "Watches of 40 frames; ceiling 0.950, simulator 0.940, random 0.200:"
    assert any(
        line.startswith("| watch | 0.900 (0.900 0.900) |") and "| 4.0 (0.10) | 30 + 1.0 |" in line for line in lines
    )
    path = tmp_path / "plan.png"
    world_tables.draw(FOUND, str(path))
    assert Image.open(path).size[0] > 100


@pytest.mark.parametrize("texts", [["40", "long"], [], ["2"], ["-40"]])
def test_lengths_are_numbers_of_frames(texts):
    assert command.numbers("lengths", ["160", "40"], "frames", 3) == (160, 40)
    with pytest.raises(AtomError, match=f"--lengths={','.join(texts)}: expected frames of at least 3"):
        command.numbers("lengths", texts, "frames", 3)


@pytest.mark.parametrize("names", [[], ["watch", "every"]])
def test_variants_take_part_once_and_watch_first(names):
    assert world_tables.variants(["watch_every", "watch", "watch"]) == ["watch", "watch_every"]
    with pytest.raises(AtomError, match=r"--variants: '(every)?' is none of watch,"):
        world_tables.variants(names)
