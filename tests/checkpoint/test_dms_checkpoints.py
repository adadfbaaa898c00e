"""Whole checkpoints of models with learned evictors: the published layout, our extensions of it, and Orbax."""

import dataclasses
import json

import chex
import jax
import pytest
from absl import logging

from atom_jax import checkpoint, config, params
from atom_jax.checkpoint import cli, store
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.fields import read_json
from atom_jax.kvcache.dms import DMS
from atom_jax.models import registry, transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.models.transformer_variants import FAMILIES
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError

FORMS = {
    "borrowed_neuron": ("borrowed", "head"),
    "separate_alpha": ("adapter", "head"),
    "separate_alpha_per_layer": ("adapter", "layer"),
}
PUBLISHED = DMS(form="borrowed", window=8, page=DMS.page, cr=8.0, block_size=4)
OBSERVED = DMS(
    form="observed",
    window=8,
    scale=2.5,
    offset=-1.5,
    tau=0.5,
    per="mean",
    bias=True,
    beyond=64,
    shared=3,
    rank=2,
    sinks=4,
    page=16,
    cr=4.5,
)
BASE = {
    "model_type": "qwen3",
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}


def tensors(path):
    source = SafetensorsSource(path)
    return {name: (source.infos[name], source.read(name).tobytes()) for name in source.infos}


def make(memory, family="llama") -> LM:
    """A model with random parameters, the evictors' included."""
    sizes = {"d_model": 16, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "d_ff": 24, "max_length": 64}
    cfg = TransformerConfig(family=family, memory=memory, **sizes)
    spec = params.map_specs(lambda s: dataclasses.replace(s, init=params.normal(0.3)), transformer.spec(cfg))
    return LM(cfg, params.init(jax.random.key(1), spec), ByteTokenizer())


def read(**fields):
    return registry.recognise(BASE, "").from_hf({**BASE, **fields}, "config.json")


@pytest.mark.parametrize("variant", FORMS)
def test_the_published_layout(golden, tmp_path, variant):
    source = golden / "dms" / variant
    lm = checkpoint.load(source)
    form, per = FORMS[variant]
    assert lm.config.memory == dataclasses.replace(PUBLISHED, form=form, per=per)
    assert ("dms" in lm.params["layers"]["attn"]) == (form == "adapter")
    checkpoint.save_hf(lm, tmp_path)
    assert tensors(tmp_path) == tensors(source)
    written, given = read_json(tmp_path / "config.json"), read_json(source / "config.json")
    assert {k for k in given if k.startswith("dms_")} - written.keys() == {
        "dms_manual_inference_mode", "dms_chunked_prefill", "dms_preallocate_for_tokens"
    }  # fmt: skip
    assert all(written[k] == given[k] for k in written if k.startswith("dms_"))
    assert written["architectures"] == given["architectures"] == ["Qwen3ForCausalLMDMS"]
    assert not any(k.startswith("atom_") for k in written)
    assert checkpoint.load(tmp_path).config == lm.config


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_observed_evictors_survive_every_format(tmp_path, family):
    lm = make(OBSERVED, family)
    checkpoint.save_hf(lm, tmp_path / "hf")
    saved = read_json(tmp_path / "hf" / "config.json")
    assert saved["architectures"] == ["Qwen3ForCausalLMDMS" if family == "qwen3" else FAMILIES[family].architecture]
    assert saved["dms_separate_alpha"] is True and saved["dms_cr"] == 4.5
    own = {
        "form": "observed",
        "per": "mean",
        "bias": True,
        "beyond": 64,
        "shared": 3,
        "rank": 2,
        "sinks": 4,
        "page": 16,
    }
    assert {k: v for k, v in saved.items() if k.startswith("atom_dms")} == {
        f"atom_dms_{k}": v for k, v in own.items()
    }
    cli.convert(str(tmp_path / "hf"), str(tmp_path / "orbax"))
    for path in (tmp_path / "hf", tmp_path / "orbax"):
        again = checkpoint.load(path)
        assert again.config == lm.config
        chex.assert_trees_all_equal(again.params, lm.params)
        line = next(line for line in cli.info(str(path)).splitlines() if line.startswith("memory"))
        assert "observed" in line and "window 8" in line and "4.5" in line
    cli.convert(str(tmp_path / "orbax"), str(tmp_path / "back"))
    assert tensors(tmp_path / "back") == tensors(tmp_path / "hf")


