"""What a memory on disk says of itself, and what it holds: for this no model is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from atom_jax.kvcache.lasting.chosen import Choice
from atom_jax.lasting import loading
from atom_jax.lasting import states as states_lib
from atom_jax.lasting.blocks import Entries
from atom_jax.lasting.codec import CODECS, Learned
from atom_jax.lasting.store import LEVELS, Missing, Model, Settings, Source, Store, Window
from atom_jax.typing import AtomError

_T = TypeVar("_T")


class Contents:
    """The manifest of a memory, as it was when this looked (`refresh`), and the files that it names. choice: how
    prompts choose among entries."""

    def __init__(self, store: Store, choice: Choice):
        self._store, self.choice = store, choice
        self._manifest = store.manifest()

    @property
    def settings(self) -> Settings:
        """What was fixed when it was made."""
        return self._manifest.settings

    @property
    def model(self) -> Model:
        """The model that it belongs to."""
        return self._manifest.model

    @property
    def codec(self) -> str:
        """How its entries are stored."""
        name = self.settings.codec
        later = isinstance(CODECS[name], Learned) and self._manifest.codes is None
        return f"{name} (float16 until {CODECS[name].least:,} are in blocks)" if later else name

    @property
    def sources(self) -> tuple[Source, ...]:
        """The texts that it has read."""
        return self._manifest.sources

    @property
    def held(self) -> int:
        """Entries per head in blocks, and of those that wait for theirs."""
        return sum(s.entries for s in self._manifest.segments) + self._manifest.waiting

    @property
    def length(self) -> int:
        """Entries per head that a prompt sees: sinks, blocks, what waits for its block, the window; 0 without
        levels."""
        m = self._manifest
        if LEVELS not in m.settings.parts:
            return 0
        ahead = 0 if m.window.source < 0 else min(self.settings.sinks, m.window.first) + m.window.count
        return self.held + ahead

    @property
    def states(self) -> int:
        """Final states with the token that followed each; 0 without knn."""
        return sum(self._manifest.states.values())

    @property
    def chooses(self) -> bool:
        """Whether prompts choose pages of what is held, and don't attend to all of it."""
        return self.length > self.choice.whole

    @property
    def paged(self) -> bool:
        """Whether entries stay on disk while prompts lean on them."""
        of = self.model
        return self.chooses and 4 * of.layers * of.heads * of.size * self.held > self.choice.resident

    @property
    def ahead(self) -> int:
        """Places in front of a prompt."""
        if not self.chooses:
            return self.length
        return self.length - self.held + self.choice.pages * self.choice.page

    def stats(self) -> dict[str, Any]:
        """tokens, and units that these have made (0 where the model has none; else they count as tokens in what
        follows); entries, per head, as `length`; held: of these in blocks and waiting, written: of how many tokens
        that have left the window, and law: what the law allows there; states: as there; bytes on disk, and
        text_bytes and state_bytes, those of token ids and states among them, and per_byte: bytes on disk for each of
        the texts that were read to their end, None where there is none or one was given as ids; horizon: to which age
        in tokens one stays of which a share of 0.05, 0.1 or 0.2 of its block ranks higher."""
        m, law, size = self._manifest, self.settings.law, self._store.size
        read = [s.bytes for s in m.sources if s.finished]
        total = self._current(lambda: size(self._manifest.files))
        return {
            "tokens": sum(s.tokens for s in m.sources),
            "units": sum(s.units for s in m.sources),
            "entries": self.length,
            "held": self.held,
            "written": m.written,
            "law": law.held(m.written),
            "states": self.states,
            "bytes": total,
            "per_byte": total / sum(read) if read and all(read) else None,
            "text_bytes": self._current(lambda: size(f for s in self.sources for f in s.text)),
            "state_bytes": self._current(lambda: size(f for s in self.sources for f in s.state)),
            "horizon": {rank: law.horizon(rank) for rank in (0.05, 0.1, 0.2)},
        }

    def refresh(self) -> None:
        """Looks at what others have committed since."""
        self._manifest = self._store.manifest()

    def verify(self) -> int:
        """Reads everything, and compares it with its checksums; returns the bytes of all files. Raises AtomError,
        which names the first file that is damaged or missing."""

        def look() -> int:
            for name in sorted(self._manifest.files):
                self._store.read(name)
            loading.entries(self._store, self._manifest)
            self._states()
            for source in self.sources:
                loading.text(self._store, source)
            return self._store.size(self._manifest.files)

        return self._current(look)

    def entries(self) -> list[Entries]:
        """What is held of texts apart from the window: block by block, the oldest first, then what waits."""
        return self._current(lambda: loading.entries(self._store, self._manifest))

    def latest(self) -> tuple[dict[str, np.ndarray], Window]:
        """The arrays of the window, as of `Reader.arrays`, and where it stands; none where nothing was read."""
        return self._current(lambda: (self._tail()[1], self._manifest.window))

    def ids(self, name: str) -> np.ndarray:
        """Token ids of a source, i32 [n]; none where they are not kept."""
        return loading.text(self._store, self._known(name))[0]

    def ends(self, name: str) -> np.ndarray:
        """The token behind each unit of a source, i32 [u]; none where ids are not kept, or the model has no units."""
        return loading.text(self._store, self._known(name))[1]

    def _known(self, name: str) -> Source:
        """A source; AtomError where none has this name."""
        source = next((s for s in self.sources if s.name == name), None)
        if source is None:
            known = ", ".join(s.name for s in self.sources[:5]) or "nothing"
            raise AtomError(f"{self._store.directory}: has no source {name!r}; it has read {known}")
        return source

    def _current(self, look: Callable[[], _T]) -> _T:
        """What `look` finds, again where another process has meanwhile replaced the files."""
        while True:
            try:
                return look()
            except Missing:
                before = self._manifest
                self.refresh()
                if self._manifest == before:
                    raise

    def _tail(self) -> tuple[Entries | None, dict[str, np.ndarray]]:
        """What waits for its block, and the arrays of the window."""
        return loading.tail(self._store, self._manifest)

    def _states(self) -> states_lib.States:
        return states_lib.load(self._store, self._manifest)
