"""Files of results: written whole, never in place of something else; what of them is damaged is measured again."""

import json
import math
import os

import pytest

from atom_jax import files, picture
from atom_jax.evaluation import cache
from atom_jax.evaluation.loglik import Score
from atom_jax.evaluation.tasks.reduction import Reducing, ReductionSettings
from atom_jax.models import cct
from atom_jax.typing import LM, AtomError

SCORES = [Score(-1.5 - i, bool(i % 2)) for i in range(4)]


def kept(path):
    items = cache.ItemCache(path, "k")
    items.close()
    return items.done


@pytest.fixture
def items(tmp_path):
    """A file of four rows."""
    one = cache.ItemCache(tmp_path / "r.json.items.jsonl", "k")
    one.add(range(4), SCORES)
    one.close()
    return tmp_path / "r.json.items.jsonl"


def test_a_row_that_changed_is_measured_again(items, capsys):
    items.write_bytes(items.read_bytes().replace(b"-2.5", b"-7.5"))
    assert kept(items) == {i: SCORES[i] for i in (0, 2, 3)}
    assert "1 damaged lines are left out" in capsys.readouterr().err


LINES = [
    b"5", b"[]", b"{}", b"null", b'{"key": "k"}', b"[" * 100_000, b'{"crc": []}', b"\xff",
    b'{"key": 1, "item": 0, "logprob": 0.5, "greedy": true}',
    b'{"key": "k", "item": [], "logprob": 0.5, "greedy": true}',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_lines_that_are_no_rows_hide_none(items, line):
    items.write_bytes(line + b"\n" + items.read_bytes() + line + b"\n")
    assert kept(items) == dict(enumerate(SCORES))


def test_half_a_row_is_dropped(items):
    items.write_bytes(items.read_bytes()[:-9])
    assert kept(items) == dict(enumerate(SCORES[:3])) and items.read_bytes().count(b"\n") == 3
    items.write_bytes(items.read_bytes().splitlines(True)[0][:30])
    assert kept(items) == {} and items.read_bytes() == b""


def test_rows_without_checksums_count(items):
    rows = [json.loads(line) for line in items.read_text().splitlines()]
    items.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "crc"}) + "\n" for row in rows))
    assert kept(items) == dict(enumerate(SCORES))


@pytest.mark.parametrize("text", ["my notes", '{"a": 1}', "{\n}\n", "a\nb\n", "[1]\n"])
def test_a_file_of_somebody_else_stays_as_it_is(tmp_path, text):
    (tmp_path / "x").write_text(text)
    with pytest.raises(AtomError, match="is not a cache"):
        kept(tmp_path / "x")
    assert (tmp_path / "x").read_text() == text


def test_a_second_evaluation_is_refused(items):
    first = cache.ItemCache(items, "k")
    with pytest.raises(AtomError, match="another evaluation writes there"):
        cache.ItemCache(items, "k")
    first.close()
    assert kept(items)


def test_out(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "text").write_text("mine")
    (tmp_path / "kept.json").write_text('{"fingerprint": "f", "tasks": {"bpb": {}, "kv": {}}}')
    (tmp_path / "drawn.png").mkdir()
    bad = ["", "pipe", "loop", "text", "a.png", "..", "text/x.json", "drawn.json", "\0", "x" * 300]
    for name in bad:
        with pytest.raises(AtomError, match="--out="):
            cache.check_out(tmp_path / name)
    cache.check_out(tmp_path / "kept.json")
    cache.check_out(tmp_path / "new" / "r.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drawn.png", "kept.json", "loop", "pipe", "text"]


def test_devices_pipes_and_links(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="else than a regular file"):
        files.write_text(tmp_path / "pipe", "x")
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"


def test_what_is_interrupted_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replaced(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), picture.drawn(path):
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_are_null(tmp_path):
    cache.write_json(tmp_path / "a", {"rows": [{"stderr": math.nan, "value": (1.5, -math.inf)}]})
    assert json.loads((tmp_path / "a").read_text()) == {"rows": [{"stderr": None, "value": [1.5, None]}]}


def test_an_unknown_split_of_labelled_images():
    with pytest.raises(AtomError, match=r"reduction\.split=x: expected one of train, validation"):
        lm = LM(cct.CCTConfig(), {}, None)
        Reducing().run(lm, ReductionSettings(source="numerals", split="x"), None, None)
