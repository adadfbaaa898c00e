"""tokenizer.json: ids, exact bytes, spans, special tokens, bad files."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import AtomError

CORPUS = ["the cat sat on the mat, the dog too", "naïve café — “quoted”", "東京 in 東京", "x = f(12)\n\n\ty"] * 3
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def byte_level(normalizer=None) -> Tokenizer:
    tk = Tokenizer(models.BPE())
    if normalizer is not None:
        tk.normalizer = normalizer
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=alphabet)
    tk.train_from_iterator(CORPUS, trainer)
    return tk


def sentencepiece_style() -> Tokenizer:
    pieces = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "▁c", "at", "a", "t", "h", "e"]
    tk = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[("a", "t")], byte_fallback=True))
    tk.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tk.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tk


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    return JsonTokenizer.from_files({"tokenizer.json": byte_level().to_str()}, "bpe")


@FUZZ
@given(text=st.text(max_size=60))
def test_byte_level_spans_tile_the_text(bpe, text):
    data = text.encode("utf-8")
    ids, spans = bpe.spans(text)
    assert ids.dtype == spans.dtype == np.int32 and spans.shape == (len(ids), 2)
    np.testing.assert_array_equal(ids, bpe.encode(text))
    np.testing.assert_array_equal(np.concatenate([[0], spans[:, 1]]), np.concatenate([spans[:, 0], [len(data)]]))
    assert [bpe.decode_bytes([i]) for i in ids] == [data[a:b] for a, b in spans]
    assert bpe.decode(ids) == text


def test_a_token_may_be_part_of_a_character(bpe):
    ids, spans = bpe.spans("🙂")
    assert len(ids) > 1 and spans[0, 1] < 4
    assert bpe.decode(ids[:1]) == "\ufffd" and bpe.decode_bytes(ids[:1]) == "🙂".encode()[: spans[0, 1]]


def test_bytes_are_read_as_utf8(bpe):
    np.testing.assert_array_equal(bpe.encode("東京".encode()), bpe.encode("東京"))
    with pytest.raises(AtomError, match="not valid UTF-8 at byte 1"):
        bpe.encode(b"a\xff")
    with pytest.raises(AtomError, match="lone surrogate at character 1"):
        bpe.encode("a\ud800")


def test_names_of_special_tokens_are_those_tokens(bpe):
    ids, spans = bpe.spans("é<|end|>b")
    assert 0 in ids
    assert tuple(spans[list(ids).index(0)]) == (2, 9)
    assert bpe.decode_bytes(ids) == "é<|end|>b".encode()


def test_normalised_text_still_has_spans_over_all_of_it():
    tk = JsonTokenizer.from_files({"tokenizer.json": byte_level(normalizers.NFC()).to_str()}, "nfc")
    text = "cafe\u0301 東 e\u0301"
    ids, spans = tk.spans(text)
    assert tk.decode(ids) == "café 東 é"
    assert spans[0, 0] == 0 and spans[-1, 1] == len(text.encode())
    assert (spans[1:, 0] <= spans[:-1, 1]).all() and (spans[:, 0] < spans[:, 1]).all()


def test_byte_fallback_is_exact():
    tk = JsonTokenizer.from_files({"tokenizer.json": sentencepiece_style().to_str()}, "spm")
    ids, spans = tk.spans("the é cat")
    assert tk.decode_bytes(ids) == "the é cat".encode()
    e_acute = [i for i in ids if 2 <= i < 258]
    assert tk.decode_bytes(e_acute[:1]) == b"\xc3" and tk.decode(e_acute[:1]) == "\ufffd"
    assert spans[-1, 1] == len("the é cat".encode()) and spans.min() == 0


def test_stored_truncation_padding_and_templates_do_not_act():
    tk = byte_level()
    tk.enable_truncation(2)
    tk.enable_padding(length=9)
    loaded = JsonTokenizer.from_files({"tokenizer.json": tk.to_str()}, "x")
    assert loaded.decode(loaded.encode("the cat sat on the mat")) == "the cat sat on the mat"


def test_special_ids_come_from_the_neighbouring_files(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    bare = JsonTokenizer(tmp_path)
    assert (bare.bos_id, bare.eos_ids, bare.pad_id) == (None, (), 0)
    tokens = {"eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>", "bos_token": "not there"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [0, 7], "bos_token_id": 5, "vocab_size": 500}))
    tk = JsonTokenizer(tmp_path)
    assert (tk.bos_id, tk.eos_ids, tk.pad_id) == (5, (0, 7), 1)
    # Ids of padding rows stand for nothing; ids beyond them are an error.
    assert tk.decode([499]) == ""
    with pytest.raises(AtomError, match="500 is outside"):
        tk.decode([500])
    with pytest.raises(AtomError, match="-1 is outside"):
        tk.decode([-1])


def test_save_keeps_the_files(tmp_path):
    source, out = tmp_path / "a", tmp_path / "b"
    source.mkdir(), out.mkdir()
    byte_level().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_bytes('{"eos_token": "<|end|>",\r\n "chat_template": "é"}'.encode())
    JsonTokenizer(source).save(out)
    assert {p.name for p in out.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    (tmp_path / "c").mkdir()
    JsonTokenizer(source / "tokenizer.json").save(tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer_config.json").exists()


def test_from_name_finds_it(tmp_path):
    from atom_jax import tokenizers

    byte_level().save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert isinstance(tk := tokenizers.from_name(str(path)), tokenizers.Tokenizer)
        assert tk.name == str(path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\ufeff{}", '{"model": {"type": "BPE", "vocab": {}}}'])
def test_a_bad_file_is_one_sentence(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(AtomError, match=r"tokenizer\.json"):
        JsonTokenizer(tmp_path)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(AtomError, match=r"no tokenizer\.json"):
        JsonTokenizer(tmp_path)
    with pytest.raises(AtomError, match="cannot be read"):
        JsonTokenizer(tmp_path / "nowhere.json")
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(AtomError, match="not UTF-8"):
        JsonTokenizer(tmp_path)
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(AtomError, match=r"tokenizer_config\.json is not a JSON object"):
        JsonTokenizer(tmp_path)
