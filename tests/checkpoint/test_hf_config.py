"""config.json: what is obeyed, what is refused, and both spellings of the rotary settings."""

import dataclasses
import json

import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax.fields import read_json
from atom_jax.models import registry
from atom_jax.models.transformer import TransformerConfig
from atom_jax.models.transformer_published import to_hf
from atom_jax.nn.rope import RopeScaling
from atom_jax.typing import AtomError

FUZZ = settings(max_examples=200, deadline=None, derandomize=True, database=None)
BASE = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "attention_factor": None}


def from_hf(data, where) -> TransformerConfig:
    return registry.recognise(data, where).from_hf(data, where)


def read(**fields) -> TransformerConfig:
    return from_hf({**BASE, **fields}, "config.json")


def test_plain_fields():
    ids = {"bos_token_id": 1, "eos_token_id": [2, 3]}
    cfg = read(head_dim=32, tie_word_embeddings=True, rope_theta=1e6, dtype="bfloat16", **ids)
    assert (cfg.family, cfg.vocab_size, cfg.d_model, cfg.d_ff, cfg.n_layers) == ("llama", 96, 64, 128, 8)
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.max_length) == (4, 2, 32, 256)
    assert (cfg.norm_eps, cfg.rope_theta, cfg.tie_embeddings, cfg.dtype) == (1e-5, 1e6, True, "bfloat16")
    assert (cfg.bos_id, cfg.eos_ids, cfg.pad_id) == (1, (2, 3), None)


def test_defaults_of_the_published_code():
    cfg = read(num_key_value_heads=None)
    assert (cfg.n_kv_heads, cfg.head_dim, cfg.rope_theta, cfg.tie_embeddings) == (4, 16, 10000.0, False)
    assert read(model_type="qwen3").head_dim == 128
    assert read(torch_dtype="bfloat16").dtype == "bfloat16" and read(dtype="float16").dtype == "float32"
    with pytest.raises(AtomError, match="rope_theta is missing"):
        read(model_type="olmo2")


@pytest.mark.parametrize("new_spelling", [False, True])
def test_rotary_scaling_in_both_spellings(new_spelling):
    def scaled(scaling, **fields):
        if new_spelling:
            return read(rope_parameters={**scaling, "rope_theta": 5e5}, **fields)
        return read(rope_scaling=scaling, rope_theta=5e5, **fields)

    cfg = scaled(LLAMA3)
    assert cfg.rope_theta == 5e5 and cfg.rope_scaling == RopeScaling("llama3", 8.0, 64, 1.0, 4.0)
    assert scaled(YARN, model_type="qwen3").rope_scaling == RopeScaling("yarn", 4.0, 64)
    assert scaled({"rope_type": "yarn", "factor": 2.0}).rope_scaling == RopeScaling("yarn", 2.0, 256)
    assert scaled({"type": "linear", "factor": 2.0}).rope_scaling.factor == 2.0
    assert scaled({"rope_type": "default"}).rope_scaling is None
    for scaling, message in [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not supported"),
        ({**YARN, "truncate": False}, "truncate of a yarn"),
        ({**YARN, "mscale": 0.7}, "mscale of a yarn"),
        ({**YARN, "factor": "two"}, "factor is two; it must be a positive number"),
        ({k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}, "low_freq_factor is missing"),
        ({**LLAMA3, "low_freq_factor": 4.0}, "must be smaller"),
        ([1], "must be an object"),
    ]:
        with pytest.raises(AtomError, match=message):
            read(rope_theta=5e5, **{"rope_parameters" if new_spelling else "rope_scaling": scaling})


