"""Bolmo directories: the official config.json and tensor names, in and out."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.checkpoint import families, store
from atom_jax.kvcache.dms import DMS
from atom_jax.models import bolmo
from atom_jax.models.bolmo import published
from atom_jax.models.transformer import TransformerConfig
from atom_jax.typing import LM, AtomError
from tests.checkpoint.test_hnet_hf import change, tensors
from tests.models.tiny_bolmo import DIRECTORY, ids_of, model

TINY = json.loads((DIRECTORY / "config.json").read_text())
# Fields of the two released sizes, and their parameters.
RELEASED = {
    "1B": ((2048, 8192, 16, 16, 2816), ["full_attention"] * 16, 1_468_911_776),
    "7B": ((4096, 11008, 32, 32, 5504), (["sliding_attention"] * 3 + ["full_attention"]) * 8, 7_633_084_576),
}


def released(name):
    (width, mlp, layers, heads, local), kinds, _ = RELEASED[name]
    return TINY | {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "head_dim": 128, "local_intermediate_size": local, "num_local_heads": 16,
        "num_local_decoder_layers": 4, "layer_types": kinds, "sliding_window": 4096, "subword_vocab_size": 100278,
        "max_position_embeddings": 65536, "dtype": "bfloat16",
    }  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_configurations_have_the_published_sizes(name):
    cfg = published.from_hf(released(name), name)
    spec = bolmo.spec(cfg)
    abstract = jax.eval_shape(lambda: params.init(jax.random.key(0), spec))
    assert params.count(spec) == params.count(abstract) == RELEASED[name][-1]
    places = families._places(cfg)
    shapes = {n: place.rule.hf_shape(place.shape) for n, place in places.items()}
    assert sum(map(math.prod, shapes.values())) == RELEASED[name][-1]
    d, local = cfg.main.d_model, cfg.local_d_ff
    encoder, decoder = "model.local_encoder.", "model.local_decoder."
    expected = {
        f"{encoder}byte_embedding.weight": (520, d),
        f"{encoder}subword_embedding.weight": (100278, d),
        f"{encoder}boundary_predictor_module.q_proj_layer.weight": (d, d),
        f"{encoder}layers.0.xlstm.q.weight": (d // 2, d),
        f"{encoder}layers.0.xlstm.v.weight": (d, d),
        f"{encoder}layers.0.xlstm.igate_preact.weight": (16, d),
        f"{encoder}layers.0.xlstm.fgate_preact.bias": (16,),
        f"{decoder}layers.3.mlp.down_proj.weight": (d, local),
        f"{decoder}in_projection.bias": (d,),
        f"model.layers.{cfg.main.n_layers - 1}.mlp.down_proj.weight": (d, cfg.main.d_ff),
        "model.layers.0.self_attn.q_norm.weight": (d,),
        "lm_head.weight": (520, d),
    }
    assert {n: shapes.get(n) for n in expected} == expected
    assert published.from_hf(published.to_hf(cfg, "bfloat16"), "again") == cfg


def test_saved_is_what_was_loaded(tmp_path):
    lm = model()
    assert lm.family == "bolmo" and lm.tokenizer.subwords is not None
    atom_jax.save_hf(lm, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(DIRECTORY)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in written.items() if k in TINY} == {k: TINY[k] for k in written if k in TINY}
    again = atom_jax.load(tmp_path / "out")
    assert again.config == lm.config
    ids = ids_of("short")[None]
    np.testing.assert_array_equal(atom_jax.apply(again, ids).logits, atom_jax.apply(lm, ids).logits)
    store.save_model(tmp_path / "orbax", again)
    third = atom_jax.load(tmp_path / "orbax")
    assert third.config == lm.config
    np.testing.assert_array_equal(third.tokenizer.suffix_ids(ids), lm.tokenizer.suffix_ids(ids))


@pytest.mark.parametrize("family, memory", [("qwen3", None), ("llama", None), ("llama", DMS("observed", page=4))])
def test_models_with_other_layers_and_no_subwords_survive(family, memory, tmp_path):
    main = TransformerConfig(
        family=family, vocab_size=520, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48,
        tie_embeddings=False, max_length=256, memory=memory,
    )  # fmt: skip
    cfg = bolmo.BolmoConfig(main=main, subwords=0, local_heads=2, local_d_ff=48, max_length=256)
    shapes = params.flatten(params.abstract(bolmo.spec(cfg), jnp.bfloat16))
    p = params.unflatten({k: jnp.full(s.shape, i / 8, s.dtype) for i, (k, s) in enumerate(shapes.items())})
    atom_jax.save_hf(LM(cfg, p, None), tmp_path, name="mine")
    again = atom_jax.load(tmp_path)
    assert again.config.main.family == family and again.config.main.memory == memory
    assert again.config.subwords == 0 and again.tokenizer.subwords is None
    assert published.to_hf(again.config, "bfloat16") == published.to_hf(cfg, "bfloat16")
    for (k, x), y in zip(params.flatten(again.params).items(), params.flatten(p).values(), strict=True):
        assert x.dtype == y.dtype == jnp.bfloat16 and (np.asarray(x) == np.asarray(y)).all(), k


def test_a_model_without_its_subword_tokenizer_can_be_converted_only(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DIRECTORY / name, tmp_path / name)
    lm = atom_jax.load(tmp_path)
    assert lm.tokenizer.subwords is None
    atom_jax.save_hf(lm, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(DIRECTORY)
    with pytest.raises(AtomError, match="needs its subword tokenizer"):
        atom_jax.apply(lm, [[1, 40]])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("boundary_threshold", "topk:4", "boundary_threshold is topk:4; only 'sample:0' is supported"),
        ("boundary_predictor_lookahead", 0, "boundary_predictor_lookahead is 0; only 1"),
        ("tie_word_embeddings", True, "tie_word_embeddings is True"),
        ("num_local_heads", 5, "5 mLSTM heads do not divide half the width 64"),
        ("num_local_heads", "4", "num_local_heads is 4; it must be a whole number"),
        ("vocab_size", 519, "520 ids, got 519"),
        ("hidden_size", None, "the field hidden_size is missing"),
        ("block_type", "peri_norm", "block_type 'peri_norm' with use_qk_norm False and use_head_qk_norm False"),
        ("layer_types", ["sliding_attention", "linear"], "layer_types must be a list of"),
        ("tokenizer_config.original_identifier", 7, "original_identifier is 7; it must be a name"),
    ],
)
def test_bad_fields_are_one_sentence(tmp_path, path, value, words):
    (tmp_path / "config.json").write_text(json.dumps(change(TINY, path, value)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(AtomError) as e:
        atom_jax.load(tmp_path)
    assert words in str(e.value) and str(e.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(e.value)


def test_defaults_are_those_of_the_published_code():
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    cfg = published.from_hf({"model_type": "bolmo"} | {k: TINY[k] * 4 for k in names}, "x")
    assert cfg.main.layer_types == ("sliding", "sliding", "sliding", "full") * 2
    assert (cfg.main.norm_eps, cfg.edge_eps, cfg.main.rope_theta) == (1e-5, 1e-5, 10000.0)
    assert (cfg.encoder_layers, cfg.decoder_layers, cfg.local_heads, cfg.local_d_ff) == (1, 4, 16, 5504)
    assert cfg.subwords == 100278 and cfg.main.sliding_window == 4096


def test_wrong_tensors_are_named(in_memory):
    source = families.ExportSource(model().config, model().params)
    arrays = {name: source.read(name) for name in source.infos}
    name = "model.local_decoder.layers.1.xlstm.igate_preact.bias"
    with pytest.raises(AtomError, match=f"1 missing tensor \\({name}\\) for a bolmo"):
        families.load(in_memory({k: v for k, v in arrays.items() if k != name}), model().config)
    with pytest.raises(AtomError, match=r"is \(3,\); config.json asks for \(4,\)"):
        families.load(in_memory(arrays | {name: np.zeros(3, np.float32)}), model().config)
    plain = dataclasses.replace(model().config, subwords=0)
    with pytest.raises(AtomError, match=r"1 unexpected tensor \(model.local_encoder.subword_embedding.weight\)"):
        families.load(in_memory(arrays), plain)
