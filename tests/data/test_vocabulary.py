"""The text that tokenizers are trained on."""

import pytest

from atom_jax.data import vocabulary
from atom_jax.data.vocabulary import trained_tokenizer, training_text
from atom_jax.typing import AtomError


@pytest.fixture
def sources(tmp_path):
    found = []
    for name, text in (("a", "some words of a text " * 3000), ("b", "漢字" * 3000)):
        for split in ("train", "test"):
            (tmp_path / name / split).mkdir(parents=True)
            (tmp_path / name / split / "x.txt").write_text(text if split == "train" else "unseen")
        found.append(str(tmp_path / name))
    return tuple(found)


def test_all_of_the_train_split_in_small_parts(sources):
    parts = list(training_text(sources))
    assert b"".join(parts) == b"some words of a text " * 3000 + "漢字".encode() * 3000
    assert max(map(len, parts)) < 5000
    assert all(p.decode() for p in parts)


@pytest.mark.parametrize("limit", [2, 100, 5000, 30_001])
def test_an_equal_share_of_each_source(sources, limit):
    text = b"".join(training_text(sources, limit)).decode()
    a, b = text.rstrip("漢字"), text.lstrip("abcdefghijklmnopqrstuvwxyz ")
    assert a + b == text
    assert limit // 2 <= len(a) <= limit // 2 + 256 and limit // 2 <= len(b.encode()) <= limit // 2 + 3


def test_trained_on_the_sources(sources):
    tokenizer = trained_tokenizer("bpe:300", sources)
    assert len(tokenizer.encode(" words")) == 1 and len(tokenizer.encode("漢字" * 8)) < 8
    assert trained_tokenizer("bpe:300", sources) is tokenizer
    with pytest.raises(AtomError, match="no source"):
        trained_tokenizer("bpe:300", ("nowhere",))


def test_a_unigram_model_reads_less(sources, monkeypatch):
    monkeypatch.setitem(vocabulary.LIMITS, "unigram", 200)
    asked = []
    monkeypatch.setattr(vocabulary, "training_text", lambda *a: asked.append(a) or training_text(*a))
    vocabulary.trained_tokenizer("unigram:299", sources)
    vocabulary.trained_tokenizer("bpe:299", sources)
    assert asked == [(sources, 200), (sources, 1 << 26)]
