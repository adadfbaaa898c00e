"""Corpora that need no download: six novels by Jane Austen, and Python's own standard library."""

from __future__ import annotations

import lzma
import pathlib
import re
import sysconfig

from atom_jax.data.corpus import Corpus, Texts
from atom_jax.data.splits import name_split

AUSTEN = pathlib.Path(__file__).with_name("austen.txt.xz")
_TITLE = re.compile(
    rb"^(?:EMMA|MANSFIELD PARK|NORTHANGER ABBEY|Persuasion|PRIDE AND PREJUDICE|SENSE AND SENSIBILITY)\n"
    rb"(?=\n+(?:\(1814\)\s+)?[Bb]y\s)",
    re.M,
)
_CHAPTER = re.compile(rb"^(?:VOLUME [IVX]+\n+)?chapter [ivxlc\d]+$", re.M | re.I)
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def austen(split: str) -> Corpus:
    """Returns Jane Austen's six novels (public domain, 4.0 MB of ASCII), a chapter as a document.

    train: Emma, Mansfield Park, Northanger Abbey, Pride and Prejudice, Sense and Sensibility (3.56 MB).
    validation: Persuasion, chapters 1 to 12 (0.22 MB).
    test: Persuasion, chapters 13 to 24 (0.25 MB).
    """
    chapters = {name: _chapters(text) for name, text in novels().items()}
    held_out = chapters.pop("persuasion")
    half = len(held_out) // 2
    train = [chapter for novel in chapters.values() for chapter in novel]
    parts = {"train": train, "validation": held_out[:half], "test": held_out[half:], "all": train + held_out}
    return Texts("austen", parts[split])


def novels() -> dict[str, bytes]:
    """Jane Austen's six novels by their names: emma, mansfield_park, northanger_abbey, persuasion,
    pride_and_prejudice, sense_and_sensibility."""
    with lzma.open(AUSTEN) as f:
        text = f.read()
    titles = [m.start() for m in _TITLE.finditer(text)]
    found = (text[a:b] for a, b in zip(titles, [*titles[1:], len(text)]))
    return {novel.partition(b"\n")[0].decode().lower().replace(" ", "_"): novel for novel in found}


def _chapters(novel: bytes) -> list[bytes]:
    starts = [m.start() for m in _CHAPTER.finditer(novel)]
    starts[0] = 0  # the title page goes with the first chapter
    return [novel[a:b] for a, b in zip(starts, [*starts[1:], len(novel)])]


def pystdlib(split: str) -> Corpus:
    """Returns the source files of the running Python's standard library without its tests, as documents.

    The split (90 / 5 / 5 percent) follows a hash of the path inside the library, so that a file keeps its
    split in every Python version. The few files that are not UTF-8 are left out.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _NOT_LIBRARY.isdisjoint(name.parts) and split in ("all", name_split(name.as_posix())):
            text = path.read_bytes()
            if _is_utf8(text):
                texts.append(text)
    return Texts("pystdlib", texts)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
