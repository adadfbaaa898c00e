"""The same documents in several languages, from the HTML pages of Debian packages.

corpora/parallel/LANG/SPLIT/pages.jsonl holds {"name", "text"} per line, in the same order in every language; each
LANG is a source of DataConfig. Parallel are the pages; sentences are not aligned, and pages may keep English strings.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys

from atom_jax.data.config import SPLITS
from atom_jax.data.fetch import debian
from atom_jax.data.fetch.files import read_text, whole, write_documents
from atom_jax.data.fetch.html_text import page_text
from atom_jax.data.splits import name_split
from atom_jax.typing import AtomError

_HELP = "usr/share/libreoffice/help"
_BOOK = "usr/share/doc/debian-handbook/html"
# language: (package, directory in it)
HELP = {
    "en": ("libreoffice-help-en-us", f"{_HELP}/en-US"),
    **{x: (f"libreoffice-help-{x}", f"{_HELP}/{x}") for x in ("de", "fr", "es", "ja", "ru")},
    "zh": ("libreoffice-help-zh-cn", f"{_HELP}/zh-CN"),
}
BOOK = {
    x[:2]: ("debian-handbook", f"{_BOOK}/{x}")
    for x in ("en-US", "de-DE", "fr-FR", "es-ES", "ja-JP", "ru-RU", "zh-CN")
}


def fetch(target: pathlib.Path, cache: pathlib.Path) -> str:
    """Makes `target` from LibreOffice's help, or from the Debian handbook where that cannot be had, and returns what
    is in it, as a table. Raises AtomError when neither can be downloaded."""
    try:
        chosen = HELP
        debian.unpack([package for package, _ in HELP.values()], cache)
    except debian.Unavailable as e:
        print(f"{e}; trying the Debian handbook instead", file=sys.stderr)
        chosen = BOOK
        debian.unpack(["debian-handbook"], cache)
    return build({language: cache / package / folder for language, (package, folder) in chosen.items()}, target)


def build(folders: dict[str, pathlib.Path], target: pathlib.Path) -> str:
    """Writes `target` whole from directories of pages, one for each language, and returns its table of contents.

    Kept are pages that every language has, with text, and with another text than the first language's. The split
    (90 / 5 / 5 percent) follows a hash of the page's name; so does the order, so that the first pages of a file are a
    fair sample. Raises AtomError when nothing is left.
    """
    found = [{p.relative_to(folder).as_posix() for p in folder.rglob("*.html")} for folder in folders.values()]
    names = sorted(set.intersection(*found), key=lambda name: hashlib.sha256(name.encode()).digest())
    texts = {
        language: [page_text(read_text(folder / name)) for name in names] for language, folder in folders.items()
    }
    rows = list(zip(*texts.values()))
    kept = [i for i, row in enumerate(rows) if all(row) and row[0] not in row[1:]]
    if not kept:
        raise AtomError(f"{', '.join(map(str, folders.values()))}: no page is in all of these directories")
    lines = [f"{len(kept)} pages in {len(folders)} languages; bytes of text:", _line("", SPLITS[:3])]
    with whole(target) as part:
        for language, pages in texts.items():
            of_split = {s: [(names[i], pages[i]) for i in kept if name_split(names[i]) == s] for s in SPLITS[:3]}
            folder = part / language
            sizes = [write_documents(folder / s / "pages.jsonl", mine) for s, mine in of_split.items()]
            lines.append(_line(language, [f"{n:,}" for n in sizes]))
    return "\n".join(lines)


def _line(first: str, cells: list[str] | tuple[str, ...]) -> str:
    return f"{first:<4}" + "".join(f"{cell:>14}" for cell in cells)
