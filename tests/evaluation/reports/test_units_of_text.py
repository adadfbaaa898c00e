"""Units of a text: where they are, what is said about them, how they look."""

import json
import math

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import atom_jax
from atom_jax import params
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.chunking.rules.symbol import Symbol
from atom_jax.chunking.types import END, START
from atom_jax.evaluation import encode
from atom_jax.evaluation.reports import unit_strip, units
from atom_jax.models import hnet
from atom_jax.models.hnet import chunking
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.tokenizers.hat import HatTokenizer
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import LM, AtomError
from tests.models import tiny_bolmo

TEXT = "It was a truth, universally acknowledged."
WORDS = Chunking(rule=Spaces(), pool="last")
PAIRS = Chunking(rule=Fixed(stride=2), pool="last")


def model(*stages: Chunking, tokenizer=None) -> LM:
    n = len(stages) + 1
    cfg = hnet.HNetConfig(
        vocab_size=264, layout=("T1",) * (2 * n - 1), d_model=(16,) * n, d_intermediate=(16,) * n, n_heads=(2,) * n,
        rotary_dim=(8,) * n, window=(15,) + (-1,) * (n - 1), chunking=stages, max_length=256, bos_id=256,
        eos_ids=(257,), pad_id=258,
    )  # fmt: skip
    return LM(cfg, params.init(jax.random.key(0), hnet.spec(cfg)), tokenizer or ByteTokenizer())


@pytest.fixture(scope="module")
def words() -> LM:
    return model(WORDS)


@pytest.fixture(scope="module")
def nested() -> LM:
    return model(WORDS, PAIRS)


def pieces(found: units.Units, s: int = 0) -> list[str]:
    return [found.text[a:b].decode() for a, b in found.stages[s].spans]


def test_units_that_end_at_spaces(words):
    found = units.units(words, TEXT)
    assert pieces(found) == ["It ", "was ", "a ", "truth, ", "universally ", "acknowledged."]
    (stage,) = found.stages
    assert stage.spans.dtype == np.int32 and stage.begins.dtype == np.float32
    assert np.flatnonzero(stage.begins).tolist() == stage.spans[1:, 0].tolist()
    assert found.windows[0] == 1 and found.learned


def test_units_that_a_router_starts():
    lm = model(chunking(4.0, 0.5))
    found = units.units(lm, TEXT.encode())
    aux = atom_jax.apply(lm, [[256, *TEXT.encode()]]).aux
    marks, probs = np.asarray(aux["boundaries"][0])[0, 1:], np.asarray(aux["boundary_probs"][0])[0, 1:]
    assert found.stages[0].spans[1:, 0].tolist() == [i for i in np.flatnonzero(marks) if i]
    assert np.allclose(found.stages[0].begins[1:], probs[1:], atol=1e-6)
    assert found.stages[0].spans[-1, 1] == len(TEXT)


def test_units_of_units(nested):
    found = units.units(nested, TEXT)
    assert pieces(found) == ["It ", "was ", "a ", "truth, ", "universally ", "acknowledged."]
    # The unit that begins a document and holds nothing counts as one.
    assert pieces(found, 1) == ["It ", "was a ", "truth, universally ", "acknowledged."]
    assert np.flatnonzero(found.stages[1].begins).tolist() == found.stages[1].spans[1:, 0].tolist()


def test_edges_of_stages_that_mark_beginnings_and_ends():
    outer = np.isin(np.arange(8), [0, 2, 5])
    inner = np.isin(np.arange(8), [2])
    # The unit that begins at 2 ends before 5; the unit that ends at 5 begins after 2.
    assert units._edges([outer, inner], [START, END])[1][2] == 5
    assert units._edges([outer, np.isin(np.arange(8), [5])], [END, START])[1][5] == 3
    assert units._edges([outer, inner], [START, START])[1][2] == 2
    assert units._edges([outer, inner], [END, END])[1][2] == 3
    # Nothing follows the last beginning, and nothing is before the first end.
    assert units._edges([outer, np.isin(np.arange(8), [5])], [START, END])[1][5] == 8
    assert units._edges([outer, np.isin(np.arange(8), [0])], [END, START])[1][0] == 0


