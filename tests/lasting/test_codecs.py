"""How entries are stored: what every codec of the table gives back, and one that is learned from what is held."""

import dataclasses
import json

import numpy as np
import pytest

from atom_jax.__main__ import main
from atom_jax.lasting import codec as codecs
from atom_jax.lasting import vq
from atom_jax.lasting.blocks import Blocks, Entries
from atom_jax.lasting.codec import CODECS, Learned
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.store import MANIFEST, Model, Source
from atom_jax.typing import AtomError
from tests.lasting import disk

# Two groups of channels, of which the second is not full.
MODEL = Model("llama", "0123456789abcdef", "float32", 2, 1, 12)


def entries(seed, n, source=0, size=12):
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(2, 1, n, size)).astype(np.float16) for _ in range(2))
    said = np.arange(n, dtype=np.int32)
    return Entries(k, v, rng.random(n, np.float32), said, np.full(n, source, np.int32))


def of(name, k, v):
    found = CODECS[name]
    return found.codec(found.fit(k, v), k.shape[3]) if isinstance(found, Learned) else found


@pytest.mark.parametrize(("name", "error", "smaller"), [
    ("float16", (0, 0), 0.99), ("int8", (0.02, 0.02), 1.7), ("binary", (0.7, 0.02), 2.5), ("vq", (0.6, 0.6), 10),
])  # fmt: skip
def test_what_comes_back(name, error, smaller):
    e = entries(0, 600, size=20)
    codec = of(name, e.k, e.v)
    stored = codec.encode(e.k, e.v)
    there = {n: (x.shape, x.dtype) for n, x in stored.items()}
    assert codec.misfit(e.k.shape, there) is None and codec.misfit((2, 1, 600, 31), there) is not None
    for old, new, most in zip((e.k, e.v), codec.decode(stored), error):
        off = np.square(old.astype(np.float32) - new).mean() / np.square(old.astype(np.float32)).mean()
        assert new.shape == old.shape and new.dtype == np.float16 and off**0.5 <= most
    again = codec.encode(*codec.decode(stored))
    if name != "int8":
        assert all(np.array_equal(again[n], stored[n]) for n in ("k", *codec.small - {"v_scale"}))
    assert (e.k.nbytes + e.v.nbytes) / sum(x.nbytes for x in stored.values()) > smaller
    part = {n: x[1:, :] for n, x in stored.items()}
    np.testing.assert_array_equal(codec.decode(part, (slice(1, 2), slice(0, 1)))[0], codec.decode(stored)[0][1:])


def test_the_table_is_tested():
    assert set(CODECS) == {"float16", "int8", "binary", "vq"}


def test_binary_keys_are_signs_and_their_mean():
    k = np.array([[[[1, -3, 0.5, -0.5, 2, 0, 1, -1, -4]]]], np.float16)
    stored = CODECS["binary"].encode(k, k)
    assert stored["k"].tolist() == [[[[0b10101110, 0]]]]
    found, scale = CODECS["binary"].decode(stored)[0], np.abs(k).astype(np.float32).mean()
    np.testing.assert_allclose(found, np.where(k >= 0, scale, -scale), rtol=1e-3)


def test_codes_are_what_k_means_finds_and_the_nearest_is_taken():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(256, 8)) * 4
    rows = (centres[rng.integers(0, 256, 3000)] + 0.01 * rng.normal(size=(3000, 8))).astype(np.float16)[None, None]
    codes = vq.fit(rows)
    assert codes.shape == (1, 1, 1, 256, 8) and codes.dtype == np.float16
    off = ((rows[0, 0, :, None].astype(np.float64) - codes[0, 0, 0]) ** 2).sum(-1)
    stored = vq.encode(rows, codes)
    np.testing.assert_array_equal(stored[0, 0, :, 0], off.argmin(1))
    # Less than one round of drawn rows would leave, and nothing where rows are few.
    drawn = rows[0, 0][rng.choice(3000, 256, replace=False)].astype(np.float64)
    assert off.min(1).mean() < 0.7 * ((rows[0, 0, :, None] - drawn) ** 2).sum(-1).min(1).mean()
    few = rows[:, :, :200]
    np.testing.assert_array_equal(vq.decode(vq.encode(few, vq.fit(few)), vq.fit(few), 8), few)


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(disk, "MODEL", MODEL)
    monkeypatch.setitem(CODECS, "vq", CODECS["vq"]._replace(least=12))


