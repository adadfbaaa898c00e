"""Rule tables: published tensors -> parameters -> the same tensors, bit for bit."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from atom_jax import params as params_lib
from atom_jax import sharding
from atom_jax.checkpoint import families, load_config
from atom_jax.checkpoint.safetensors_io import SafetensorsSource
from atom_jax.kvcache.dms import DMS
from atom_jax.models import registry, transformer
from atom_jax.typing import AtomError

FAMILIES = ["llama", "qwen3", "olmo2", "olmo3"]


def published(golden, family):
    path = golden / "hf_tiny" / family
    source = SafetensorsSource(path)
    return load_config(path)[0], {name: source.read(name) for name in source.infos}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_export_of_load_is_bit_equal(golden, in_memory, family, dtype):
    cfg, arrays = published(golden, family)
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    params = families.load(in_memory(arrays), cfg)
    spec = transformer.spec(cfg)
    assert {p: x.shape for p, x in params_lib.flatten(params).items()} == {
        p: s.shape for p, s in params_lib.flatten(spec).items()
    }
    assert all(isinstance(x, jax.Array) and x.dtype == dtype for x in jax.tree.leaves(params))
    out = families.ExportSource(cfg, params)
    assert out.infos.keys() == arrays.keys()
    for name, x in arrays.items():
        y = out.read(name)
        assert (y.dtype, y.shape) == (x.dtype, x.shape) == (out.infos[name].dtype, out.infos[name].shape)
        assert y.tobytes() == x.tobytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_rule_and_every_rule_a_parameter(golden, in_memory, family):
    cfg, _ = published(golden, family)
    every = {
        "tie_embeddings": False,
        "layer_types": (),
        "memory": DMS(form="observed", bias=True, beyond=64, shared=2, rank=2),
    }
    cfg = dataclasses.replace(cfg, **every)
    spec = params_lib.flatten(transformer.spec(cfg))
    assert {rule.path for rule in registry.of(cfg).published.rules(cfg)} == set(spec)


def test_casting_while_loading(golden, in_memory):
    cfg, arrays = published(golden, "olmo2")
    params = families.load(in_memory(arrays), cfg, dtype="bfloat16")
    exported = families.ExportSource(cfg, params)
    for name, x in arrays.items():
        np.testing.assert_array_equal(exported.read(name), x.astype(ml_dtypes.bfloat16))


def test_layers_of_mixed_types_become_float32(golden, in_memory):
    cfg, arrays = published(golden, "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = arrays[name].astype(ml_dtypes.bfloat16)
    params = families.load(in_memory(arrays), cfg)
    assert params["layers"]["mlp"]["up"].dtype == np.float32
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"][1], arrays[name].astype(np.float32).T)


def test_loading_straight_onto_a_mesh(golden, in_memory):
    cfg, arrays = published(golden, "qwen3")
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
    places = sharding.shardings(transformer.spec(cfg), mesh)
    params = families.load(in_memory(arrays), cfg, shardings=places)
    jax.tree.map(lambda x, s: pytest.fail("misplaced") if x.sharding != s else None, params, places)
    assert not params["layers"]["attn"]["q"].is_fully_replicated
    exported = families.ExportSource(cfg, params)
    assert all(np.array_equal(exported.read(name), x) for name, x in arrays.items())


def change(arrays, **kinds):
    """Published tensors with some missing, added or replaced."""
    arrays = dict(arrays)
    for name in kinds.get("drop", ()):
        del arrays[name]
    return arrays | kinds.get("put", {})


def test_complaints_name_the_tensors(golden, in_memory):
    cfg, arrays = published(golden, "qwen3")
    v = "model.layers.2.self_attn.v_proj.weight"
    layer = [name for name in arrays if name.startswith("model.layers.3.")]
    cases = [
        (change(arrays, drop=[v]), rf"1 missing tensor \({v}\) for a qwen3"),
        (change(arrays, drop=layer), r"11 missing tensors \(model.layers.3.*, .*, .* and 8 more\)"),
        (change(arrays, put={"model.layers.9.x": arrays[v]}), r"1 unexpected tensor \(model.layers.9.x\)"),
        (change(arrays, put={v: arrays[v][:-1]}), rf"'{v}' is \(63, 64\); config.json asks for \(64, 64\)"),
        (change(arrays, put={v: arrays[v].T[:32]}), rf"'{v}' is"),
        (change(arrays, put={v: arrays[v].astype(np.int8)}), rf"'{v}' is int8, not float32"),
        (change(arrays, put={v: arrays[v].astype(np.float64)}), rf"'{v}' is float64, not float32"),
    ]
    for bad, message in cases:
        with pytest.raises(AtomError, match=message):
            families.load(in_memory(bad), cfg)


def test_known_harmless_tensors_are_consumed(golden, in_memory):
    cfg, arrays = published(golden, "llama")
    assert cfg.tie_embeddings
    derived = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(4)}
    tied = {"lm_head.weight": arrays["model.embed_tokens.weight"]}
    params = families.load(in_memory(change(arrays, put=derived | tied)), cfg)
    assert families.ExportSource(cfg, params).infos.keys() == arrays.keys()
    other = {"lm_head.weight": arrays["model.embed_tokens.weight"] + 1}
    with pytest.raises(AtomError, match=r"lm_head\.weight differs from the embedding"):
        families.load(in_memory(change(arrays, put=other)), cfg)


def test_export_refuses_parameters_of_another_configuration(golden, in_memory):
    cfg, arrays = published(golden, "olmo3")
    params = families.load(in_memory(arrays), cfg)
    with pytest.raises(AtomError, match="unembed"):
        families.ExportSource(dataclasses.replace(cfg, tie_embeddings=True), params)
    with pytest.raises(AtomError, match="layers/mlp/down"):
        families.ExportSource(dataclasses.replace(cfg, d_ff=64), params)
