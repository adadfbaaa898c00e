"""Vocabularies as bytes: against tokenkit's numbers, and what each kind of tokenizer is seen as."""

import base64
import json

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from atom_jax import tokenizers
from atom_jax.tokenizers import ByteTokenizer, suffix, tiktoken, train
from atom_jax.tokenizers.bolmo import BolmoTokenizer
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer, _byte_level_piece, _spaced_piece
from atom_jax.typing import AtomError
from tests.transfer.numbers import numbers, spelled, tokenizer, view


def made(tk: Tokenizer, **config) -> JsonTokenizer:
    files = {"tokenizer.json": tk.to_str(), "tokenizer_config.json": json.dumps(config)}
    return JsonTokenizer.from_files(files, "made")


def test_sentencepiece_vocabulary_as_bytes():
    fixture, seen = numbers("byteify"), view("gemmalike")
    special = {name: i for i, name in seen.special.items()}
    expected = {spelled(token): i for token, i in fixture["gemmalike_byte_vocab"].items() if token not in special}
    assert {piece: ids[0] for piece, ids in seen.ids.items()} == expected
    assert set(seen.pieces) | set(seen.special) == set(fixture["gemmalike_raw_vocab"].values())
    # Both tokens of a collision have their bytes.
    assert seen.ids[b"\\"] == (312, 99) and seen.pieces[99] == b"\\" and 99 in seen.byte_ids
    assert len(expected) + len(special) == 720 < len(seen.pieces) + len(special) == 800


def test_vocabularies_overlap_as_bytes():
    fixture = numbers("byteify")
    both = view("gemmalike").ids.keys() & view("qwenlike").ids.keys()
    raw = tokenizer("gemmalike").backend.get_vocab().keys() & tokenizer("qwenlike").backend.get_vocab().keys()
    assert len(both) == fixture["overlap_byteified"] and len(raw) == fixture["overlap_raw"]


def test_spellings_are_undone_whole():
    """mergekit takes away one mark of a space; bytes, further marks and GPT-2's alphabet stay as they are spelled."""
    special = numbers("normalise")["special_tokens_map"]
    special = [special["bos_token"], special["eos_token"], *special["additional_special_tokens"]]
    for prefix, piece, other in (
        ("▁", _spaced_piece, {"<0x0A>": b"\n", "▁▁": b"  "}),
        ("Ġ", _byte_level_piece, {"ĠĠ": b"  ", "ĠCafÃ©": " Café".encode()}),
    ):
        rows = [
            row for row in numbers("normalise")["rows"] if row["prefix"] == prefix and row["token"] not in special
        ]
        assert len(rows) == 8
        for row in rows:
            assert piece(row["token"]) == other.get(row["token"], row["text"].encode())


@pytest.mark.parametrize("name", ["gpt2like", "qwenlike", "gemmalike"])
def test_texts_are_cut_into_the_same_bytes(name):
    fixture, pieces = numbers("byteify"), view(name).pieces
    for text, tokens in zip(fixture["texts"], fixture["tokens"][name]):
        ids = tokenizer(name).encode(text).tolist()
        assert [pieces[i] for i in ids] == [spelled(token) for token in tokens]


def test_bytes_are_their_own_ids():
    fixture = numbers("byteify")
    for text, tokens in zip(fixture["texts"], fixture["tokens"]["byte"]):
        ids = ByteTokenizer().encode(text).tolist()
        assert ids == [fixture["byte_vocab"][token] for token in tokens] == list(text.encode())


def test_longest_subword_that_ends_at_each_byte():
    expand, seen = numbers("byteify")["expand"], view("qwenlike")
    short = {i: piece for i, piece in seen.pieces.items() if len(piece) <= 16}
    tables = suffix.build(short)
    for ids, expected in zip(expand["byte_ids"], expand["expanded"]):
        rows = np.array([ids]) + suffix.SPECIALS
        np.testing.assert_array_equal(tables.out[suffix.states(tables, rows, 16)[0]], expected)


@pytest.mark.parametrize("name", ["gpt2like", "gemmalike"])
def test_tokens_that_begin_with_space(name):
    assert list(view(name).boundaries) == numbers("byteify")[f"space_mask_{name}"]


