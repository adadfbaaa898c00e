"""The convert and info commands, between all formats."""

import dataclasses

import pytest
from safetensors.numpy import load_file

from atom_jax import checkpoint
from atom_jax.checkpoint import cli
from atom_jax.tokenizers.bytes import ByteTokenizer
from atom_jax.typing import AtomError


@pytest.fixture
def model(golden, tmp_path):
    """A Hugging Face directory of a byte-level OLMo 3."""
    lm = dataclasses.replace(checkpoint.load(golden / "hf_tiny" / "olmo3"), tokenizer=ByteTokenizer())
    checkpoint.save_hf(lm, tmp_path / "hf")
    return tmp_path / "hf"


def test_to_orbax_and_back(model, tmp_path):
    assert "Orbax directory" in cli.convert(str(model), str(tmp_path / "orbax"))
    assert "Hugging Face directory" in cli.convert(str(tmp_path / "orbax"), str(tmp_path / "back"))
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (model / file).read_bytes()
    cast = checkpoint.load(tmp_path / "orbax", dtype="bfloat16")
    assert cast.config.dtype == cast.params["embed"].dtype.name == "bfloat16"


def test_gguf_to_either(llama_arrays, write, tmp_path):
    path = write(tmp_path / "tiny.gguf", llama_arrays)
    cli.convert(str(path), str(tmp_path / "hf"))
    cli.convert(str(path), str(tmp_path / "orbax"), to="orbax")
    saved = load_file(tmp_path / "hf" / "model.safetensors")
    assert {name: x.tobytes() for name, x in saved.items()} == {name: x.tobytes() for name, x in llama_arrays.items()}
    assert checkpoint.read_json(tmp_path / "hf" / "config.json")["_name_or_path"] == "tiny, dequantized"
    assert checkpoint.load(tmp_path / "orbax").tokenizer.decode([2, 93]) == "! "


def test_convert_never_overwrites(model, golden, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    for target in (tmp_path / "taken", tmp_path / "taken" / "x"):
        with pytest.raises(AtomError, match="already exists"):
            cli.convert(str(model), str(target))
    with pytest.raises(AtomError, match="--to=onnx"):
        cli.convert(str(model), str(tmp_path / "new"), to="onnx")
    with pytest.raises(AtomError, match=r"has no tokenizer\.json"):
        cli.convert(str(golden / "hf_tiny" / "llama"), str(tmp_path / "new"))
    with pytest.raises(AtomError, match="no such file"):
        cli.convert(str(tmp_path / "nowhere"), str(tmp_path / "new"))


def test_info(model, llama_arrays, write, tmp_path):
    cli.convert(str(model), str(tmp_path / "orbax"))
    n_bytes = sum(i.nbytes for i in checkpoint.SafetensorsSource(model).infos.values())
    for path, kind in ((model, "Hugging Face directory"), (tmp_path / "orbax", "Orbax directory")):
        text = cli.info(str(path))
        for part in ("olmo3", kind, f"{n_bytes:,}", f"{n_bytes // 4:,}", "float32", "bytes, 264", "window of 12"):
            assert part in text, part
    text = cli.info(str(write(tmp_path / "m.gguf", llama_arrays)), tensors=True)
    assert "GGUF file" in text and "blk.3.ffn_up.weight" in text and "[128, 64]" in text
    assert "model.layers.3.mlp.up_proj.weight" in cli.info(str(model), tensors=True)
    assert "layers/mlp/up" in cli.info(str(tmp_path / "orbax"), tensors=True)
