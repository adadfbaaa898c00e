"""Pages of entries on disk, without a model: they are what segments hold, and damage is said when one is read."""

import dataclasses

import numpy as np
import pytest

from atom_jax.kvcache.lasting.paged import FETCHES
from atom_jax.lasting import codec, loading, store
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.pages import Pages
from atom_jax.typing import AtomError
from tests.lasting.disk import SETTINGS, add, make


@pytest.fixture(autouse=True)
def three(monkeypatch):
    """Pages of three entries: blocks of four to six have two."""
    monkeypatch.setattr(codec, "PAGE", 3)


def opened(path, known=None):
    memory = Memory.open(path)
    return Pages(memory._store, memory._manifest, loading.tail(memory._store, memory._manifest)[0], known)


def every(pages, layer):
    return pages(layer, np.arange(len(pages.sizes))[None, None])


@pytest.mark.parametrize("kind", codec.CODECS)
def test_pages_are_what_segments_hold(tmp_path, kind, monkeypatch):
    settings = dataclasses.replace(SETTINGS, codec=kind)
    monkeypatch.setitem(codec.CODECS, "vq", codec.CODECS["vq"]._replace(least=7))
    for name in ("new", "old"):
        # Segments of an older version, which say nothing of pages.
        monkeypatch.setattr("atom_jax.lasting.blocks.index", codec.index if name == "new" else lambda k, arrays: {})
        path = make(tmp_path / name, settings)
        for source in (0, 1):
            add(path, source, 9, heads=kind == "float16")
        held, pages = Memory.open(path).entries(), opened(path)
        assert pages.sizes.sum() == sum(map(len, held)) == pages.entries and pages.sizes.max() == 3
        for layer in range(2):
            for i, found in enumerate(every(pages, layer)):
                parts = [found[0, 0, p, :n] for p, n in enumerate(pages.sizes)]
                wanted = [(e.k, e.v)[i][layer, 0] for e in held]
                np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(wanted))
                means = [part.mean(0, dtype=np.float32) for part in parts]
                if i == 0:
                    np.testing.assert_allclose(pages.marks()[layer, 0], means, atol=2e-3)
        # Behind the last one there is nothing.
        assert not np.any(pages(0, np.full((1, 1, 2), len(pages.sizes)))[0])


def test_damage_is_said_when_a_page_is_read(tmp_path):
    path = make(tmp_path / "m")
    add(path, 0, 22)
    segment, pages = path / Memory.open(path)._manifest.segments[0].file, opened(path)
    whole = every(pages, 1)
    data, k = segment.read_bytes(), Memory.open(path).entries()[0].k
    at = data.index(np.ascontiguousarray(k).tobytes()) + k.nbytes - 1
    segment.write_bytes(bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]]))
    again = opened(path)
    assert again.failed is None and np.isfinite(every(again, 0)[0]).all() and again.failed is None
    assert np.isnan(every(again, 1)).all()
    assert str(again.failed) == f"{segment}: page 1 is not what was written: its checksum differs"
    segment.write_bytes(data[: at - k.nbytes])
    with pytest.raises(AtomError, match="beyond the end"):
        opened(path)
    segment.unlink()
    with pytest.raises(store.Missing):
        opened(path)
    # What was opened before stays what it was, also where its file is gone, and with it all that is opened later.
    segment.write_bytes(data)
    known = opened(path)
    segment.unlink()
    later = opened(path, known)
    for one in (known, later):
        np.testing.assert_array_equal(every(one, 1), whole)
    number, shared = known.number, next(iter(known.files.values()))._file
    assert FETCHES[number] is known
    del known, one
    assert number not in FETCHES and later.number in FETCHES and not shared.closed
    del later
    assert shared.closed
