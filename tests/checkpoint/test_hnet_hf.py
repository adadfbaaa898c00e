"""H-Net directories: the official config.json and tensor names, in and out."""

import copy
import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import atom_jax
from atom_jax import params
from atom_jax.checkpoint import families
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.models import hnet
from atom_jax.models.hnet import published
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError
from tests.models.tiny_hnets import NAMES, Case, Weights

# Layout, d_model, d_intermediate and parameters of the six released models.
RELEASED = {
    "1stage_L": (["m4", ["T22"], "m4"], [1024, 1536], [0, 4096], 679_405_312),
    "1stage_XL": (["m4", ["T24"], "m4"], [1024, 2048], [0, 5504], 1_270_833_920),
    "2stage_L": (["m4", ["T1m4", ["T26"], "m4T1"], "m4"], [1024, 1024, 1536], [0, 2816, 4096], 874_315_264),
    "2stage_XL": (["m4", ["T1m4", ["T27"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], 1_603_492_224),
    "2stage_XL_chinese": (
        ["m4", ["T1m4", ["T30"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], 1_755_285_888,
    ),
    "2stage_XL_code": (["m4", ["T1m4", ["T28"], "m4T1"], "m4"], [1024, 1536, 2048], [0, 4096, 5504], 1_654_090_112),
}  # fmt: skip


def released(name):
    layout, widths, hidden, _ = RELEASED[name]
    outside = [1023] * (len(widths) - 1)
    return {
        "arch_layout": layout,
        "d_model": widths,
        "d_intermediate": hidden,
        "vocab_size": 256,
        "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 128, "expand": 2},
        "attn_cfg": {
            "num_heads": [16] * len(widths),
            "rotary_emb_dim": [{1024: 32, 1536: 48, 2048: 64}[d] for d in widths],
            "window_size": [*outside, -1],
        },
        "tie_embeddings": False,
    }


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def tiny():
    return Case("mt_2stage")


def write(directory, config, arrays):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(arrays, directory / "model.safetensors")
    return directory


def tensors(directory):
    source = SafetensorsSource(directory)
    return {n: (source.infos[n], source.read(n).tobytes()) for n in source.infos}


def test_saved_is_what_was_loaded(case, tmp_path):
    source = write(tmp_path / "in", case.published, Weights(case.numbers).arrays)
    lm = atom_jax.load(source)
    assert lm.family == "hnet" and lm.tokenizer.name == "hnet_bytes"
    np.testing.assert_allclose(
        np.asarray(atom_jax.apply(lm, case.ids, case.mask).logits)[case.mask],
        case.numbers["logits"][case.mask],
        atol=1e-5,
    )
    atom_jax.save_hf(lm, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(source)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == case.published
    assert atom_jax.load(tmp_path / "out").config == lm.config


def test_another_tokenizer_dtype_and_head_size_survive(tiny, tmp_path):
    cfg = dataclasses.replace(
        tiny.cfg, vocab_size=264, eos_ids=(257,), ssm=dataclasses.replace(tiny.cfg.ssm, head_dim=32)
    )
    shapes = params.flatten(params.abstract(hnet.spec(cfg), jnp.bfloat16))
    p = params.unflatten({k: jnp.full(s.shape, i / 8, s.dtype) for i, (k, s) in enumerate(shapes.items())})
    atom_jax.save_hf(LM(cfg, p, ByteTokenizer()), tmp_path, name="mine")
    again = atom_jax.load(tmp_path, dtype="bfloat16")
    assert again.tokenizer.name == "bytes" and again.config.eos_ids == (257,) and again.config.vocab_size == 264
    assert again.config.ssm == cfg.ssm and again.config.dtype == "bfloat16"
    for (k, x), y in zip(params.flatten(again.params).items(), params.flatten(p).values(), strict=True):
        assert x.dtype == y.dtype == jnp.bfloat16 and (np.asarray(x) == np.asarray(y)).all(), k


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_configurations_have_the_published_sizes(name):
    data = released(name)
    cfg = published.from_hf(data, name)
    assert params.count(hnet.spec(cfg)) == RELEASED[name][-1]
    assert published.to_hf(cfg, "float32") == data
    rules = {r.path for r in published.rules(cfg)}
    paths = set(params.flatten(hnet.spec(cfg)))
    assert paths <= rules and rules - paths <= {"stage0/lift", "stage1/lift"}


def test_released_tensors_have_the_published_names_and_shapes():
    places = families._places(published.from_hf(released("2stage_XL"), "x"))
    shapes = {name: place.rule.hf_shape(place.shape) for name, place in places.items()}
    assert sum(map(math.prod, shapes.values())) == RELEASED["2stage_XL"][-1]
    deep, mixer = "backbone.main_network.", "backbone.encoder.layers.3.mixer."
    expected = {
        "embeddings.weight": (256, 1024),
        "lm_head.weight": (256, 1024),
        f"{mixer}in_proj.weight": (4384, 1024),
        f"{mixer}conv1d.weight": (2304, 1, 4),
        f"{mixer}dt_bias": (32,),
        f"{mixer}norm.weight": (2048,),
        f"{mixer}out_proj.weight": (1024, 2048),
        "backbone.routing_module.q_proj_layer.weight": (1024, 1024),
        "backbone.residual_proj.bias": (1024,),
        f"{deep}pad_dimension": (512,),
        f"{deep}encoder.layers.4.mixer.in_proj.weight": (6448, 1536),
        f"{deep}decoder.layers.4.mixer.Wqkv.weight": (4608, 1536),
        f"{deep}decoder.layers.4.mlp.fc1.weight": (8192, 1536),
        f"{deep}decoder.rmsnorm.weight": (1536,),
        f"{deep}main_network.pad_dimension": (512,),
        f"{deep}main_network.main_network.layers.26.mlp.fc2.weight": (2048, 5504),
        f"{deep}main_network.main_network.rmsnorm.weight": (2048,),
    }
    assert {name: shapes.get(name) for name in expected} == expected


def change(data, path, value):
    data = copy.deepcopy(data)
    *parents, name = path.split(".")
    node = data
    for parent in parents:
        node = node[parent]
    if value is None:
        del node[name]
    else:
        node[name] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("arch_layout", ["m4", "T2", "m4"], "arch_layout must nest"),
        ("arch_layout", "m4", "arch_layout must nest"),
        ("arch_layout", ["m4", ["T1", ["q2"], "T1"], "m4"], "layout 'q2'"),
        ("arch_layout", ["m4", ["T1", ["T99999"], "T1"], "m4"], "layout 'T99999'"),
        ("arch_layout", ["m1", ["T1"], "m1"], "num_heads must be 2 integers"),
        ("d_model", [64, 64], "d_model must be 3 integers"),
        ("d_model", [96, 64, 64], "d_model: stages must not get narrower"),
        ("d_model", [64, 64, "96"], "d_model must be"),
        ("d_intermediate", None, "d_intermediate must be"),
        ("d_intermediate", [0, 0, 128], "d_intermediate: stage 1"),
        ("vocab_size", None, "the field vocab_size is missing"),
        ("vocab_size", 0, "vocab_size is 0"),
        ("attn_cfg", None, "attn_cfg is missing"),
        ("ssm_cfg", [], "ssm_cfg is missing"),
        ("ssm_cfg.d_state", -1, "d_state is -1"),
        ("ssm_cfg.headdim", 48, "head_dim 48 does not divide"),
        ("attn_cfg.num_heads", [2, 3, 2], "n_heads: 3 heads do not divide the width 64 of stage 1"),
        ("attn_cfg.rotary_emb_dim", [16, 16, 15], "rotary_dim: expected an even number"),
        ("attn_cfg.rotary_emb_dim", [16, 48, 16], "rotary_dim: expected an even number up to 32"),
        ("attn_cfg.window_size", [7, 7, -2], "window_size must be"),
        ("tie_embeddings", "no", "tie_embeddings is no; it must be true or false"),
        ("atom_tokenizer", "/etc/passwd", "atom_tokenizer is '/etc/passwd'"),
    ],
)
def test_bad_fields_are_one_sentence(tiny, tmp_path, path, value, words):
    (tmp_path / "config.json").write_text(json.dumps(change(tiny.published, path, value)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(AtomError) as e:
        atom_jax.load(tmp_path)
    assert words in str(e.value) and str(e.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in str(e.value)


def test_wrong_tensors_are_named(tiny, in_memory):
    arrays = Weights(tiny.numbers).arrays
    name = "backbone.main_network.encoder.layers.1.mixer.A_log"
    missing = {k: v for k, v in arrays.items() if k != name}
    with pytest.raises(AtomError, match=f"1 missing tensor \\({name}\\) for a hnet"):
        families.load(in_memory(missing), tiny.cfg)
    with pytest.raises(AtomError, match=r"1 unexpected tensor \(backbone.pad_dimension\)"):
        families.load(in_memory(arrays | {"backbone.pad_dimension": arrays[name]}), tiny.cfg)
    with pytest.raises(AtomError, match=r"is \(3,\); config.json asks for \(2,\)"):
        families.load(in_memory(arrays | {name: np.zeros(3, np.float32)}), tiny.cfg)


def test_tied_embeddings_may_be_stored_twice(tiny, in_memory):
    arrays = Weights(tiny.numbers).arrays
    cfg = dataclasses.replace(tiny.cfg, tie_embeddings=True)
    both = arrays | {"lm_head.weight": arrays["embeddings.weight"]}
    p = families.load(in_memory(both), cfg)
    assert "unembed" not in p and "lm_head.weight" not in families.ExportSource(cfg, p).infos
    with pytest.raises(AtomError, match=r"lm_head\.weight differs from the embedding"):
        families.load(in_memory(arrays), cfg)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunking": (Chunking(rule=Spaces(), pool="mean"),)}, "a way that H-Net's published format cannot say"),
        ({"residual": "identity"}, "a way that H-Net's published format cannot say"),
        ({"confidence": False}, "a way that H-Net's published format cannot say"),
        ({"head_bias": True}, "no logit bias"),
        ({"layout": ("x1", "T1", "x1")}, "or Transformer-XL layers"),
        ({"norm_eps": 1e-6}, "norm_eps"),
    ],
)
def test_what_the_format_cannot_say_is_refused(tmp_path, changes, words):
    cfg = Case("t_1stage").cfg
    inside = {k: v for k, v in changes.items() if k in ("residual", "confidence")}
    outside = {k: v for k, v in changes.items() if k not in inside}
    chunking = tuple(dataclasses.replace(c, **inside) for c in cfg.chunking)
    cfg = dataclasses.replace(cfg, **({"chunking": chunking} | outside))
    with pytest.raises(AtomError, match=words):
        atom_jax.save_hf(LM(cfg, {}, None), tmp_path / "out")
    assert not (tmp_path / "out").exists()
