"""Adapters: learned evictors saved alone and put on other copies of their model."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import checkpoint, sharding
from atom_jax.checkpoint import adapters, cli, store
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.kvcache.dms import DMS
from atom_jax.models import hnet, transformer
from atom_jax.models.hnet import chunking
from atom_jax.sharding import MeshConfig
from atom_jax.typing import LM, AtomError
from tests.checkpoint.test_dms_checkpoints import OBSERVED, make


def without(lm: LM) -> LM:
    """The base model of a model with evictors."""
    attn = {k: v for k, v in lm.params["layers"]["attn"].items() if k != "dms"}
    base = {**lm.params, "layers": {**lm.params["layers"], "attn": attn}}
    return LM(dataclasses.replace(lm.config, memory=None), base, lm.tokenizer)


def edit(path, **changes):
    table = json.loads((path / "adapter.json").read_text())
    for key, value in changes.items():
        table[key] = {**table[key], **value} if isinstance(value, dict) else value
    (path / "adapter.json").write_text(json.dumps(table))


@pytest.fixture
def saved(tmp_path):
    """(a model with evictors, its base model as a Hugging Face directory, its adapter)."""
    lm = make(OBSERVED)
    checkpoint.save_hf(without(lm), tmp_path / "base")
    atom_jax.save_adapter(lm, tmp_path / "adapter", card="# Evictors\n", name="a/base")
    return lm, tmp_path / "base", tmp_path / "adapter"


def test_what_is_written(saved):
    lm, _, path = saved
    assert {p.name for p in path.iterdir()} == {"adapter.json", "adapter.safetensors", "README.md"}
    table = json.loads((path / "adapter.json").read_text())
    sizes = {"family": "llama", "n_layers": 2, "d_model": 16, "n_kv_heads": 2, "n_heads": 4, "head_dim": 8}
    assert table["format"] == 1 and table["memory"]["class"] == "DMS" and table["base"] == {**sizes, "name": "a/base"}
    source = SafetensorsSource(path / "adapter.safetensors")
    assert len(source.infos) == 8 + 6 + 16 and {i.dtype.name for i in source.infos.values()} == {"float32"}
    alpha = source.read("model.layers.1.self_attn.dms_proj_alpha.weight")
    np.testing.assert_array_equal(alpha, np.asarray(lm.params["layers"]["attn"]["dms"]["alpha"][1]).T)
    adapters.save_adapter(lm, path)
    assert (path / "README.md").read_text() == "# Evictors\n"
    said = cli.info(str(path), tensors=True, verify=True)
    count = sum(source.read(n).size for n in source.infos)
    assert "are what was written" in said and f"{count:,}" in said and "family llama, n_layers 2" in said
    assert "adapter: learned memory" in said and "self_attn.dms_proj_alpha.weight" in said
    edit(path, memory={"class": "Nothing"})
    with pytest.raises(AtomError, match=r"adapter\.json: memory"):
        cli.info(str(path))


def test_shipped_ones_say_what_they_are_for():
    said = cli.info("smollm2-135m-dms-4x")
    assert "SmolLM2-135M-Instruct" in said and "made for compression by 4" in said
    assert "window 128, slopes beyond 2,048, corrections of rank 8, " in said


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_base_and_adapter_are_the_whole(saved, tmp_path, kind):
    lm, base, adapter = saved
    if kind == "orbax":
        store.save_model(tmp_path / "orbax", without(lm))
        base = tmp_path / "orbax"
    again = atom_jax.load(base, adapter=str(adapter))
    assert again.config == lm.config and again.tokenizer.name == "bytes"
    chex.assert_trees_all_equal(again.params, lm.params)
    assert jax.tree.structure(again.params) == jax.tree.structure(lm.params)
    half = atom_jax.load(base, adapter=adapter, dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"} and half.config.dtype == "bfloat16"


def test_on_gguf(write, llama_arrays, tmp_path):
    base = checkpoint.load(write(tmp_path / "m.gguf", llama_arrays))
    cfg = dataclasses.replace(base.config, memory=DMS(window=8))
    lm = LM(cfg, transformer.params.init(jax.random.key(0), transformer.spec(cfg)), None)
    adapters.save_adapter(lm, tmp_path / "a")
    again = checkpoint.load(tmp_path / "m.gguf", adapter=tmp_path / "a")
    assert again.config == cfg
    chex.assert_trees_all_equal(again.params["layers"]["attn"]["dms"], lm.params["layers"]["attn"]["dms"])
    chex.assert_trees_all_equal(again.params["embed"], base.params["embed"])


def test_half_precision_models_are_saved_as_float32(saved, tmp_path):
    lm, *_ = saved
    half = dataclasses.replace(lm, params=transformer.params.cast(lm.params, jnp.bfloat16))
    adapters.save_adapter(half, tmp_path / "half")
    source = SafetensorsSource(tmp_path / "half" / "adapter.safetensors")
    assert {i.dtype.name for i in source.infos.values()} == {"float32"}


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_shardings(saved, tmp_path, kind):
    lm, base, adapter = saved
    if kind == "orbax":
        store.save_model(tmp_path / "orbax", without(lm))
        base = tmp_path / "orbax"
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    whole = sharding.shardings(transformer.spec(lm.config), mesh)
    again = atom_jax.load(base, adapter=adapter, shardings=whole)
    jax.tree.map(lambda x, place: chex.assert_equal(x.sharding, place), again.params, whole)
    chex.assert_trees_all_equal(again.params, lm.params)
    part = sharding.shardings(transformer.spec(without(lm).config), mesh)
    again = atom_jax.load(base, adapter=adapter, shardings=part)
    alpha = again.params["layers"]["attn"]["dms"]["alpha"]
    assert alpha.sharding.is_fully_replicated and len(alpha.sharding.device_set) == 8


def test_shipped_ones_go_by_name(saved, tmp_path, monkeypatch):
    lm, base, _ = saved
    with pytest.raises(AtomError, match="adapter 'mine' is neither a shipped adapter nor a directory"):
        atom_jax.load(base, adapter="mine")
    monkeypatch.setattr(adapters, "SHIPPED", tmp_path / "shipped")
    adapters.save_adapter(lm, tmp_path / "shipped" / "tiny-4x")
    adapters.save_adapter(lm, tmp_path / "shipped" / "tiny-8x")
    assert atom_jax.load(base, adapter="tiny-4x").config == lm.config
    with pytest.raises(AtomError, match=r"adapter 'mine' .*shipped are tiny-4x, tiny-8x"):
        atom_jax.load(base, adapter="mine")
    with pytest.raises(AtomError, match=r"is a directory without adapter\.json"):
        atom_jax.load(base, adapter=base)


def test_an_adapter_replaces_earlier_evictors(saved):
    lm, _, adapter = saved
    again = adapters.load_adapter(make(DMS(form="adapter", window=3)), adapter)
    assert again.config == lm.config
    chex.assert_trees_all_equal(again.params, lm.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"n_layers": 3}}, r"adapter\.json: n_layers is 3 in the adapter and 2 in the model$"),
        ({"base": {"family": "qwen3"}}, "family is qwen3 in the adapter and llama in the model"),
        ({"base": {"d_model": 0}}, "d_model is 0; it must be a whole number"),
        ({"base": 3}, "base is 3; it must be an object"),
        ({"format": 2}, "format is 2; only 1 is known"),
        ({"memory": {"window": 0}}, r"adapter\.json: memory: window, page and block_size must be at least 1"),
        ({"memory": {"window": "x"}}, r"adapter\.json: memory\.window: expected int"),
        (
            {"memory": {"form": "borrowed", "beyond": 0, "shared": 0, "rank": 0}},
            "form borrowed.* has no parameters of its own: it needs",
        ),
        ({"memory": {"bias": False}}, r"2 unexpected tensors \(.*bias.*\) for a llama of this adapter\.json"),
        ({"memory": None}, "memory: expected an object"),
    ],
)
def test_adapters_of_other_models_are_refused(saved, changes, message):
    _, base, adapter = saved
    edit(adapter, **changes)
    with pytest.raises(AtomError, match=message):
        atom_jax.load(base, adapter=adapter)


def test_adapters_without_tensors_are_refused(saved):
    _, base, adapter = saved
    (adapter / "adapter.safetensors").unlink()
    for read in (lambda: atom_jax.load(base, adapter=adapter), lambda: adapters.about(adapter)):
        with pytest.raises(AtomError, match=r"adapter\.safetensors: no such file"):
            read()


def test_models_without_adapters(saved, tmp_path):
    lm, _, adapter = saved
    with pytest.raises(AtomError, match="the model has no learned evictors"):
        adapters.save_adapter(without(lm), tmp_path / "x")
    borrowed = make(DMS(form="borrowed"))
    with pytest.raises(AtomError, match=r"no learned evictors of its own .*form borrowed"):
        adapters.save_adapter(borrowed, tmp_path / "x")
    with pytest.raises(AtomError, match="own weights serve its memory"):
        adapters.load_adapter(borrowed, adapter)
    other = LM(hnet.HNetConfig(chunking=(chunking(4.0, 0.5),)), {}, None)
    with pytest.raises(AtomError, match="family is llama in the adapter and hnet in the model"):
        adapters.load_adapter(other, adapter)
    assert not (tmp_path / "x").exists()