def made(path, parts):
    """A memory into which these entries were read, commit by commit; each is a source."""
    disk.make(path, dataclasses.replace(disk.SETTINGS, codec="vq"))
    for cuts in parts:
        memory = Memory.open(path)
        with memory._writing():
            m = memory._manifest
            blocks, new = Blocks(memory._store, m, memory._tail()[0]), Entries.joined(cuts)
            blocks.add(new)
            number = int(new.source[0])
            others = [s for s in m.sources if s.id != number]
            known = Source(number, f"s{number}", "0" * 64, len(new), 0, True)
            memory._write(blocks, (*others, known), m.window, {}, m.next, {})
    return path


def test_codes_are_the_same_however_reading_was_cut(soon, tmp_path):
    every = [entries(0, 37, 0), entries(1, 45, 1)]
    whole = made(tmp_path / "whole", [[e] for e in every])
    parts = [[e.cut(i, i + n)] for e, n in zip(every, (3, 7)) for i in range(0, len(e), n)]
    cut = made(tmp_path / "cut", parts)
    a, b = (Memory.open(path) for path in (whole, cut))
    assert a._manifest.codes and b._manifest.codes and a.verify() and b.verify()
    for name in ("codes", "tail"):
        first, second = (m._store.read(getattr(m._manifest, name)) for m in (a, b))
        assert first.keys() == second.keys() and all(np.array_equal(first[x], second[x]) for x in first)
    segments = [[m._store.read(s.file) for s in m._manifest.segments] for m in (a, b)]
    for first, second in zip(*segments, strict=True):
        assert first["k"].dtype == np.uint8 and first["k"].shape[3] == 2
        assert first.keys() == second.keys() and all(np.array_equal(first[x], second[x]) for x in first)
    # Before there are enough, nothing is lost.
    few = Memory.open(made(tmp_path / "few", [[every[0].cut(0, 11)]]))
    assert few._manifest.codes is None and few.codec == "vq (float16 until 12 are in blocks)"
    assert all((e.k == every[0].k[:, :, e.place]).all() for e in few.entries())


def test_forgetting_learns_codes_from_the_others_and_changes_none_of_them(soon, tmp_path):
    path = made(tmp_path / "m", [[entries(0, 37, 0)], [entries(1, 60, 1)]])
    before = Memory.open(path)
    held = [e.without(0) for e in before.entries()]
    old = (path / before._manifest.codes).name
    before.forget("s0")
    after = Memory.open(path)
    after.verify()
    for one, two in zip(held, after.entries(), strict=True):
        assert all(np.array_equal(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(one))
    assert not (path / old).exists() and after._manifest.codes != old
    # Codes that the others have, and no other ones.
    codes = after._store.read(after._manifest.codes)["k"][0, 0, 0].astype(np.float32)
    keys = np.concatenate([e.k[0, 0, :, :8] for e in after.entries()[:-1]]).astype(np.float32)
    assert {*map(bytes, codes)} - {bytes(np.zeros(8, np.float32))} <= {*map(bytes, keys)}
    after.forget("s1")
    assert Memory.open(path)._manifest.codes is None and not list(path.glob("codes-*"))


def test_damaged_codes_are_named(soon, tmp_path, capsys):
    path = made(tmp_path / "m", [[entries(0, 60, 0)]])
    codes = path / Memory.open(path)._manifest.codes
    assert main(["atom_jax", "info", str(path)]) == 0 and "entries as vq\n" in capsys.readouterr().out
    whole = codes.read_bytes()
    codes.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
    with pytest.raises(AtomError, match=rf"{codes.name}.* is not what was written: its checksum differs"):
        Memory.open(path).verify()
    codes.unlink()
    with pytest.raises(AtomError, match="is missing, and MEMORY"):
        Memory.open(path).entries()
    codes.write_bytes(whole)
    data = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(data | {"settings": {**data["settings"], "codec": "int8"}}))
    with pytest.raises(AtomError, match="names codes, and int8 has none"):
        Memory.open(path)
    with pytest.raises(AtomError, match="c: holds no codes for 2 layers, 1 heads and 40 channels"):
        codecs.of("vq", {"k": np.zeros(3, np.float16)}, (2, 1, 40), "c")
