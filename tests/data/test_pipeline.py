"""The training stream: packing, determinism, resuming, sharing among processes, mixing."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax.data.config import DataConfig
from atom_jax.data.packing import piece_tokens
from atom_jax.data.pipeline import make_iterator, merge_states, open_pieces, piece_stream
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import AtomError

KEYS = ("ids", "positions", "segments", "targets", "loss_mask")


class EosOnly(ByteTokenizer):
    """Like the tokenizers that have an end of text and no beginning."""

    bos_id = None


class Bare(ByteTokenizer):
    """A tokenizer without special ids."""

    bos_id = None
    eos_ids = ()


TOKENIZERS = (ByteTokenizer(), EosOnly(), Bare())


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def reference_rows(tokenizer, cfg, row, n_rows):
    """The first rows of a lane, token by token from the definition."""
    stream = piece_stream(cfg, open_pieces(cfg, tokenizer))
    tokens, k = [], 0  # (id, piece, target or None)
    while len(tokens) < cfg.seq_len * n_rows:
        ids = piece_tokens(stream[row + k * cfg.batch_size], tokenizer).ids.tolist()
        tokens += [(i, k, t) for i, t in zip(ids, [*ids[1:], None])]
        k += 1
    rows = []
    for n in range(n_rows):
        out, segment, position, before = {key: [] for key in KEYS}, 0, 0, None
        for i, piece, target in tokens[n * cfg.seq_len : (n + 1) * cfg.seq_len]:
            if piece != before:
                segment, position, before = segment + 1, 0, piece
            values = (
                i,
                position,
                segment,
                tokenizer.pad_id if target is None else target,
                target is not None,
            )
            for key, value in zip(KEYS, values):
                out[key].append(value)
            position += 1
        rows.append(out)
    return rows


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.text(alphabet="ab é漢 \n", min_size=1, max_size=300), min_size=1, max_size=6),
    st.integers(1, 40),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(TOKENIZERS),
)
def test_rows_equal_the_reference(tmp_path_factory, texts, seq_len, batch_size, shuffle, tokenizer):
    source = write_jsonl(tmp_path_factory.mktemp("data") / "x.jsonl", texts)
    cfg = DataConfig((source,), (), "all", seq_len, batch_size, shuffle=shuffle)
    iterator = make_iterator(cfg, tokenizer)
    batches = [next(iterator) for _ in range(5)]
    for row in range(batch_size):
        for batch, expected in zip(batches, reference_rows(tokenizer, cfg, row, 5)):
            for key in KEYS:
                assert batch[key][row].tolist() == expected[key], key


def test_dtypes_and_shapes():
    batch = next(make_iterator(DataConfig(seq_len=32, batch_size=4), ByteTokenizer()))
    assert tuple(batch) == KEYS
    for key in KEYS:
        assert batch[key].shape == (4, 32)
        assert batch[key].dtype == (bool if key == "loss_mask" else np.int32)


def test_every_piece_once_per_epoch_in_a_new_order(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [f"document {i} " * (i + 1) for i in range(30)])
    cfg = DataConfig((source,), split="all", piece_bytes=64)
    pieces = open_pieces(cfg, ByteTokenizer())
    n = len(pieces[0])
    stream = piece_stream(cfg, pieces)
    key = lambda piece: (piece["text"], piece["first"], piece["last"])  # noqa: E731
    epochs = [[key(stream[e * n + i]) for i in range(n)] for e in range(3)]
    in_order = [key(pieces[0][i]) for i in range(n)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(in_order)
        assert epoch != in_order
    assert epochs[0] != epochs[1] != epochs[2]
    # Neighbours of one document are far apart now.
    longest = [i for i, piece in enumerate(epochs[0]) if piece[0].strip().startswith(b"document 29")]
    assert longest[-1] - longest[0] > n // 4


def test_special_ids_by_tokenizer():
    piece = {"text": b"hi", "first": True, "last": True}
    assert piece_tokens(piece, ByteTokenizer()).ids.tolist() == [256, 104, 105, 257]
    assert piece_tokens(piece, EosOnly()).ids.tolist() == [257, 104, 105, 257]
    assert piece_tokens(piece, Bare()).ids.tolist() == [104, 105]
    assert piece_tokens(piece | {"first": False}, ByteTokenizer()).ids.tolist() == [104, 105, 257]
    assert piece_tokens(piece | {"last": False}, ByteTokenizer()).ids.tolist() == [256, 104, 105]


def take(iterator, n):
    return [next(iterator) for _ in range(n)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        for key in KEYS:
            np.testing.assert_array_equal(x[key], y[key])


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    a = write_jsonl(directory / "a.jsonl", [f"a long document {i} with many words " * (7 * i) for i in range(1, 9)])
    b = write_jsonl(directory / "b.jsonl", [f"short {i}" for i in range(70)])
    return DataConfig((a, b), (3, 1), "all", seq_len=48, batch_size=8, seed=5, piece_bytes=128)


@pytest.fixture(scope="module")
def uninterrupted(cfg):
    return take(make_iterator(cfg, ByteTokenizer()), 24)


def test_same_seed_same_batches_other_seed_other_batches(cfg, uninterrupted):
    assert_same(take(make_iterator(cfg, ByteTokenizer()), 3), uninterrupted[:3])
    other = next(make_iterator(dataclasses.replace(cfg, seed=6), ByteTokenizer()))
    assert (other["ids"] != uninterrupted[0]["ids"]).any()


@pytest.mark.parametrize("at", [0, 1, 2, 7, 13])
def test_resume_equals_uninterrupted(cfg, uninterrupted, at):
    iterator = make_iterator(cfg, ByteTokenizer())
    take(iterator, at)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    resumed = make_iterator(cfg, ByteTokenizer())
    take(resumed, 3)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, 10), uninterrupted[at : at + 10])


def test_going_back_on_a_live_iterator(cfg, uninterrupted):
    iterator = make_iterator(cfg, ByteTokenizer())
    take(iterator, 4)
    state = iterator.get_state()
    take(iterator, 5)
    iterator.set_state(state)
    assert_same(take(iterator, 4), uninterrupted[4:8])


@pytest.mark.parametrize("count", [2, 4])
def test_global_batch_does_not_depend_on_processes(cfg, uninterrupted, count):
    iterators = [make_iterator(cfg, ByteTokenizer(), i, count) for i in range(count)]
    for expected in uninterrupted[:6]:
        parts = [next(it) for it in iterators]
        assert_same([{k: np.concatenate([p[k] for p in parts]) for k in KEYS}], [expected])


@pytest.mark.parametrize(("before", "after"), [(4, 2), (1, 4), (2, 1)])
def test_state_moves_to_another_number_of_processes(cfg, uninterrupted, before, after):
    iterators = [make_iterator(cfg, ByteTokenizer(), i, before) for i in range(before)]
    for it in iterators:
        take(it, 5)
    state = json.loads(json.dumps(merge_states([it.get_state() for it in reversed(iterators)])))
    parts = []
    for i in range(after):
        it = make_iterator(cfg, ByteTokenizer(), i, after)
        it.set_state(state)
        parts.append(take(it, 4))
    joined = [{k: np.concatenate([p[k] for p in step]) for k in KEYS} for step in zip(*parts)]
    assert_same(joined, uninterrupted[5:9])


def test_state_of_another_configuration_is_refused(cfg):
    state = make_iterator(cfg, ByteTokenizer()).get_state()
    other = make_iterator(dataclasses.replace(cfg, seed=6), ByteTokenizer())
    with pytest.raises(AtomError, match="saved with seed=5, and this run has 6"):
        other.set_state(state)
    half = make_iterator(cfg, ByteTokenizer(), 1, 2)
    with pytest.raises(AtomError, match="other rows"):
        make_iterator(cfg, ByteTokenizer(), 0, 2).set_state(half.get_state())
    with pytest.raises(AtomError, match="not those of all processes"):
        merge_states([half.get_state()])
    with pytest.raises(AtomError, match="not one that this iterator made"):
        half.set_state({"next_index": 3})


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.1, 0.9)])
def test_mixing_proportions_are_of_bytes(tmp_path, weights):
    short = write_jsonl(tmp_path / "short.jsonl", ["a" * 40] * 50)
    long = write_jsonl(tmp_path / "long.jsonl", ["b " * 700] * 50)
    cfg = DataConfig((short, long), weights, "all", piece_bytes=512)
    stream = piece_stream(cfg, open_pieces(cfg, ByteTokenizer()))
    text = b"".join(stream[i]["text"] for i in range(2000))
    share = text.count(b"a") / len(text)
    assert abs(share - weights[0] / sum(weights)) < 0.02


def test_without_weights_sources_are_joined(tmp_path):
    sources = tuple(
        write_jsonl(tmp_path / f"{c}.jsonl", [f"{c}{i}" for i in range(n)]) for c, n in (("a", 3), ("b", 9))
    )
    stream = piece_stream(cfg := DataConfig(sources, split="all"), open_pieces(cfg, ByteTokenizer()))
    epoch = sorted(stream[i]["text"] for i in range(12))
    assert epoch == sorted([b"a%d" % i for i in range(3)] + [b"b%d" % i for i in range(9)])
