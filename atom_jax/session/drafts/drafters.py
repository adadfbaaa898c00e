"""The table of drafters by name, and how they are written on a command line: "ngram:longest=3,least=1",
"mtp:heads=PATH"."""

from __future__ import annotations

from atom_jax import config
from atom_jax.session.drafts.drafter import Drafter
from atom_jax.session.drafts.local import Local
from atom_jax.session.drafts.mtp import MTP
from atom_jax.session.drafts.ngram import NGram
from atom_jax.session.drafts.recycle import Recycle
from atom_jax.session.drafts.spine import Spine

DRAFTERS: dict[str, type[Drafter]] = {d.name: d for d in (NGram, Recycle, Spine, MTP, Local)}


def parse(draft: str | Drafter | None) -> Drafter | None:
    """The drafter that a text such as "ngram:least=1" names; None for "none". A drafter is itself.

    Raises AtomError for an unknown name, an unknown field or an unreadable value.
    """
    if draft is None or isinstance(draft, Drafter):
        return draft
    if str(draft).strip().partition(":")[0] == "none":
        return None
    return config.named(str(draft), DRAFTERS, "draft", also="none")