def test_models_without_evictors_say_nothing_of_memory(golden, tmp_path):
    assert "memory" not in cli.info(str(golden / "hf_tiny" / "qwen3"))
    checkpoint.save_hf(make(None), tmp_path)
    assert "dms" not in (tmp_path / "config.json").read_text()


def test_configurations_know_the_class():
    cfg = make(OBSERVED).config
    assert config.from_json(object, json.loads(json.dumps(config.to_json(cfg)))) == cfg
    older = config.to_json(OBSERVED)
    older.pop("block_size")
    assert config.from_json(object, older) == OBSERVED


def test_runs_saved_as_orbax(tmp_path):
    lm = make(DMS(form="adapter", window=4))
    with store.Store(tmp_path / "checkpoints", 1) as saved:
        note = {"model": config.to_json(lm.config), "tokenizer": "bytes"}
        saved.save(3, {"params": lm.params, "opt": {"step": lm.params["norm"]}}, {"config": note, "data": {}})
    again = checkpoint.load(tmp_path)
    assert again.config == lm.config
    chex.assert_trees_all_equal(again.params, lm.params)


def test_defaults_and_fields_that_change_nothing(monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    extra = {"dms_compile_limit": 72, "auto_map": {"AutoModelForCausalLM": "x.Y"}, "dms_manual_inference_mode": True}
    cfg = read(dms_window_size=512, dms_chunked_prefill=4096, dms_preallocate_for_tokens=4096, **extra)
    assert cfg.memory == DMS(form="borrowed") and not warnings
    assert read(dms_window_size=512, dms_separate_alpha=True).memory == DMS()
    assert read(dms_window_size=9, dms_separate_alpha=False, atom_dms_form="adapter").memory.form == "adapter"
    assert read(dms_window_size=None, dms_preallocate_for_tokens=4).memory is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dms_disable_eviction": True}, "config.json: dms_disable_eviction is true"),
        ({"dms_window_size": 0}, "config.json: dms_window_size is 0; it must be a whole number"),
        ({"dms_window_size": "8"}, "config.json: dms_window_size is 8; it must be a whole number"),
        ({"dms_alpha_per": "token"}, "config.json: dms_alpha_per is token; it must be head or layer"),
        ({"dms_alpha_per": ["head"]}, "config.json: dms_alpha_per"),
        ({"dms_tau": 0}, "config.json: dms_tau is 0; it must be a positive number"),
        ({"dms_initial_alpha_offset": "5"}, "dms_initial_alpha_offset is 5; it must be a number"),
        ({"dms_separate_alpha": 1}, "dms_separate_alpha is 1; it must be true or false"),
        ({"atom_dms_form": "seen"}, "atom_dms_form is seen; it must be borrowed or adapter or observed"),
        ({"atom_dms_sinks": -1}, "atom_dms_sinks is -1"),
        (
            {"dms_window_size": None, "dms_separate_alpha": True},
            "dms_window_size is missing, which dms_separate_alpha",
        ),
        ({"dms_window_size": None, "architectures": ["Qwen3ForCausalLMDMS"]}, "dms_window_size is missing"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(AtomError, match=message):
        read(**{"dms_window_size": 8, **fields})


def test_missing_tensors_are_named(golden, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((golden / "dms/borrowed_neuron/model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((golden / "dms/separate_alpha/config.json").read_bytes())
    with pytest.raises(AtomError, match=r"4 missing tensors \(.*dms_proj_alpha"):
        checkpoint.load(tmp_path)
