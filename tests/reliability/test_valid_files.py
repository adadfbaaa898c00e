"""Files that other programs write and read: read here as well, or refused with the name of what is not read."""

import json
import shutil

import numpy as np
import pytest
import tokenizers as tk
from absl import logging
from safetensors.numpy import load_file, save_file

import atom_jax
from atom_jax import checkpoint
from atom_jax.checkpoint.cli import convert
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import AtomError


@pytest.fixture
def llama(golden, tmp_path):
    """(a directory with a tied Llama, its tensors, a function that writes others there)."""
    target = tmp_path / "llama"
    target.mkdir()
    shutil.copy(golden / "hf_tiny" / "llama" / "config.json", target)
    tensors = load_file(golden / "hf_tiny" / "llama" / "model.safetensors")
    write = lambda tensors: save_file(tensors, target / "model.safetensors", {"format": "pt"})  # noqa: E731
    write(tensors)
    return target, tensors, write


def edit(path, **changes):
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | changes))


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    return said


def test_a_tied_model_that_stores_only_its_head(llama):
    path, tensors, write = llama
    whole = atom_jax.load(path)
    write({("lm_head.weight" if "embed" in name else name): x for name, x in tensors.items()})
    np.testing.assert_array_equal(atom_jax.load(path).params["embed"], whole.params["embed"])
    edit(path / "config.json", tie_word_embeddings=False)
    with pytest.raises(AtomError, match=r"1 missing tensor \(model.embed_tokens.weight\)"):
        atom_jax.load(path)


def test_a_base_model_without_the_prefix(llama):
    path, tensors, write = llama
    whole = atom_jax.load(path)
    write({name.removeprefix("model."): x for name, x in tensors.items()})
    again = atom_jax.load(path)
    ids = [[3, 1, 4, 1, 5]]
    np.testing.assert_array_equal(atom_jax.apply(again, ids).logits, atom_jax.apply(whole, ids).logits)
    write({name.removeprefix("model."): x for name, x in tensors.items()} | {"model.norm.weight": np.ones(64)})
    with pytest.raises(AtomError, match="unexpected tensor"):
        atom_jax.load(path)
    edit(path / "config.json", tie_word_embeddings=False)
    write({name.removeprefix("model."): x for name, x in tensors.items()})
    with pytest.raises(AtomError, match=r"missing tensor \(lm_head.weight\).*a base model has no head"):
        atom_jax.load(path)


ALPHABET = {c: i for i, c in enumerate(sorted(tk.pre_tokenizers.ByteLevel.alphabet()))}


def older(path, **config):
    """vocab.json and merges.txt, as GPT-2's tokenizer had them."""
    vocab = {**ALPHABET, "he": 256, "Ġhe": 257, "<|end|>": 258}
    (path / "vocab.json").write_text(json.dumps(vocab))
    (path / "merges.txt").write_text("#version: 0.2\nh e\nĠ he\n", "utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return vocab


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2TokenizerFast"])
def test_vocabulary_and_merges(llama, kind, tmp_path):
    path, _, _ = llama
    extra = {"259": {"content": "<|im|>", "special": True, "normalized": False}}
    older(path, tokenizer_class=kind, eos_token="<|end|>", added_tokens_decoder=extra)
    tokenizer = JsonTokenizer(path)
    published = tk.ByteLevelBPETokenizer(str(path / "vocab.json"), str(path / "merges.txt"), add_prefix_space=False)
    for text in ("he hee the", "naïve 漢字\n\n 12"):
        assert tokenizer.encode(text).tolist() == published.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("he<|im|> he<|end|>").tolist() == [256, 259, 257, 258] and tokenizer.eos_ids == (258,)
    edit(path / "config.json", vocab_size=96)
    checkpoint.save_hf(checkpoint.load(path), tmp_path / "copy")
    assert JsonTokenizer(tmp_path / "copy").encode("he<|im|>").tolist() == [256, 259]
    assert checkpoint.load(path).tokenizer.front == ()


def test_vocabulary_that_lies(llama):
    path, _, _ = llama
    older(path, tokenizer_class="GPT2Tokenizer")
    for vocab in ({"a": 0, "b": 0}, {"a": "0"}, {"a": -1}, {"a": [1]}, {}):
        (path / "vocab.json").write_text(json.dumps(vocab))
        with pytest.raises(AtomError):
            checkpoint.load(path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "vocab.json"])
def test_a_tokenizer_of_another_kind_is_named(llama, tmp_path, warnings, name):
    path, _, _ = llama
    (path / name).write_text("{}")
    lm = checkpoint.load(path)
    assert lm.tokenizer is None and any(name in line and "is not read" in line for line in warnings)
    with pytest.raises(AtomError, match="has no tokenizer"):
        atom_jax.generate(lm, "text")
    warnings.clear()
    checkpoint.save_hf(lm, tmp_path / "copy")
    assert any("without a tokenizer" in line for line in warnings)
    with pytest.raises(AtomError, match=r"has no tokenizer\.json"):
        convert(str(path), str(tmp_path / "orbax"))


def test_no_tokenizer_at_all_is_no_news(llama, warnings):
    assert checkpoint.load(llama[0]).tokenizer is None and not warnings
