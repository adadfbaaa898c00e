"""A memory on disk: whatever happens while one writes, it is what it was before or after; damage is named."""

import dataclasses
import errno
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from atom_jax.__main__ import main
from atom_jax.kvcache.lasting.levels import Law, lines
from atom_jax.lasting import store
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.store import MANIFEST, Store
from atom_jax.typing import AtomError
from tests.lasting import disk


@pytest.fixture
def memory(tmp_path):
    return disk.filled(tmp_path / "m")


def steps(monkeypatch, stop):
    """Replaces what changes the disk by the same that counts, and fails at number `stop`."""
    count = iter(range(10**6))

    def counted(real):
        def step(*args, **kwargs):
            if next(count) == stop:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return step

    for place, name in ((store.os, "replace"), (store.os, "fsync"), (store.os, "unlink"), (store, "write_file")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    return count


@pytest.mark.parametrize("act", ["add", "forget"])
def test_a_disk_that_refuses_at_any_step_leaves_before_or_after(memory, tmp_path, monkeypatch, act):
    def change(path):
        return disk.add(path, 2, 9) if act == "add" else Memory.open(path).forget("s0")

    before, seen, stop = disk.content(memory), set(), 0
    whole = shutil.copytree(memory, tmp_path / "whole")
    change(whole)
    after = disk.content(whole)
    assert before != after
    while True:
        path = shutil.copytree(memory, tmp_path / f"at{stop}")
        with monkeypatch.context() as patch:
            steps(patch, stop)
            try:
                change(path)
                done = True
            except AtomError as e:
                done = False
                assert "No space left" in str(e)
        found = disk.content(path)
        assert found in (before, after)
        seen.add(found == after)
        if done:
            break
        # Another writer goes on from there, and clears up.
        if found == before:
            change(path)
        else:
            with Memory.open(path)._writing():
                pass
        assert disk.content(path) == after
        assert {p.name for p in path.iterdir()} == {*Store(path).manifest().files, MANIFEST, ".lock"}
        stop += 1
    assert stop > 10 and seen == {False, True}


def test_nothing_that_the_manifest_does_not_name_is_left(memory):
    (memory / ".new-seg-00000001.safetensors").write_bytes(b"half")
    (memory / "seg-99999999.safetensors").write_bytes(b"lost")
    Memory.open(memory).verify()
    disk.add(memory, 2, 3)
    assert not list(memory.glob(".new-*")) and not (memory / "seg-99999999.safetensors").exists()


def test_one_writes_and_many_look(memory):
    reader = Memory.open(memory)
    first = reader.entries()
    with Store(memory).lock(), pytest.raises(AtomError, match="belongs to another run, process"):
        disk.add(memory, 2, 1)
    disk.add(memory, 2, 40)
    # Its files are gone, so it looks at what took their place.
    assert len(reader.entries()) != len(first) and len(reader.sources) == 3


def test_what_is_forgotten_is_nowhere(memory):
    entries = disk.random_entries(0, 18, 1)
    needles = [entries.k[layer, 0, i].tobytes() for layer in range(2) for i in range(18)]
    held = lambda: sum(n in p.read_bytes() for p in memory.iterdir() for n in needles)  # noqa: E731
    before = Memory.open(memory)
    spans = [(s.level, s.start, s.end) for s in before._manifest.segments]
    assert held() > 0
    assert before.forget("s1") == 18
    after = Memory.open(memory)
    assert held() == 0 and [s.name for s in after.sources] == ["s0"]
    assert [(s.level, s.start, s.end) for s in after._manifest.segments] == spans
    assert all((e.source == 0).all() for e in after.entries())
    with pytest.raises(AtomError, match="has no source 's1'; it has read s0"):
        after.forget("s1")
    after.forget("s0")
    assert Memory.open(memory).length == 0 and Memory.open(memory).verify() > 0
    disk.add(memory, 5, 9)
    assert Memory.open(memory).length > 0


def test_forgetting_where_heads_differ_leaves_equal_numbers(tmp_path):
    path = disk.make(tmp_path / "m", dataclasses.replace(disk.SETTINGS, codec="int8"))
    disk.add(path, 0, 7, heads=True)
    disk.add(path, 1, 14, heads=True)
    memory = Memory.open(path)
    memory.forget("s0")
    for entries in memory.entries():
        assert (entries.source == 1).all() and entries.place.shape == entries.k.shape[:3]
        assert (np.diff(entries.place, axis=-1) > 0).all()


def edited(path, **fields):
    data = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(data | fields))


