"""GGUF metadata is obeyed or refused by name: special tokens, rotary scaling, parts of split files, every key."""

import json
import math

import numpy as np
import pytest
import tokenizers as tk

import atom_jax
from atom_jax import checkpoint
from atom_jax.checkpoint.gguf_config import hf_config
from atom_jax.checkpoint.gguf_file import GGUFFile
from atom_jax.nn.rope import RopeScaling
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import AtomError

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")
BOS = "tokenizer.ggml.add_bos_token"


@pytest.mark.parametrize(
    "pre, more, front",
    [
        ("smollm", {}, ()),
        ("smollm", {BOS: True}, (0,)),
        ("smollm", {BOS: False}, ()),
        ("llama-bpe", {}, (0,)),  # llama.cpp's own rule
        ("llama-bpe", {BOS: False}, ()),
    ],
)
def test_add_bos_token(llama_arrays, write, tmp_path, pre, more, front):
    lm = checkpoint.load(write(tmp_path / "m.gguf", llama_arrays, pre=pre, more=more))
    assert lm.tokenizer.front == front
    checkpoint.save_hf(lm, tmp_path / "hf")
    published = tk.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert published.encode("a b").ids == [*front, *lm.tokenizer.encode("a b")]
    assert JsonTokenizer(tmp_path / "hf").front == front
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["add_bos_token"] == bool(front)
    ids = [*front, *lm.tokenizer.encode("a b")]
    assert atom_jax.generate(lm, "a b", 3).ids == atom_jax.generate(lm, [ids], 3).ids


def test_every_token_that_ends_a_turn_ends_a_text(llama_arrays, write, tmp_path):
    path = write(tmp_path / "m.gguf", llama_arrays, more={"tokenizer.ggml.eot_token_id": 5})
    assert checkpoint.load(path).config.eos_ids == (1, 5)


@pytest.mark.parametrize(
    "more, expected",
    [
        ({"factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"type": "none", "factor": 4.0}, None),
        ({"factor": 0.0}, None),
        ({"type": "yarn", "factor": 4.0, "original_context_length": 64}, RopeScaling("yarn", 4.0, 64)),
        (
            {"type": "yarn", "factor": 4.0, "attn_factor": 0.5, "yarn_beta_fast": 16.0},
            RopeScaling("yarn", 4.0, 256, beta_fast=16.0, attention_factor=0.5 * (0.1 * math.log(4) + 1)),
        ),
    ],
)
def test_rope_scaling(llama_arrays, write, tmp_path, more, expected):
    more = {f"llama.rope.scaling.{name}": value for name, value in more.items()}
    assert checkpoint.load(write(tmp_path / "m.gguf", llama_arrays, more=more)).config.rope_scaling == expected


def test_the_old_name_of_the_factor(llama_arrays, write, tmp_path):
    path = write(tmp_path / "m.gguf", llama_arrays, more={"llama.rope.scale_linear": 2.0})
    assert checkpoint.load(path).config.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not supported"),
        ({"llama.rope.scaling.factor": float("nan")}, "rope.scaling.factor is nan where a positive number"),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor is 2.0; only yarn may have one"),
        ({"llama.attention.sliding_window": 512}, "llama.attention.sliding_window is 512; only 0 is supported"),
        ({"llama.attention.mystery": 1}, "llama.attention.mystery is not known"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ({"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix is True"),
        ({"tokenizer.ggml.precompiled_charsmap": [1]}, "precompiled_charsmap is not known"),
        ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is 1; it must be a bool"),
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"split.count": 3, "split.no": 1}, "is part 2 of 3, which must be named"),
    ],
)
def test_what_is_not_obeyed_is_refused_by_name(llama_arrays, write, tmp_path, more, message):
    with pytest.raises(AtomError, match=message):
        checkpoint.load(write(tmp_path / "m.gguf", llama_arrays, more=more))


def test_keys_that_change_nothing(llama_arrays, write, tmp_path):
    more = {"llama.vocab_size": 96, "general.author": "me", "tokenizer.ggml.scores": [0.0], "llama.expert_count": 0}
    more |= {"llama.rope.scaling.finetuned": True, "tokenizer.chat_template.tool_use": "x", "imatrix.file": "y"}
    checkpoint.load(write(tmp_path / "m.gguf", llama_arrays, more=more))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_count": 2**32 - 1}, "llama.block_count is 4294967295"),
        ({"attention.head_count": [4]}, r"llama.attention.head_count is \[4\]"),
        ({"embedding_length": 1e30}, "llama.embedding_length is 1e"),
        ({"attention.layer_norm_rms_epsilon": float("inf")}, "layer_norm_rms_epsilon is inf"),
        ({"rope.freq_base": "big"}, "llama.rope.freq_base is 'big'"),
    ],
)
def test_types_and_bounds_before_use(llama_arrays, write, tmp_path, changes, message):
    file = GGUFFile(write(tmp_path / "m.gguf", llama_arrays))
    file.metadata |= {f"llama.{key}": value for key, value in changes.items()}
    with pytest.raises(AtomError, match=message):
        hf_config(file)


def split(path, arrays, write, folder):
    """The file as llama.cpp's gguf-split writes it: the metadata in the first part, the tensors in all."""
    names = sorted(arrays)
    groups = [names[:5], names[5:20], names[20:]]
    parts = []
    for number, group in enumerate(groups):
        part = folder / f"{path}-{number + 1:05d}-of-{len(groups):05d}.gguf"
        facts = {"split.no": number, "split.count": len(groups), "split.tensors.count": len(names)}
        write(part, {name: arrays[name] for name in group}, more=facts)
        parts.append(part)
    return parts


def test_split_files_are_joined(llama_arrays, write, tmp_path):
    whole = checkpoint.load(write(tmp_path / "m.gguf", llama_arrays))
    parts = split("m", llama_arrays, write, tmp_path)
    lm = checkpoint.load(parts[0])
    np.testing.assert_array_equal(lm.params["embed"], whole.params["embed"])
    np.testing.assert_array_equal(lm.params["layers"]["mlp"]["up"], whole.params["layers"]["mlp"]["up"])
    with pytest.raises(AtomError, match="is part 2 of 3; name the first"):
        checkpoint.load(parts[1])
    parts[1].rename(tmp_path / "kept")
    with pytest.raises(AtomError, match=r"m-00002-of-00003\.gguf is not beside it"):
        checkpoint.load(parts[0])
    (tmp_path / "kept").rename(parts[1])
    parts[2].replace(parts[1])
    with pytest.raises(AtomError, match=r"its split\.no does not say that it is part 2"):
        checkpoint.load(parts[0])
    renamed = parts[0].rename(tmp_path / "first.gguf")
    with pytest.raises(AtomError, match=r"which must be named NAME-00001-of-N\.gguf"):
        checkpoint.load(renamed)