def test_rotary_settings_nested_by_layer_type():
    full, sliding = {**YARN, "rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}
    nested = {"full_attention": full, "sliding_attention": sliding}
    cfg = read(model_type="olmo3", rope_parameters=nested, sliding_window=9)
    assert cfg.rope_theta == 5e5 and cfg.rope_scaling == RopeScaling("yarn", 4.0, 64)
    assert cfg.layer_types == ("sliding", "sliding", "sliding", "full") * 2 and cfg.sliding_window == 9
    for other in ({**sliding, "rope_theta": 1e4}, full):
        with pytest.raises(AtomError, match="sliding layers with their own"):
            read(model_type="olmo3", rope_parameters={**nested, "sliding_attention": other})


def test_sliding_layers():
    names = ["full_attention", "sliding_attention"] * 4
    cfg = read(model_type="qwen3", use_sliding_window=True, sliding_window=12, layer_types=names)
    assert cfg.layer_types == ("full", "sliding") * 4 and cfg.sliding_window == 12
    by_depth = read(model_type="qwen3", use_sliding_window=True, sliding_window=12, max_window_layers=6)
    assert by_depth.layer_types == ("full",) * 6 + ("sliding",) * 2
    # Qwen3 files carry a window that is switched off.
    off = read(model_type="qwen3", sliding_window=4096, use_sliding_window=False, max_window_layers=4)
    assert off.layer_types == ()
    assert read(sliding_window=4096).layer_types == ()
    for fields, message in [
        ({"layer_types": names}, "use_sliding_window is false"),
        ({"layer_types": names[:5], "use_sliding_window": True}, "layer_types names 5 layers"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers"),
        ({"layer_types": ["chunked"] * 8}, "layer_types must be a list of full_attention and sliding_attention"),
        ({"layer_types": names, "use_sliding_window": True, "rope_scaling": YARN}, "only supported for olmo3"),
    ]:
        with pytest.raises(AtomError, match=message):
            read(model_type="qwen3", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"partial_rotary_factor": 0.5},
        {"rope_interleaved": True},
        {"quantization_config": {"quant_method": "fp8"}},
        {"vocab_size": None},
        {"hidden_size": "64"},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": -1.0},
        {"tie_word_embeddings": "yes"},
        {"eos_token_id": [1, "2"]},
        {"max_position_embeddings": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_wrong_or_unsupported_field_is_named(fields):
    (name,) = fields
    with pytest.raises(AtomError, match=r"^config\.json: .*" + {"num_key_value_heads": "n_kv_heads"}.get(name, name)):
        read(**fields)


def test_unknown_model_types_are_listed():
    for kind in ("mamba", None, ["llama"]):
        with pytest.raises(AtomError, match=r"not supported \(known: llama, qwen3, olmo2, olmo3, hnet, bolmo\)"):
            read(model_type=kind)


def test_unknown_fields_are_refused_and_harmless_ones_are_not(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    read(use_cache=True, architectures=["LlamaForCausalLM"], transformers_version="4.57.3")
    assert not said
    read(temperature=0.6, top_p=0.9, _note="mine", pruned_heads={})
    with pytest.raises(AtomError, match=r"config\.json: unknown fields: aux_gate, logit_cap; remove"):
        read(logit_cap=3, aux_gate=1)
    with pytest.raises(AtomError, match="pruned_heads"):
        read(pruned_heads={"0": [1]})
    assert read(pad_token_id=-1).pad_id is None and "pad_token_id outside" in said[0]


@pytest.mark.parametrize("table", ["", "ssm_cfg", "attn_cfg"])
def test_unknown_fields_of_an_hnet_are_refused(golden, table):
    data = json.loads((golden / "hnet" / "configs.json").read_text())["t_1stage"]["config"]
    published = registry.recognise(data, "config.json").from_hf
    place = data[table] if table else data
    place |= {"use_cache": True, "_note": 1}
    published(data, "config.json")
    place["logit_cap"] = 3
    with pytest.raises(AtomError, match=rf"{table or 'config.json'}: unknown fields: logit_cap; rem"):
        published(data, "config.json")


def test_unknown_fields_of_a_bolmo_are_refused(golden):
    data = json.loads((golden / "bolmo" / "config.json").read_text())
    published = registry.recognise(data, "config.json").from_hf
    published(data, "config.json")
    for changes, words in (({"logit_cap": 3}, "unknown fields: logit_cap"), ({"clip_qkv": 8.0}, "clip_qkv is 8.0")):
        with pytest.raises(AtomError, match=words):
            published(data | changes, "config.json")


@st.composite
def configurations(draw):
    family = draw(st.sampled_from(["llama", "qwen3", "olmo2", "olmo3"]))
    layers = draw(st.integers(1, 6))
    kinds = st.lists(st.sampled_from(["full", "sliding"]), min_size=layers, max_size=layers)
    layer_types = () if family in ("llama", "olmo2") else tuple(draw(kinds))
    scalings = [
        None,
        RopeScaling("linear", 2.0),
        RopeScaling("llama3", 8.0, 64, 1.0, 3.0),
        RopeScaling("yarn", 4.0, 64, beta_fast=20.0, attention_factor=1.25),
        RopeScaling("yarn", 4.0, 32),
    ]
    scaled = family == "olmo3" or "sliding" not in layer_types
    ids = st.integers(0, 95)
    return TransformerConfig(
        family=family,
        vocab_size=96,
        n_layers=layers,
        head_dim=draw(st.sampled_from([16, 64])),
        n_heads=4,
        n_kv_heads=draw(st.sampled_from([1, 2, 4])),
        rope_theta=draw(st.sampled_from([10000.0, 5e5])),
        rope_scaling=draw(st.sampled_from(scalings)) if scaled else None,
        tie_embeddings=draw(st.booleans()),
        layer_types=layer_types if "sliding" in layer_types else (),
        sliding_window=draw(st.integers(1, 100)) if "sliding" in layer_types else 4096,
        bos_id=draw(st.none() | ids),
        eos_ids=tuple(draw(st.lists(ids, max_size=3))),
        pad_id=draw(st.none() | ids),
    )


@FUZZ
@given(cfg=configurations())
def test_round_trip(cfg):
    data = json.loads(json.dumps(to_hf(cfg, "float32")))
    assert from_hf(data, "x") == cfg
    # Each spelling of the rotary settings is enough by itself.
    old = {k: v for k, v in data.items() if k != "rope_parameters"}
    new = {k: v for k, v in data.items() if k not in ("rope_theta", "rope_scaling")}
    assert from_hf(old, "x") == from_hf(new, "x") == cfg


def test_what_a_published_family_cannot_say_is_not_saved():
    sliding = TransformerConfig(n_layers=2, layer_types=("full", "sliding"))
    with pytest.raises(AtomError, match="no sliding layers"):
        to_hf(sliding, "float32")
    scaled = dataclasses.replace(sliding, family="qwen3", rope_scaling=RopeScaling("linear", 2.0))
    with pytest.raises(AtomError, match="scale sliding layers"):
        to_hf(scaled, "float32")


INNER = [*YARN, *LLAMA3, "full_attention", "sliding_attention", "rope_theta"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=3),
    max_leaves=6,
)
NAMES = [*BASE, "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "layer_types", "sliding_window"]
NAMES += ["use_sliding_window", "max_window_layers", "eos_token_id", "tie_word_embeddings", "hidden_act", "dtype"]


@FUZZ
@given(
    family=st.sampled_from(["llama", "qwen3", "olmo2", "olmo3"]),
    fields=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4),
)
def test_nonsense_never_does_more_than_raise(family, fields):
    try:
        from_hf({**BASE, "model_type": family, "rope_theta": 1e4, **fields}, "config.json")
    except AtomError as e:
        assert "\n" not in str(e) or any("\n" in str(v) for v in fields.values())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'"x"'])
def test_files_that_are_not_json_objects(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(AtomError, match=r"config\.json: not"):
        read_json(tmp_path / "config.json")
