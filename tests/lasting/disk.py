"""Memories without a model: entries of random numbers, written as reading writes them. For tests and `make soak`."""

import dataclasses
import pathlib
import sys

import numpy as np

from atom_jax.kvcache.lasting.levels import Law
from atom_jax.lasting.blocks import Blocks, Entries
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.store import FORMAT, Manifest, Model, Settings, Source, Store

MODEL = Model("llama", "0123456789abcdef", "float32", 2, 1, 4)
# What the process that is killed adds.
SOURCES, TOKENS = 40, 9
SETTINGS = Settings(Law(0.5, 3, 4), part=8, sinks=1)


def random_entries(seed, n, source, heads=False):
    rng = np.random.default_rng((seed, source))
    k, v = (rng.normal(size=(2, 1, n, 4)).astype(np.float16) for _ in range(2))
    said = (2, 1, n) if heads else (n,)
    place = np.broadcast_to(np.arange(n, dtype=np.int32), said)
    return Entries(k, v, rng.random(said, np.float32), place, np.full(said, source, np.int32))


def make(path, settings=SETTINGS):
    """An empty memory."""
    path.mkdir()
    Store(path).commit(Manifest(FORMAT, MODEL, settings), {})
    return path


def add(path, source, n, heads=False):
    """One commit: a source of n entries, as `remember` makes it."""
    memory = Memory.open(path)
    with memory._writing():
        m = memory._manifest
        blocks = Blocks(memory._store, m, memory._tail()[0])
        blocks.add(random_entries(0, n, source, heads))
        name = f"text-{m.next:08d}.safetensors"
        text = {name: {"ids": np.full((n, 2), source, np.uint8)}}
        known = Source(source, f"s{source}", "0" * 64, n, n, True, (name,))
        memory._write(blocks, (*m.sources, known), m.window, {}, m.next + 1, text)


def filled(path):
    """Four blocks and a tail: the next ones merge twice."""
    make(path)
    add(path, 0, 9)
    add(path, 1, 18)
    return path


def content(path):
    """All that a memory says: its manifest without the numbers of files, and its entries."""
    memory = Memory.open(path)
    memory.verify()
    plain = dataclasses.replace(memory._manifest, next=0, tail=None)
    segments = tuple(dataclasses.replace(s, file="") for s in plain.segments)
    sources = tuple(dataclasses.replace(s, text=()) for s in plain.sources)
    entries = [tuple(getattr(e, f.name).tobytes() for f in dataclasses.fields(e)) for e in memory.entries()]
    ids = [memory.ids(s.name).tobytes() for s in memory.sources]
    return dataclasses.replace(plain, segments=segments, sources=sources), entries, ids


if __name__ == "__main__":
    home = pathlib.Path(sys.argv[1])
    print("begins", flush=True)
    for number in range(len(Memory.open(home).sources), SOURCES):
        add(home, number, TOKENS)
