"""Tokens cut in two, and middles to be filled in: same text, same draws whoever reads, and what does not go."""

import dataclasses
import functools
import json

import numpy as np
import pytest

from atom_jax.data.augment import infill, places
from atom_jax.data.config import DataConfig
from atom_jax.data.pipeline import make_iterator, merge_states, reader
from atom_jax.tokenizers import BolmoTokenizer, ByteTokenizer, train
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import AtomError
from tests.transfer.numbers import tokenizer

MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TEXT = "the cat sat on\nthe mat, and the café\nwas near the hat "


@functools.cache
def marked():
    """A tokenizer with tokens for middles to be filled in."""
    tk = train.train("bpe:300", [TEXT.encode() * 9]).backend
    tk.add_special_tokens(list(MARKS))
    files = {"tokenizer.json": tk.to_str(), "tokenizer_config.json": json.dumps({"eos_token": tk.id_to_token(1)})}
    return JsonTokenizer.from_files(files, "marked")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {TEXT * (1 + i % 5)}"}) + "\n" for i in range(20)))
    return DataConfig((str(path),), split="all", seq_len=64, batch_size=4, seed=3, piece_bytes=128)


def texts(batch, tk):
    """Of every segment of a batch, its bytes without special tokens and its ids."""
    for ids, segments in zip(batch["ids"], batch["segments"]):
        for n in range(1, segments.max() + 1):
            yield tk.decode_bytes(ids[segments == n]), ids[segments == n]


def test_documents_in_two_cuts_are_the_same_text(cfg):
    cfg = dataclasses.replace(cfg, whole=True, piece_bytes=0, seq_len=400, shuffle=False)
    plain, cut = (make_iterator(dataclasses.replace(cfg, stochastok=p), marked()) for p in (0.0, 0.3))
    found = []
    for iterator in (plain, cut):
        found.append([doc for _ in range(3) for doc in texts(next(iterator), marked())])
    by_text = {text: len(ids) for text, ids in found[0]}
    grown = [len(ids) / by_text[text] for text, ids in found[1] if text in by_text]
    assert len(grown) > 10 and 1.05 < np.mean(grown) < 1.3


def test_what_is_drawn_depends_on_the_piece_alone(cfg):
    cfg = dataclasses.replace(cfg, stochastok=0.3, fim=0.5)
    iterator = make_iterator(cfg, marked())
    before, state = [next(iterator) for _ in range(3)], json.loads(json.dumps(iterator.get_state()))
    after = [next(iterator) for _ in range(3)]
    assert MARKS[0].encode() in b"".join(text for batch in before for text, _ in texts(batch, marked()))
    halves = [make_iterator(cfg, marked(), i, 2) for i in range(2)]
    for expected in before:
        parts = [next(half) for half in halves]
        np.testing.assert_array_equal(np.concatenate([p["ids"] for p in parts]), expected["ids"])
    merged = merge_states([half.get_state() for half in halves])
    assert merged == state
    resumed = make_iterator(cfg, marked())
    resumed.set_state(merged)
    for expected in after:
        batch = next(resumed)
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name], value)
    other = make_iterator(dataclasses.replace(cfg, stochastok=0.2), marked())
    with pytest.raises(AtomError, match=r"saved with stochastok=0\.3, and this run has 0\.2"):
        other.set_state(state)
    with pytest.raises(AtomError, match=r"saved with stochastok=0\.3, and this run has None"):
        make_iterator(dataclasses.replace(cfg, stochastok=0.0), marked()).set_state(state)


def test_states_from_before_stay_valid_and_validation_is_plain(cfg):
    state = make_iterator(cfg, marked()).get_state()
    assert not {"stochastok", "fim", "fim_layouts", "fim_cut", "fim_middle"} & state["config"].keys()
    changed = dataclasses.replace(cfg, stochastok=0.1, fim=0.5, fim_layouts=("spm",), fim_cut="line", fim_middle=True)
    assert changed.held_out("test", 2) == dataclasses.replace(cfg, split="test", batch_size=2, seed=0)


def test_epochs_differ(cfg):
    read = reader(dataclasses.replace(cfg, stochastok=0.3), marked())
    piece = {"text": TEXT.encode(), "first": True, "last": True}
    cut = [read(piece | {"number": n}).ids.tolist() for n in (0, 0, 20)]
    assert cut[0] == cut[1] != cut[2]
    assert {marked().decode(ids) for ids in cut} == {marked().decode(reader(cfg, marked())(piece).ids)}


