"""What kind of file a text is in: known by its name in whatever case and by how it begins."""

import gzip
import json
import lzma

import pytest

from atom_jax.data.sources import open_source
from atom_jax.typing import AtomError

RECORDS = [{"text": "first äß", "id": 1}, {"text": "second\nline", "id": 2}]
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()
LIST = json.dumps(RECORDS, indent=2).encode()
CSV = 'id,text\n1,first äß\n2,"second\nline"\n'.encode()
MARK = b"\xef\xbb\xbf"
TEXTS = [r["text"].encode() for r in RECORDS]


def texts(path):
    corpus = open_source(str(path), "all")
    return [corpus.read(i) for i in range(len(corpus))]


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.NDJSON.GZ", gzip.compress(LINES, mtime=0)),
        ("a.json", LIST),
        ("a.json", LINES),
        ("a.JSON.xz", lzma.compress(LIST)),
        ("a.csv", CSV),
        ("a.Csv.gz", gzip.compress(CSV, mtime=0)),
        ("a.tsv", CSV.replace(b",", b"\t")),
        ("a.csv", MARK + CSV),
        ("a.txt", LINES),
        ("a", LINES),
        ("a.txt", LIST),
        ("a.txt", MARK + LINES),
        ("a.jsonl", MARK + LINES),
        ("a.json", MARK + LIST),
    ],
)
def test_records(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == TEXTS


def test_fields_by_name(tmp_path):
    for name, content in (("a.json", LIST), ("b.csv", CSV)):
        (tmp_path / name).write_bytes(content.replace(b"text", b"body"))
        assert texts(f"{tmp_path / name}#body") == TEXTS
        with pytest.raises(AtomError, match="entry 1 has no string under the field 'text'"):
            texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.TXT.XZ"])
def test_the_mark_of_utf8_is_no_part_of_a_text(tmp_path, name):
    pack = {"gz": gzip.compress, "xz": lzma.compress}.get(name[-2:].lower(), bytes)
    (tmp_path / name).write_bytes(pack(MARK + b"some text"))
    corpus = open_source(str(tmp_path / name), "all")
    assert corpus.read(0) == b"some text" and corpus.read(0, 2, 6) == b"me t" and corpus.sizes.tolist() == [9]
    (tmp_path / name).write_bytes(pack(MARK))
    with pytest.raises(AtomError, match="has no text"):
        texts(tmp_path / name)


def test_text_that_looks_like_json_from_afar(tmp_path):
    for content in (b'{"a": 1', b"[1, 2]", b"{curly} words", b'{\n  "a": 1}'):
        (tmp_path / "a.txt").write_bytes(content)
        assert texts(tmp_path / "a.txt") == [content]
    # The name says that it is a program.
    (tmp_path / "a.py").write_bytes(LINES)
    assert texts(tmp_path / "a.py") == [LINES]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.arrow", b"ARROW1", "is a arrow file, which is not read"),
        ("a.txt", gzip.compress(LINES, mtime=0), r"is packed, but its name does not end in \.gz"),
        ("a.bin", b"PK\x03\x04", "is a zip file"),
        ("a.json", b'{"text": ', "is not JSON"),
        ("a.json", b"3", "entry 1 has no string"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.csv", b'text\n"open', "is not CSV"),
        ("a.csv", b"text\n\xff", "is not UTF-8 at byte 5"),
        ("a.csv", b"a,text\n1\n", "entry 1 has no string under the field 'text'"),
    ],
)
def test_what_is_not_read_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AtomError, match=message):
        texts(tmp_path / name)


def test_kinds_are_not_mixed(tmp_path):
    (tmp_path / "a.JSONL").write_bytes(LINES)
    (tmp_path / "b.txt").write_bytes(b"text")
    with pytest.raises(AtomError, match="holds jsonl and text files"):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.xz"])
def test_a_file_that_explodes_is_refused(tmp_path, name):
    pack = gzip.compress if name.endswith("gz") else lambda data: lzma.compress(data, preset=0)
    (tmp_path / name).write_bytes(pack(bytes(70 << 20)))
    with pytest.raises(AtomError, match="times its size: that is no text"):
        texts(tmp_path / name)
    (tmp_path / name).write_bytes(pack(LINES * 10_000))
    assert len(texts(tmp_path / name)) in (1, 20_000)
