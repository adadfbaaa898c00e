"""English texts to evaluate on, which no target of data/fetch trains on.

corpora/heldout/bible.txt is the World English Bible and corpora/heldout/debian-reference.txt is Debian Reference, one
document each: sources of DataConfig, with the split "all".
"""

from __future__ import annotations

import html
import pathlib
import re
import struct
import zlib

from atom_jax.data.corpus import read_packed
from atom_jax.data.fetch import debian
from atom_jax.data.fetch.files import whole
from atom_jax.data.fetch.plain_text import reflow
from atom_jax.typing import AtomError

_ENTRY = struct.Struct("<III")  # offset, compressed and uncompressed size, in bytes
# Tags that break the text: into paragraphs (\f) and lines (\n). The rest of OSIS, ThML and GBF is inside of a line.
_PARAGRAPH = re.compile(
    r"<(?:/?(?:div|p|lg|chapter|title|list|item|speaker|head)\b|lb\b[^>]*x-p)[^>]*>|<C[ML]>", re.ASCII
)
_LINE = re.compile(r"<(?:l|lb|br)\b[^>]*>")
_NO_BREAK = re.compile(r'<div\b[^>]*type="x-milestone"[^>]*>')
_BLOCK = re.compile(r"</?(?:div|p|lg|chapter|title|list|item|speaker|head|l|lb|br|note|scripRef)\b|<(?:C[ML]|RF|Rf)>")
_TAG = re.compile(r"<[^<>]*>")
_NOTE = re.compile(r"<note\b[^>]*/>|<(note|scripRef)\b[^>]*>.*?</\1>|<RF>.*?<Rf>", re.S)


def fetch(target: pathlib.Path, cache: pathlib.Path) -> str:
    """Makes `target` from the packages, and returns what is in it, as a table. Raises AtomError when one of them
    cannot be had or is damaged."""
    bible, reference = debian.unpack(("sword-text-web", "debian-reference-en"), cache)
    return build(bible, reference / "usr/share/debian-reference/debian-reference.en.txt.gz", target)


def build(bible: pathlib.Path, reference: pathlib.Path, target: pathlib.Path) -> str:
    """Writes `target` whole from a tree with one zText module and the gzipped text of Debian Reference, and returns
    its table of contents. Raises AtomError when a testament is missing or a file is damaged."""
    module = sorted(bible.glob("usr/share/sword/modules/texts/ztext/*/"))
    if len(module) != 1:
        raise AtomError(f"{bible} holds {len(module)} zText modules, not one")
    texts = {"bible": "\n".join(scripture(read_ztext(module[0] / f"{part}.bzs")) for part in ("ot", "nt"))}
    try:
        texts["debian-reference"] = reflow(read_packed(reference).decode())
    except UnicodeDecodeError as e:
        raise AtomError(f"{reference}, decompressed, is not UTF-8 at byte {e.start}") from None
    lines = [f"{'source':<20}{'bytes':>14}"]
    with whole(target) as part:
        for name, text in texts.items():
            (part / f"{name}.txt").write_text(text, "utf-8")
            lines.append(f"{name:<20}{len(text.encode()):>14,}")
    return "\n".join(lines)


def read_ztext(index: pathlib.Path) -> str:
    """Returns the markup of one testament of a SWORD module: the blocks that `index` (a .bzs file) names, which are
    zlib-compressed in the .bzz file beside it. Raises AtomError when one is missing, damaged or not UTF-8."""
    packed = index.with_suffix(".bzz")
    for path in (index, packed):
        if not path.is_file():
            raise AtomError(f"{path} is missing")
    entries, data = index.read_bytes(), packed.read_bytes()
    if len(entries) % _ENTRY.size:
        raise AtomError(f"{index} is damaged: {len(entries)} bytes are no whole number of {_ENTRY.size}-byte entries")
    blocks = []
    for number, (offset, compressed, size) in enumerate(_ENTRY.iter_unpack(entries)):
        try:
            block = zlib.decompress(data[offset : offset + compressed])
            blocks.append(block.decode())
        except (zlib.error, UnicodeDecodeError) as e:
            raise AtomError(f"{packed}, block {number}, cannot be read: {e}") from None
        if len(block) != size:
            raise AtomError(f"{packed}, block {number}, has {len(block)} bytes, not {size}")
    return "\n".join(blocks)


def scripture(markup: str) -> str:
    """Returns the text of OSIS, ThML or GBF markup, an empty line between paragraphs, headings and chapters, and a
    line per line of verse; notes, numbers and attributes are left out."""
    text = _NO_BREAK.sub("", markup)
    text = _TAG.sub(lambda m: m[0] if _BLOCK.match(m[0]) else "", text)
    # A note may stand where the space between two words was.
    text = re.sub(rf"(?:{_NOTE.pattern})(?=([\w“‘(])?)", lambda m: " " if m[2] else "", text, flags=re.S)
    text = re.sub(r"\s+", " ", text)
    text = _LINE.sub("\n", _PARAGRAPH.sub("\f", text))
    paragraphs = []
    for paragraph in html.unescape(_TAG.sub("", text)).split("\f"):
        lines = (re.sub(r"\s+([.,;:?!])?", lambda m: m[1] or " ", line).strip() for line in paragraph.split("\n"))
        if kept := [line for line in lines if line]:
            paragraphs.append("\n".join(kept) + "\n")
    return "\n".join(paragraphs)