def test_long_texts_are_read_in_windows(words):
    text = TEXT * 3
    whole, parts = units.units(words, text), units.units(words, text, length=32)
    assert whole.windows[0] == 1 and parts.windows[0] > 3 and parts.windows[1:] == (32, 15)
    assert np.array_equal(whole.stages[0].spans, parts.stages[0].spans)
    assert np.array_equal(whole.stages[0].begins, parts.stages[0].begins)
    assert parts.entropy.shape == (len(text),) and np.isfinite(parts.entropy).all()
    assert np.allclose(whole.entropy[:31], parts.entropy[:31], atol=1e-5)


def test_symbols_that_the_tokenizer_adds_are_no_bytes():
    symbol = Chunking(rule=Symbol(), pool="last")
    found = units.units(model(symbol, tokenizer=HatTokenizer()), "Hello, world!")
    assert pieces(found) == ["Hello,", " world!"]
    assert found.entropy.shape == (13,) and np.isfinite(found.entropy).all()


def test_numbers_about_units(words):
    text = "ab é  c"
    found = units.units(words, text)
    logits = np.asarray(atom_jax.apply(words, [[256, *text.encode()]]).logits[0, :-1], np.float64)
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    entropy = -(np.exp(logp) * logp).sum(1)
    assert np.allclose(found.entropy, entropy, atol=1e-5)
    numbers = units.statistics(found, 0)
    # [ab ][é ][ ][c]: 8 bytes.
    assert numbers["units"] == 4 and numbers["bytes_per_unit"] == 2
    assert numbers["at_word_edge"] == numbers["at_character_edge"] == 1
    assert numbers["entropy_at_units"] == pytest.approx(entropy[[3, 6, 7]].mean(), abs=1e-5)
    assert numbers["entropy_elsewhere"] == pytest.approx(entropy[[1, 2, 4, 5]].mean(), abs=1e-5)


def test_numbers_about_units_within_words_and_characters():
    found = units.units(model(PAIRS), "aéé b")
    # With the front token, the first pair shows one byte: [a][é][é][ b].
    assert pieces(found) == ["a", "é", "é", " b"]
    numbers = units.statistics(found, 0)
    assert numbers["at_character_edge"] == 1 and numbers["at_word_edge"] == pytest.approx(1 / 3)
    broken = units.units(model(PAIRS), "éab")
    numbers = units.statistics(broken, 0)
    assert numbers["at_character_edge"] == 0.5 and numbers["at_word_edge"] == 0
    assert units.render(broken).splitlines()[1] == "[<C3>][<A9>a][b]"


def test_one_unit_has_no_shares(words):
    found = units.units(words, "a")
    numbers = units.statistics(found, 0)
    assert numbers["units"] == 1 and math.isnan(numbers["at_word_edge"]) and math.isnan(numbers["entropy_at_units"])
    assert units.render(found).splitlines()[1:] == ["[a]", "  1 unit, 1.00 bytes per unit"]


def test_brackets_and_colours(nested):
    found = units.units(nested, "It was\nso [sic] b")
    first, second = units.render(found).split("\n\n")
    assert first.splitlines()[:3] == ["Units of stage 0, made of bytes", "[It ][was⏎so ]", "[[sic] ][b]"]
    assert first.splitlines()[3] == "  4 units, 4.25 bytes per unit"
    assert first.splitlines()[4] == "  100% begin at the edge of a word, 100% with a whole character"
    assert "nats where a unit begins" in first and "within units" in first
    assert second.splitlines()[:2] == ["Units of stage 1, made of units of stage 0", "[It ][was⏎so [sic] ]"]
    colors = units.render(found, color=True)
    assert colors.count("\x1b[30;46m") == 2 + 2 and colors.count("\x1b[30;43m") == 2 + 1
    assert colors.count("\x1b[0m") == 7
    # The colour ends before the line does, or it would run on to the edge of the terminal.
    assert "\x1b[30;43mwas⏎so \x1b[0m\n" in colors