def test_parts_are_learned_where_their_token_was(cfg):
    cfg = dataclasses.replace(cfg, stochastok=2.0, prompt_end="sat")
    tokens = reader(cfg, marked())({"text": TEXT.encode(), "first": True, "last": True})
    before, after = (marked().decode_bytes(tokens.ids[m]) for m in (~tokens.learned, tokens.learned))
    assert before.endswith(b"the cat sat") and after == TEXT[11:].encode() + marked().decode_bytes(tokens.ids[-1:])


@pytest.mark.parametrize(
    "layout,expected",
    [("psm", "{P}the c{S} mat{M}at on"), ("spm", "{P}{S} mat{M}the cat on"), ("spm_bare", "{S} mat{M}the cat on")],
)
def test_layouts(layout, expected):
    tk = marked()
    marks = tuple(tk.backend.token_to_id(name) for name in MARKS)
    ids, middle = infill(b"the cat on mat", (5, 10), layout, tk, marks)
    assert tk.decode(ids) == expected.format(**dict(zip("PSM", MARKS)))
    assert tk.decode(ids[middle]) == "at on" and middle[-1] and ids.dtype == np.int32


def test_middles_come_from_everywhere_and_nothing_is_lost(cfg):
    tk = marked()
    cfg = dataclasses.replace(cfg, fim=0.75, fim_middle=True)
    read = reader(cfg, tk)
    told, layouts, lengths = 0, set(), []
    for n in range(200):
        tokens = read({"text": TEXT.encode(), "first": True, "last": True, "number": n})
        text = tk.decode(tokens.ids[1:-1])
        if tokens.learned is None:
            assert text == TEXT
            continue
        told += 1
        _, rest = text.split(MARKS[1])
        suffix, end = rest.split(MARKS[2])
        prefix = text.split(MARKS[1])[0].removeprefix(MARKS[0])
        layouts.add("psm" if prefix else "spm" if suffix else "")
        middle = tk.decode(tokens.ids[:-1][tokens.learned[:-1]])
        assert prefix + end + suffix == TEXT and end.endswith(middle) and tokens.learned[-1] and not tokens.learned[0]
        lengths.append(len(middle))
    assert 0.65 < told / 200 < 0.85 and {"psm", "spm"} <= layouts
    assert np.mean(lengths) == pytest.approx(len(TEXT) / 3, rel=0.2)


def test_places_to_cut():
    text = "ab\né c\n".encode()
    assert places(text, "", marked()).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert places(text, "line", marked()).tolist() == [0, 3, 8]
    ends = marked().spans(text)[1][:, 1]
    assert places(text, "token", marked()).tolist() == [0, *ends.tolist()] and places(b"", "", marked()).tolist() == [
        0
    ]


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"stochastok": -1.0}, "stochastok: expected a number from 0 to 4"),
        ({"stochastok": 0.1, "marks": "unigram:300"}, r"data\.stochastok cuts tokens in two, which data\.marks"),
        ({"stochastok": 0.1, "tokens": 8}, r"data\.stochastok cuts tokens in two, which data\.tokens"),
        ({"fim": 2.0}, "fim: expected a number from 0 to 1"),
        ({"fim": 0.5, "chat": True, "whole": True}, r"data\.fim .* data\.chat"),
        ({"fim": 0.5, "prompt_end": ";"}, r"data\.fim .* data\.prompt_end"),
        ({"fim_middle": True}, r"data\.fim_middle says how data\.fim is done"),
        ({"fim": 0.5, "fim_layouts": ("pms",)}, r"data\.fim_layouts has 'pms': they must be of psm, spm"),
        ({"fim": 0.5, "fim_cut": "word"}, r"data\.fim_cut is 'word'"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(AtomError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize(
    "fields,tk,message",
    [
        ({"stochastok": 0.1}, ByteTokenizer(), r"data\.stochastok: bytes has no token that is made of two others"),
        ({"stochastok": 0.1}, BolmoTokenizer(), r"data\.stochastok: bolmo: its tokens have no bytes"),
        ({"fim": 0.5}, ByteTokenizer(), r"data\.fim: bytes has no tokens such as <\|fim_prefix\|>"),
        ({"fim": 0.5}, tokenizer("qwenlike"), r"data\.fim: qwenlike has no tokens such as"),
    ],
)
def test_tokenizers_that_lack_what_it_takes(cfg, fields, tk, message):
    with pytest.raises(AtomError, match=message):
        make_iterator(dataclasses.replace(cfg, **fields), tk)
