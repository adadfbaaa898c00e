"""What the system does to a memory on disk while one writes, and whom it lets in: nothing in between is ever there,
and what is refused is one sentence."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from atom_jax.checkpoint.safetensors_io import write_file
from atom_jax.lasting import codec
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.pages import Pages
from atom_jax.lasting.store import MANIFEST, Store
from atom_jax.typing import AtomError
from tests.lasting import disk

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOBODY = 65534
# A process that copies a memory again and again, and in each copy has a child add a source, which dies at its step.
DIES = """
import itertools, os, pathlib, shutil, sys
from tests.lasting import disk

def dying(real, count, stop):
    return lambda *args: os._exit(7) if next(count) == stop else real(*args)

home = pathlib.Path(sys.argv[1])
for stop in itertools.count():
    path = shutil.copytree(home / "m", home / f"at{stop}")
    child = os.fork()
    if child == 0:
        count = itertools.count()
        for name in ("replace", "fsync", "unlink"):
            setattr(os, name, dying(getattr(os, name), count, stop))
        disk.add(path, 2, 9)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
"""


@pytest.fixture
def memory(tmp_path):
    return disk.filled(tmp_path / "m")


def changed(memory, tmp_path):
    """What is there, and what is after one more source."""
    whole = shutil.copytree(memory, tmp_path / "whole")
    disk.add(whole, 2, 9)
    return disk.content(memory), disk.content(whole)


def test_a_process_that_dies_at_any_step_leaves_before_or_after(memory, tmp_path):
    both = changed(memory, tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", DIES, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True)
    died = sorted(tmp_path.glob("at*"), key=lambda path: int(path.name[2:]))
    found = [disk.content(path) for path in died]
    assert len(died) > 12 and all(one in both for one in found)
    # The last one ended by itself.
    assert found[0] == both[0] and found[-2] == found[-1] == both[1]
    for path, one in zip(died, found):
        if one == both[0]:
            disk.add(path, 2, 9)
            assert disk.content(path) == both[1]


def test_a_process_that_is_killed_from_outside_leaves_what_some_commit_made(tmp_path):
    whole, path = disk.make(tmp_path / "whole"), disk.make(tmp_path / "m")
    command = [sys.executable, "-m", "tests.lasting.disk", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    process.stdout.readline()
    while not Memory.open(path).sources:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(Memory.open(path).sources)
    assert 0 < done < disk.SOURCES
    for source in range(done + 2):
        disk.add(whole, source, disk.TOKENS)
        if source >= done:
            disk.add(path, source, disk.TOKENS)
        if source >= done - 1:
            assert disk.content(path) == disk.content(whole)


@contextlib.contextmanager
def files_of_at_most(size):
    """The system refuses to write what is behind so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_breaks_off_anywhere_leaves_before_or_after(memory, tmp_path):
    before, after = changed(memory, tmp_path)
    largest = max(path.stat().st_size for path in (tmp_path / "whole").iterdir())
    refused = 0
    for size in [*range(0, largest, 173), largest]:
        path = shutil.copytree(memory, tmp_path / f"at{size}")
        try:
            with files_of_at_most(size):
                disk.add(path, 2, 9)
        except AtomError as e:
            refused += 1
            assert str(path) in str(e) and len(str(e).splitlines()) == 1
            assert disk.content(path) == before
            disk.add(path, 2, 9)
        assert disk.content(path) == after
        assert {p.name for p in path.iterdir()} == {*Store(path).manifest().files, MANIFEST, ".lock"}
        shutil.rmtree(path)
    assert refused > 9


@pytest.fixture
def denied(memory):
    """A memory of somebody whom permissions are for, as root they are not."""
    with tempfile.TemporaryDirectory() as home:
        path = shutil.copytree(memory, pathlib.Path(home) / "m")
        root = os.geteuid() == 0
        for place in (path.parent, path, *path.iterdir()):
            if root:
                os.chown(place, NOBODY, -1)
        if root:
            os.seteuid(NOBODY)
        try:
            yield path
        finally:
            path.chmod(0o700)
            if root:
                os.seteuid(0)


def test_what_is_not_permitted_is_said(denied):
    memory, before = Memory.open(denied), disk.content(denied)
    segment = sorted(denied.glob("seg-*"))[0]
    for place, mode, act in (
        (denied, 0, lambda: Memory.open(denied)),
        (denied, 0, memory.verify),
        (denied, 0o500, lambda: memory.forget("s0")),
        (denied / MANIFEST, 0, lambda: Memory.open(denied)),
        (denied / ".lock", 0o400, lambda: memory.forget("s0")),
        (segment, 0, memory.verify),
    ):
        old = place.stat().st_mode
        place.chmod(mode)
        try:
            with pytest.raises(AtomError, match="Permission denied") as e:
                act()
        finally:
            place.chmod(old)
        assert str(denied) in str(e.value)
    assert disk.content(denied) == before


def rewritten(path, change):
    """The first segment, whose header lies."""
    segment = sorted(path.glob("seg-*"))[0]
    data = segment.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    rest = change(header, rest) or rest
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    segment.write_bytes(len(text).to_bytes(8, "little") + text + rest)


def with_another(header, rest):
    header["other"] = {"dtype": "U8", "shape": [4], "data_offsets": [len(rest), len(rest) + 4]}
    return rest + bytes(4)


@pytest.mark.parametrize("change, message", [
    (lambda header, _: header["k"]["shape"].__setitem__(2, 90), "does not fill its"),
    (lambda header, _: header["v"]["data_offsets"].__setitem__(1, 10**6), "lies beyond the end of the file"),
    (lambda header, _: header["k"].update(dtype="F32"), "does not fill its"),
    (lambda header, _: header["k"].update(dtype="I16"), "its tensors don't fit each other"),
    (lambda header, _: header["score"].update(dtype="I32"), "its tensors don't fit each other"),
    (lambda header, _: header.update(points=header.pop("score")), "the tensor 'score' is missing|without checksums"),
    (with_another, "without checksums"),
    (lambda header, _: header["__metadata__"].clear(), "without checksums"),
], ids=["shape", "offsets", "dtype", "kind", "score", "name", "more", "no checksums"])  # fmt: skip
def test_headers_that_lie_are_named(memory, change, message):
    rewritten(memory, change)
    with pytest.raises(AtomError, match=message) as e:
        Memory.open(memory).verify()
    assert "seg-" in str(e.value)


@pytest.mark.parametrize("name", ["k", "v", "score"])
def test_what_is_no_number_is_named_however_it_is_read(memory, name):
    found = Memory.open(memory)
    file = found._manifest.segments[0].file
    arrays = {n: x.copy() for n, x in found._store.read(file).items() if n not in codec.INDEX}
    mark = codec.marks(arrays["k"])
    arrays[name].flat[1] = np.nan
    # With checksums of what is there now.
    write_file(arrays | codec.index(arrays["k"], arrays) | {"mark": mark}, memory / file)
    with pytest.raises(AtomError, match=rf"{file}: tensor '{name}' holds NaN or infinite values"):
        Memory.open(memory).verify()
    if name != "score":
        pages = Pages(found._store, found._manifest, None)
        every = np.arange(len(pages.sizes))[None, None]
        assert all(np.isfinite(x).all() for x in pages(1, every)) and pages.failed is None
        assert all(np.isnan(x).all() for x in pages(0, every))
        assert str(pages.failed) == f"{memory / file}: page 0 holds NaN or infinite values"