def test_what_cannot_be_seen_is_written_as_numbers():
    assert units.visible("a\tb\nc é 中".encode()) == "a⇥b⏎c é 中"
    assert units.visible("中".encode()[:2]) == "<E4><B8>" and units.visible("中".encode()[2:] + b"x") == "<AD>x"
    assert units.visible(b"\x00\x1b[31m\x7f") == "<00><1B>[31m<7F>"
    assert units.visible("\u200b\u00a0".encode()) == "<E2><80><8B><C2><A0>"


def test_tokens_are_the_units_of_models_without_their_own(lm):
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"It": 256, "Ġw": 257}
    tk = Tokenizer(models.BPE(vocab=vocabulary, merges=[("I", "t"), ("Ġ", "w")]))
    tk.pre_tokenizer, tk.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = JsonTokenizer.from_files({"tokenizer.json": json.dumps(json.loads(tk.to_str()))}, "tiny")
    found = units.units(LM(lm.config, lm.params, tokenizer), "It wé")
    assert not found.learned and found.entropy is None
    assert found.stages[0].spans.tolist() == [[0, 2], [2, 4], [4, 5], [5, 6]]
    assert found.stages[0].begins.tolist() == [1, 0, 1, 0, 1, 1]
    lines = units.render(found).splitlines()
    assert lines[:2] == ["Tokens of the tokenizer: the model has no units of its own", "[It][ w][<C3>][<A9>]"]
    assert lines[2] == "  4 tokens, 1.50 bytes per token" and "entropy" not in lines[-1]


def test_what_has_no_units(words):
    with pytest.raises(AtomError, match="the text is empty"):
        units.units(words, "")
    with pytest.raises(AtomError, match="no tokenizer"):
        units.units(LM(words.config, words.params, None), TEXT)


def test_strip(nested, tmp_path):
    found = units.units(nested, TEXT + "\n中 $x$ \u200b€" + TEXT)
    unit_strip.draw(found, tmp_path / "strip.png")
    assert (tmp_path / "strip.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AtomError, match=r"strip\.pdf: the picture is a PNG file"):
        unit_strip.draw(found, tmp_path / "strip.pdf")
    with pytest.raises(AtomError, match="cannot be written"):
        unit_strip.draw(found, tmp_path / "nowhere" / "strip.png")


def test_strip_of_a_long_text_says_that_it_shows_the_beginning(words, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: titles.append(text))
    monkeypatch.setattr(unit_strip, "_MOST", 40)
    unit_strip.draw(units.units(words, TEXT), tmp_path / "a.PNG")
    assert titles[0].endswith("(the first 40 of 41 bytes)")


def test_labels_of_bytes():
    labels, found = unit_strip._labels("a é\n中".encode() + b"\xe2")
    assert labels == ["a", "·", "é", "", "⏎", "E4", "B8", "AD", "E2"]
    assert found == [True] * 5 + [False] * 4


def test_patches_of_a_bolmo():
    lm, text = tiny_bolmo.model(), tiny_bolmo.texts()["compound"]
    found = units.units(lm, text)
    # The bos ends a patch of its own, which holds no byte.
    marks = tiny_bolmo.numbers()["compound.boundary_mask"][0, 1:]
    ends = np.unique([*(np.flatnonzero(marks) + 1), len(text.encode())])
    np.testing.assert_array_equal(found.stages[0].spans[:, 1], ends)
    assert found.learned and "bytes per unit" in units.render(found)
    assert 0 < np.nanmean(found.entropy) < math.log(260)


def test_windows_leave_their_last_token_to_the_next_one_where_the_rule_looks_ahead():
    lm, text = tiny_bolmo.model(), tiny_bolmo.texts()["compound"]
    ids = np.concatenate([[1], lm.tokenizer.encode(text)])
    items = encode.windows(ids, 1, 20, 10)
    (marks,), (probs,), _ = units._read(lm, items)
    assert len(items) > 3 and len(marks) == len(probs) == len(ids)
    at = 20
    for item in items[1:]:
        mine = atom_jax.apply(lm, item.ids[None]).aux["boundaries"][0][0]
        n = len(item.ids) - item.start
        np.testing.assert_array_equal(marks[at : at + n], mine[item.start - 1 : -1])
        at += n
