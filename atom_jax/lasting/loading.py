"""What a memory on disk holds, loaded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.lasting import codec, texts
from atom_jax.lasting import front as front_lib
from atom_jax.lasting import inside as inside_lib
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
    waiting = Entries.of(rest, codec.CODECS["float16"], manifest.model, where) if rest or manifest.waiting else None
    if (count := 0 if waiting is None else len(waiting)) != manifest.waiting:
        raise AtomError(f"{where}: holds {count} entries, and the manifest names {manifest.waiting}")
    return waiting, kept


def entries(store: Store, manifest: Manifest) -> list[Entries]:
    """All but the window: block by block, then what waits."""
    return Blocks(store, manifest, tail(store, manifest)[0]).all()


def text(store: Store, source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Ids of a source, i32 [n], and the token behind each of its units, i32 [u]; none where they are not kept.
    AtomError for files that hold others than the manifest names."""
    none, found = np.zeros(0, np.int32), []
    for name in source.text:
        file = store.read(name)
        packed, ends = file.get("ids"), file.get("ends", none)
        right = packed is not None and packed.dtype == np.uint8 and packed.ndim == 2 and packed.shape[1] in (2, 4)
        if not right or ends.dtype != np.int32 or ends.ndim != 1:
            raise AtomError(f"{store.directory / name}: holds no token ids, as bytes [n, 2] or [n, 4]")
        found.append((texts.unpacked(packed), ends))
    ids, ends = (np.concatenate(parts) for parts in zip((none, none), *found))
    if source.text and (len(ids), len(ends)) != (source.tokens, source.units):
        wanted = f"{source.tokens} and {source.units}"
        raise AtomError(
            f"{store.directory}: holds {len(ids)} ids and {len(ends)} units of {source.name}, and not {wanted}"
        )
    return ids, ends


def front(store: Store, manifest: Manifest, lm: LM) -> front_lib.Front:
    """All that stands before a prompt."""
    return _front(store, manifest, lm, entries(store, manifest))


def near(store: Store, manifest: Manifest, lm: LM) -> front_lib.Front:
    """What stands before a prompt that leans on no entries: sinks and window."""
    return _front(store, manifest, lm, [Entries.none(manifest.model)])


def paged(
    store: Store, manifest: Manifest, lm: LM, choice: Choice, known: Pages | None
) -> tuple[memory_lib.Memory, Pages]:
    """The model's memory, one row, while entries stay on disk, and their pages. known: as of `Pages`."""
    if choice.page != codec.PAGE:
        raise AtomError(f"choice: entries that stay on disk are in pages of {codec.PAGE}, not of {choice.page}")
    pages = Pages(store, manifest, tail(store, manifest)[0], known)
    return front_lib.paged(lm, near(store, manifest, lm), pages, choice), pages


def _front(store: Store, manifest: Manifest, lm: LM, held: list[Entries]) -> front_lib.Front:
    kept, settings, inside = tail(store, manifest)[1], manifest.settings, inside_lib.of(lm.config)
    if manifest.window.source >= 0:
        sizes = {"sink_k": settings.sinks, "sink_v": settings.sinks, "k": settings.part, "v": settings.part}
        of, dtype = (len(inside.kinds), 1, inside.kind.h), jnp.dtype(lm.config.dtype)
        like = {name: jax.ShapeDtypeStruct((*of, n, inside.kind.k), dtype) for name, n in sizes.items()}
        inside_lib.check(kept, like, str(store.directory / manifest.tail))
    return front_lib.front(lm, held, kept, manifest.window, settings.sinks)
