"""What each kind of source name opens."""

import gzip
import itertools
import json
import lzma

import pytest

from atom_jax.data.builtin import AUSTEN
from atom_jax.data.sources import open_source


def texts(source, split="all"):
    corpus = open_source(str(source), split)
    return [corpus.read(i) for i in range(len(corpus))]


def test_austen_is_split_by_novel():
    parts = {split: texts("austen", split) for split in ("train", "validation", "test", "all")}
    assert [len(parts[s]) for s in parts] == [245, 12, 12, 269]
    assert parts["train"] + parts["validation"] + parts["test"] == parts["all"]
    with lzma.open(AUSTEN) as f:
        whole = f.read()
    assert sum(map(len, parts["all"])) == len(whole)
    held_out = b"".join(parts["validation"] + parts["test"])
    assert held_out in whole
    assert held_out.startswith(b"Persuasion\n")
    assert b"Anne Elliot" in held_out and b"Anne Elliot" not in b"".join(parts["train"])
    titles = [
        b"EMMA",
        b"MANSFIELD PARK",
        b"NORTHANGER ABBEY",
        b"PRIDE AND PREJUDICE",
        b"SENSE AND SENSIBILITY",
    ]
    firsts = [t.split(b"\n")[0] for t in parts["train"] if not t.upper().startswith((b"CHAPTER", b"VOLUME"))]
    assert firsts == titles


def test_pystdlib_splits_are_disjoint_and_stable():
    train, validation, test = (open_source("pystdlib", s) for s in ("train", "validation", "test"))
    assert len(train) > 8 * len(validation) > 0 and len(test) > 0
    assert not set(validation.texts) & set(test.texts)


def test_text_file_directory_and_pattern(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"second \xc3\xa9")
    (tmp_path / "a.md").write_bytes(b"first")
    (tmp_path / "sub" / "c.py").write_bytes(b"third")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    with gzip.open(tmp_path / "d.txt.gz", "wb") as f:
        f.write(b"packed")
    assert texts(tmp_path) == [b"first", b"second \xc3\xa9", b"third", b"packed"]
    assert texts(tmp_path / "b.txt") == [b"second \xc3\xa9"]
    assert texts(tmp_path / "*.txt") == [b"second \xc3\xa9"]
    assert texts(tmp_path / "**" / "*.py") == [b"third"]


def test_one_file_is_split_by_place(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"word " * 2000)
    parts = [texts(path, split)[0] for split in ("train", "validation", "test")]
    assert b"".join(parts) == path.read_bytes()
    assert [round(len(p) / 100) for p in parts] == [90, 5, 5]


def test_subdirectories_name_the_splits(tmp_path):
    for name, text in (("train", b"t"), ("valid", b"v"), ("test", b"s")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_bytes(text)
    assert [texts(tmp_path, s) for s in ("train", "validation", "test")] == [[b"t"], [b"v"], [b"s"]]
    assert sorted(texts(tmp_path)) == [b"s", b"t", b"v"]


@pytest.mark.parametrize("opener", [open, gzip.open, lzma.open])
def test_jsonl(tmp_path, opener):
    suffix = {open: "", gzip.open: ".gz", lzma.open: ".xz"}[opener]
    path = tmp_path / f"x.jsonl{suffix}"
    rows = [{"text": f"doc é {i}", "other": f"o{i}"} for i in range(45)]
    lines = [json.dumps(r, ensure_ascii=i % 2 == 0).encode() for i, r in enumerate(rows)]
    with opener(path, "wb") as f:
        f.write(b"\n".join([*lines[:20], b"", b'{"text": "", "other": ""}', *lines[20:]]) + b"\n")
    assert texts(path) == [r["text"].encode() for r in rows]
    assert texts(f"{path}#other") == [r["other"].encode() for r in rows]
    parts = [texts(path, s) for s in ("train", "validation", "test")]
    assert sorted(itertools.chain(*parts)) == sorted(texts(path))
    assert [len(p) for p in parts] == [41, 2, 2]
