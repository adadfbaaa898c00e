"""What a memory on disk holds, loaded."""

from __future__ import annotations

import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.lasting import codec, texts
from atom_jax.lasting import front as front_lib
from atom_jax.lasting.blocks import Blocks, Entries
from atom_jax.lasting.pages import Pages
from atom_jax.lasting.store import Manifest, Source, Store
from atom_jax.typing import LM, AtomError

# What begins the names of the window's arrays in a tail.
WINDOW = "window."


def tail(store: Store, manifest: Manifest) -> tuple[Entries | None, dict[str, np.ndarray]]:
    """What waits for its block, and the arrays of the window."""
    if manifest.tail is None:
        return None, {}
    arrays = store.read(manifest.tail)
    kept = {name.removeprefix(WINDOW): x for name, x in arrays.items() if name.startswith(WINDOW)}
    rest = {name: x for name, x in arrays.items() if not name.startswith(WINDOW)}
    where = str(store.directory / manifest.tail)
    waiting = Entries.of(rest, "float16", where) if rest or manifest.waiting else None
    if (0 if waiting is None else len(waiting)) != manifest.waiting:
        raise AtomError(f"{where}: holds {len(waiting)} entries, and the manifest names {manifest.waiting}")
    return waiting, kept


def entries(store: Store, manifest: Manifest) -> list[Entries]:
    """All but the window: block by block, then what waits."""
    return Blocks(store, manifest, tail(store, manifest)[0]).all()


def text(store: Store, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a source, i32 [n], and the token behind each of its units, i32 [u]; none where they are not kept."""
    none, files = np.zeros(0, np.int32), [store.read(file) for file in source.text]
    ids = [texts.unpacked(file["ids"]) for file in files]
    return np.concatenate([none, *ids]), np.concatenate([none, *(file.get("ends", none) for file in files)])


def front(store: Store, manifest: Manifest, lm: LM) -> front_lib.Front:
    """All that stands before a prompt."""
    return _front(store, manifest, lm, entries(store, manifest))


def paged(
    store: Store, manifest: Manifest, lm: LM, choice: Choice, known: Pages | None
) -> tuple[memory_lib.Memory, Pages]:
    """The model's memory, one row, while entries stay on disk, and their pages. known: as of `Pages`."""
    if choice.page != codec.PAGE:
        raise AtomError(f"choice: entries that stay on disk are in pages of {codec.PAGE}, not of {choice.page}")
    near = _front(store, manifest, lm, [Entries.none(manifest.model)])
    pages = Pages(store, manifest, tail(store, manifest)[0], known)
    return front_lib.paged(lm, near, pages, choice), pages


def _front(store: Store, manifest: Manifest, lm: LM, held: list[Entries]) -> front_lib.Front:
    return front_lib.front(lm, held, tail(store, manifest)[1], manifest.window, manifest.settings.sinks)
