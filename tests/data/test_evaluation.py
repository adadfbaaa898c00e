"""The evaluation pass: every token scored once, in order, and nothing else."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax.data.config import DataConfig
from atom_jax.data.evaluation import eval_batches
from atom_jax.data.sources import open_source
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import AtomError

TOKENIZER = ByteTokenizer()


def make_cfg(directory, texts, seq_len, batch_size):
    path = directory / "x.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return DataConfig((str(path),), split="all", seq_len=seq_len, batch_size=batch_size)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(alphabet="ab é\n", min_size=1, max_size=60), min_size=1, max_size=8),
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_every_token_is_scored_once_in_order(tmp_path_factory, texts, seq_len, batch_size, overlap):
    overlap = min(overlap, seq_len - 1)
    cfg = make_cfg(tmp_path_factory.mktemp("data"), texts, seq_len, batch_size)
    batches = list(eval_batches(cfg, TOKENIZER, overlap=overlap))
    documents = [[256, *t.encode(), 257] for t in texts]
    scored = []
    for batch in batches:
        for row in range(batch_size):
            scored += batch["targets"][row][batch["loss_mask"][row]].tolist()
    assert scored == [i for d in documents for i in d[1:]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(alphabet="abc", min_size=1, max_size=50), min_size=1, max_size=8), st.integers(2, 16))
def test_segments_hold_one_stretch_of_one_document(tmp_path_factory, texts, seq_len):
    batches = list(eval_batches(make_cfg(tmp_path_factory.mktemp("data"), texts, seq_len, 2), TOKENIZER, overlap=1))
    documents = [bytes([1, *t.encode(), 2]) for t in texts]  # bos and eos as 1 and 2, to search in bytes
    for batch in batches:
        for ids, positions, segments, targets, mask in zip(*batch.values()):
            for s in range(1, segments.max() + 1):
                at = segments == s
                assert positions[at].tolist() == list(range(at.sum()))
                stretch = [*ids[at], targets[at][-1]]
                assert np.array_equal(stretch[1:], targets[at])
                assert any(bytes({256: 1, 257: 2}.get(int(i), int(i)) for i in stretch) in d for d in documents)
            pad = segments == 0
            assert not mask[pad].any() and (ids[pad] == TOKENIZER.pad_id).all()
            assert (np.diff(np.flatnonzero(~pad)) == 1).all() and (pad.all() or not pad[0])


def test_documents_begin_their_own_segment_and_last_batch_is_padded(tmp_path):
    cfg = make_cfg(tmp_path, ["abcdefgh", "xy"], 6, 2)
    (batch,) = eval_batches(cfg, TOKENIZER)
    assert batch["ids"].tolist() == [[256, 97, 98, 99, 100, 101], [102, 103, 104, 256, 120, 121]]
    assert batch["segments"].tolist() == [[1] * 6, [1, 1, 1, 2, 2, 2]]
    assert batch["targets"].tolist() == [[97, 98, 99, 100, 101, 102], [103, 104, 257, 120, 121, 257]]
    (batch,) = eval_batches(make_cfg(tmp_path, ["ab"], 6, 2), TOKENIZER)
    assert batch["segments"].tolist() == [[1, 1, 1, 0, 0, 0], [0] * 6]
    assert batch["loss_mask"].sum() == 3


def test_processes_share_the_rows():
    cfg = DataConfig(split="validation", seq_len=512, batch_size=8)
    whole = list(eval_batches(cfg, TOKENIZER))
    halves = [list(eval_batches(cfg, TOKENIZER, i, 2)) for i in range(2)]
    assert len(whole) == len(halves[0]) == len(halves[1])
    for batch, a, b in zip(whole, *halves):
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([a[key], b[key]]))
    corpora = [open_source(source, "validation") for source in cfg.sources]
    sizes = [len(corpus.read(i)) for corpus in corpora for i in range(len(corpus))]
    assert sum(b["loss_mask"].sum() for b in whole) == sum(sizes) + len(sizes)


def test_long_documents_pass_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("atom_jax.data.evaluation._CHUNK", 64)
    cfg = make_cfg(tmp_path, ["one two three " * 40], 50, 1)
    small = list(eval_batches(cfg, TOKENIZER))
    monkeypatch.undo()
    for a, b in zip(small, eval_batches(cfg, TOKENIZER), strict=True):
        np.testing.assert_array_equal(a["ids"], b["ids"])


def test_bad_arguments():
    cfg = DataConfig(split="validation", seq_len=16, batch_size=3)
    with pytest.raises(AtomError, match="overlap is 16"):
        eval_batches(cfg, TOKENIZER, overlap=16)
    with pytest.raises(AtomError, match="cannot be read by process 0 of 2"):
        eval_batches(cfg, TOKENIZER, 0, 2)
