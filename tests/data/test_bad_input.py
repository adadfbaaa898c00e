"""Bad sources and bad configurations: one sentence that names what is wrong."""

import gzip

import pytest

from atom_jax.data.config import DataConfig
from atom_jax.data.pipeline import make_iterator
from atom_jax.data.sources import open_source
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import AtomError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": ()}, "data.sources"),
        ({"sources": "austen"}, "data.sources"),
        ({"weights": (1, 2)}, "data.weights has 2 numbers for 1 sources"),
        ({"weights": (0,)}, "data.weights must be positive"),
        ({"weights": (float("nan"),)}, "weights: expected a number"),
        ({"split": "dev"}, "data.split is 'dev'"),
        ({"seq_len": 0}, "data.seq_len is 0"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"seed": -1}, "data.seed is -1"),
        ({"piece_bytes": 10}, "data.piece_bytes is 10"),
        ({"marks": "bpe:300"}, "data.marks is 'bpe:300': it must be empty or unigram:SIZE"),
        ({"marks": "unigram"}, "data.marks is 'unigram'"),
        ({"marks": "unigram:10"}, "at least 259"),
    ],
)
def test_config(fields, message):
    with pytest.raises(AtomError, match=message):
        DataConfig(**fields)


def refused(source, message, split="all"):
    with pytest.raises(AtomError, match=message) as e:
        open_source(str(source), split)
    assert "\n" not in str(e.value)


def test_nothing_there(tmp_path):
    refused(tmp_path / "nowhere.txt", "There is no source .*nowhere.txt")
    refused(tmp_path / "*.txt", "There is no source")
    refused("austin", "There is no source austin")
    refused(tmp_path, "holds no files")
    (tmp_path / "empty.txt").write_bytes(b"")
    refused(tmp_path / "empty.txt", "empty.txt has no text")
    refused(tmp_path, "has no text in its all split")


@pytest.mark.parametrize("where", [0, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 7])
def test_text_not_utf8_names_the_byte(tmp_path, where):
    path = tmp_path / "x.txt"
    path.write_bytes(b"a" * where + b"\xe9" + b"a" * 10)
    refused(path, f"x.txt is not UTF-8 at byte {where}\\.")


def test_text_that_ends_inside_a_character(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"abc\xe6\xbc")
    refused(path, r"x.txt is not UTF-8 at byte 3\.")


def test_characters_across_the_read_blocks_are_fine(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"a" * ((1 << 20) - 1) + "漢".encode())
    assert open_source(str(path), "all").sizes.tolist() == [(1 << 20) + 2]


def test_damaged_gzip(tmp_path):
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    for name in ("x.jsonl.gz", "x.txt.gz", "x.txt.xz"):
        path = tmp_path / name
        for content in (b"not packed at all", packed[:-10], packed[:30] + b"\0\0\0\0" + packed[34:]):
            path.write_bytes(content)
            refused(path, f"{name} cannot be decompressed")
    path = tmp_path / "y.txt.gz"
    path.write_bytes(gzip.compress(b"ab\xff"))
    refused(path, "y.txt.gz, decompressed, is not UTF-8 at byte 2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", "line 2 is not JSON"),
        (b'["text"]', "line 2 has no string under the field 'text'"),
        (b'{"body": "x"}', "line 2 has no string under the field 'text'"),
        (b'{"text": 3}', "line 2 has no string under the field 'text'"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', "line 2 has a lone surrogate"),
        (b"\xff\xfe{", "line 2 is not"),
        (b"[" * 100_000, "line 2 is not JSON"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_line_is_named(tmp_path, line, message, suffix):
    content = b'{"text": "fine"}\n' + line + b"\n"
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    refused(path, message)


def test_wrong_kinds(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}')
    refused(tmp_path, "holds jsonl and text files")
    refused(f"{tmp_path}/a.txt#body", "only .jsonl files and tfds directories have fields")


def test_missing_split(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("text")
    refused(tmp_path, "has no validation split: it has test, train", "validation")
    path = tmp_path / "short.txt"
    path.write_text("word")
    refused(path, "has no text in its test split", "test")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text("text")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    refused(path, "x.txt cannot be read: .*Permission denied")


def test_processes():
    with pytest.raises(AtomError, match="batch_size 6 does not divide by the 4 processes"):
        make_iterator(DataConfig(batch_size=6), ByteTokenizer(), 0, 4)
    with pytest.raises(AtomError, match="process_index 2"):
        make_iterator(DataConfig(), ByteTokenizer(), 2, 2)


def test_error_in_the_background_thread_reaches_the_caller(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"word " * 1000)
    iterator = make_iterator(DataConfig((str(path),), split="all"), ByteTokenizer())
    path.unlink()
    with pytest.raises(AtomError, match=r"x\.txt cannot be read: No such file"):
        for _ in range(10):
            next(iterator)
