"""A memory in numbers."""

from __future__ import annotations

from typing import Any

from atom_jax.lasting.store import Manifest, Store


def stats(store: Store, manifest: Manifest, length: int, held: int) -> dict[str, Any]:
    """Of a memory of which a prompt sees `length` entries per head, `held` of them in blocks or waiting:

    tokens, and units that these have made (0 where the model has none; else they count as tokens in what follows).
    entries: `length`; held; written: of how many tokens that have left the window these are, and law: what the law
    allows there. bytes: on disk; text_bytes: those of token ids among them; per_byte: bytes on disk for each of the
    texts that were read to their end, None where there is none or one was given as ids. horizon: to which age in
    tokens one stays of which a share of 0.05, 0.1 or 0.2 of its block ranks higher.

    Missing where a file isn't there.
    """
    m, law, total = manifest, manifest.settings.law, store.size(manifest.files)
    read = [s.bytes for s in m.sources if s.finished]
    return {
        "tokens": sum(s.tokens for s in m.sources),
        "units": sum(s.units for s in m.sources),
        "entries": length,
        "held": held,
        "written": m.written,
        "law": law.held(m.written),
        "bytes": total,
        "per_byte": total / sum(read) if read and all(read) else None,
        "text_bytes": store.size(f for s in m.sources for f in s.text),
        "horizon": {rank: law.horizon(rank) for rank in (0.05, 0.1, 0.2)},
    }