def test_pieces_of_parts_of_characters_are_byte_tokens():
    for row in numbers("byteify")["surface_forms"]:
        right = row["gemma_correct"] or row["gemma"]
        assert view("gemmalike").cut(spelled(row["token"])) == right
        ids = view("qwenlike").cut(spelled(row["token"]))
        assert b"".join(view("qwenlike").pieces[i] for i in ids) == spelled(row["token"])
    assert view("gemmalike").cut(b"") == [] and view("gemmalike").cut(b"\xff\xfe") == [262, 261]


def test_roles_digits_and_ends():
    assert view("qwenlike").roles == {"start_header": 0, "eot": 1, "eos": 2}
    assert view("gpt2like").roles == {"eot": 0, "eos": 0, "bos": 0}
    assert view("gemmalike").roles == {"pad": 0, "start_header": 4, "eot": 5, "eos": 1, "bos": 2}
    assert view("qwenlike").digits == 1 < byte_view(train.train("bpe:300", [b"1990 2000 " * 9])).digits
    assert not view("qwenlike").adds_space and view("qwenlike").rewrites == ()


def test_word_piece_has_a_space_before_words():
    words = ["[UNK]", "dog", "##s", "do", "##g", "run"]
    tk = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tk.pre_tokenizer, tk.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tk.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    seen = byte_view(made(tk))
    assert seen.pieces == {1: b" dog", 2: b"s", 3: b" do", 4: b"g", 5: b" run"} and seen.special == {0: "[UNK]"}
    assert seen.cut(b" dogs") == [1, 2] and seen.cut(b" dot") == [] and seen.rewrites == ("NFKC", "Lowercase")


def test_metaspace_adds_a_space_and_runs_of_spaces_are_no_names():
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁a", "▁▁"]
    tk = Tokenizer(models.Unigram([(p, -float(len(p))) for p in pieces], unk_id=0, byte_fallback=True))
    tk.pre_tokenizer, tk.decoder = (
        pre_tokenizers.Metaspace(),
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    tk.add_special_tokens(["<unk>", "<s>"])
    tk.add_tokens([AddedToken("▁▁", normalized=False)])
    seen = byte_view(made(tk, bos_token="<s>"))
    assert seen.adds_space and seen.pieces[259] == b" a" and seen.pieces[260] == b"  " and seen.special[1] == "<s>"
    assert seen.cut(b" a\xc3") == [259, 2 + 0xC3] and seen.roles["bos"] == 1


def test_trained_here_and_bytes():
    seen = byte_view(train.train("unigram:300", [b"the cat sat on the mat " * 20]))
    assert set(seen.special) == {0, 1, 2} and seen.roles["bos"] == 0 and len(seen.ids) == len(seen.pieces)
    assert seen.pieces[seen.cut(b"\xffcat")[0]] == b"\xff"
    plain = byte_view(ByteTokenizer())
    assert plain.cut(b"a\xff") == [97, 255] and plain.special[256] == "<bos>" and plain.longest == 1
    with pytest.raises(AtomError, match="no bytes that could be compared"):
        byte_view(BolmoTokenizer())


def write_tiktoken(path, n):
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"th", b"the", b" the", b" t", b"he"]
    tokens += [b"w%d" % i for i in range(n - len(tokens))]
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), i) for i, t in enumerate(tokens)))
    return str(path)


def test_tiktoken_files(tmp_path, monkeypatch):
    path = write_tiktoken(tmp_path / "small.tiktoken", 300)
    with pytest.raises(AtomError, match="300 tokens; how texts are split is known for files of 50256"):
        tokenizers.from_name(path)
    monkeypatch.setitem(tiktoken._KNOWN, 300, ("gpt-2", {"<|endoftext|>": 301}, None, "<|endoftext|>"))
    tk = tokenizers.from_name(path)
    # "th" comes before " t"; " the" is an entry, so nothing is merged.
    assert [tk.pieces[i] for i in tk.encode("the the thw1")] == [b"the", b" the", b" ", b"th", b"w", b"1"]
    assert tk.eos_ids == (301,) and tk.vocab_size == 302 and byte_view(tk).special == {301: "<|endoftext|>"}
    (tmp_path / "bad.tiktoken").write_text("YQ== 0\nnot base64\n")
    with pytest.raises(AtomError, match="line 2 is not a token"):
        tokenizers.from_name(tmp_path / "bad.tiktoken")
    (tmp_path / "few.tiktoken").write_text("YQ== 0\n")
    with pytest.raises(AtomError, match="a byte has none"):
        tokenizers.from_name(tmp_path / "few.tiktoken")
    with pytest.raises(AtomError, match="cannot be read"):
        tokenizers.from_name(tmp_path / "none.tiktoken")