def damage(kind, path):
    segment = sorted(path.glob("seg-*"))[0]
    data = bytearray(segment.read_bytes())
    if kind == "flipped":
        data[-3] ^= 4
        segment.write_bytes(data)
    elif kind == "truncated":
        segment.write_bytes(data[:-5])
    elif kind == "header":
        segment.write_bytes(data[:40])
    elif kind == "missing":
        segment.unlink()
    elif kind == "swapped":
        shutil.copy(sorted(path.glob("tail-*"))[0], segment)
    elif kind == "pickle":
        segment.write_bytes(b"\x80\x04.")
    elif kind == "format":
        edited(path, format=2)
    elif kind == "field":
        edited(path, colour="red")
    elif kind == "elsewhere":
        edited(path, tail="../../etc/passwd")
    elif kind == "not JSON":
        (path / MANIFEST).write_text("{")
    elif kind == "entries":
        segments = json.loads((path / MANIFEST).read_text())["segments"]
        edited(path, segments=[{**segments[0], "entries": 4}, *segments[1:]])
    elif kind == "levels":
        edited(path, segments=json.loads((path / MANIFEST).read_text())["segments"][1:])


@pytest.mark.parametrize("kind, message", [
    ("flipped", "tensor '.*' is not what was written: its checksum differs"), ("truncated", "truncated|not a valid"),
    ("header", "not a whole safetensors file"), ("missing", "is missing, and MEMORY.json names it"),
    ("swapped", "holds entries of shape|missing|unknown"), ("pickle", "not a whole safetensors file"),
    ("format", "this version reads format 1, not 2"), ("field", "unknown field 'colour'"),
    ("elsewhere", "is no name of a file of a memory"), ("not JSON", "not valid JSON"),
    ("entries", "which the manifest does not name"), ("levels", "is not as the law has it"),
])  # fmt: skip
def test_damage_is_named(memory, kind, message):
    damage(kind, memory)
    with pytest.raises(AtomError, match=message) as e:
        Memory.open(memory).verify()
    assert str(memory) in str(e.value) or "MEMORY.json" in str(e.value)


def test_manifests_with_other_values_are_refused_or_read(memory):
    whole, rng = json.loads((memory / MANIFEST).read_text()), np.random.default_rng(0)
    others = (-1, 0, 1, 3, 10**6, 2**40, 1e300, None, True, "", "seg-x", "../x", [], {}, [1], {"id": 1})
    refused = 0

    def places(value, path=()):
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        yield from ([path] if path else [])
        for key, one in inside:
            yield from places(one, (*path, key))

    everywhere = list(places(whole))
    for _ in range(300):
        data = json.loads(json.dumps(whole))
        *path, key = everywhere[rng.integers(len(everywhere))]
        place = data
        for step in path:
            place = place[step]
        place[key] = others[rng.integers(len(others))]
        (memory / MANIFEST).write_text(json.dumps(data))
        try:
            found = Memory.open(memory)
            found.stats()
            found.verify()
        except AtomError as e:
            refused += 1
            assert len(str(e)) < 300
    assert refused > 150


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AtomError, match=r"holds a\.txt, and no memory"):
        Memory.open(tmp_path / "letters")
    with pytest.raises(AtomError, match="is a file"):
        Memory.open(tmp_path / "file")
    with pytest.raises(AtomError, match="there is no memory"):
        Memory.open(tmp_path / "new")
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["a.txt"] and not (tmp_path / "new").exists()


def test_a_commit_needs_room(memory, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(AtomError, match="bytes are to be written, and 10 are free"):
        disk.add(memory, 2, 9)


def test_a_picture_of_growth(tmp_path):
    law = Law(0.5, 3, 4)
    tokens, held = lines(law, 4099)
    assert tokens[0] == 0 and tokens[-1] == 4099 and (np.diff(tokens) > 0).all() and len(tokens) > 500
    assert held.tolist() == [law.held(int(n)) for n in tokens] and (held < tokens + 1).all()
    path = disk.make(tmp_path / "m")
    disk.add(path, 0, 50)
    assert main(["atom_jax", "info", str(path), f"--out={tmp_path}/g.png"]) == 0
    with Image.open(tmp_path / "g.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for color in ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00], [0x99, 0x99, 0x99]):
        assert (np.abs(pixels - color).sum(1) < 30).any()
