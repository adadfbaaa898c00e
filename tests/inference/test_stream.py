"""Streams of text: whole characters, stop strings wherever the tokens end."""

import pytest

from atom_jax.inference.stream import TextStream
from atom_jax.tokenizers import ByteTokenizer

TEXT = "naïve café — 東京 🙂 end"


class Pieces:
    """A tokenizer that drops a space at the beginning of a text, as those of SentencePiece do."""

    def decode_bytes(self, ids):
        return b"".join([b" one", b" two", b"END", b"x\n\ny"][i] for i in ids).removeprefix(b" ")


def stream(data, step, **options):
    s, pieces = TextStream(ByteTokenizer(), **options), []
    for at in range(0, len(data), step):
        pieces.append(s.push(data[at : at + step]))
    return s, pieces


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_pieces_are_whole_characters_and_add_up(step):
    s, pieces = stream(list(TEXT.encode()), step)
    assert "".join(pieces) + s.finish() == s.text == TEXT
    assert "\ufffd" not in s.text


def test_broken_characters_are_replaced_at_the_end():
    s, pieces = stream(list("é".encode())[:1], 1)
    assert pieces == [""] and s.finish() == s.text == "\ufffd"
    s, pieces = stream([0xFF, 65], 1)
    assert "".join(pieces) + s.finish() == "\ufffdA"


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_a_stop_string_cuts_text_and_ids_and_is_never_shown(step):
    s, pieces = stream(list(TEXT.encode()), step, stop=["京 🙂", "nothing"])
    assert s.stopped and "".join(pieces) == s.text == "naïve café — 東"
    assert bytes(s.ids).decode() == s.text and s.finish() == "" and s.push([65]) == ""


def test_what_only_looked_like_a_stop_is_shown_in_the_end():
    s, pieces = stream(list(b"a STO"), 1, stop=["STOP"])
    assert "".join(pieces) == "a " and s.finish() == "STO"
    s, pieces = stream(list(b"a STOW"), 1, stop=["STOP"])
    assert "".join(pieces) == "a STOW"


def test_the_first_of_several_stops_wins():
    s, _ = stream(list(b"one two three"), 100, stop=["three", "two"])
    assert s.text == "one "


def test_text_after_a_prompt_keeps_its_leading_space():
    s = TextStream(Pieces(), before=0)
    assert s.push([1]) + s.push([0, 2]) == " two oneEND"
    s = TextStream(Pieces())
    assert s.push([1, 1]) == "two two"


def test_ids_keep_a_token_that_holds_both_text_and_stop():
    s = TextStream(Pieces(), stop=["\n\n"], before=2)
    s.push([2, 3, 0])
    assert s.text == "ENDx" and s.ids == [2, 3]
