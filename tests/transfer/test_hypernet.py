"""Hypernetworks against the numbers of zett and tokenkit, and what is kept of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import atom_jax
from atom_jax import params
from atom_jax.checkpoint import hypernets
from atom_jax.transfer.hypernet import Projector, surfaces
from atom_jax.transfer.initialisers import FVT, Task
from atom_jax.transfer.initialisers.fvt import decompose
from atom_jax.transfer.transplant import shared_rows
from atom_jax.typing import AtomError
from tests.transfer.numbers import array, numbers, tokenizer, view
from tests.transfer.test_transplant import model, table

RNG = np.random.default_rng(0)


def zett():
    fixture = numbers("hypernet_zett")
    tensors = {name: array(x, np.float32) for name, x in fixture["params"].items()}
    net = hypernets.zett_of(fixture["config"], tensors, "config.json")
    return fixture, tensors, net


def test_the_published_encoder():
    fixture, tensors, net = zett()
    p = hypernets.published(net, tensors)
    source, surface = (
        array(fixture["source_embeddings"], np.float32).reshape(-1, 2, 6),
        array(fixture["surface_forms"], np.int32),
    )
    given = p, jnp.asarray(source), jnp.asarray(surface), jnp.asarray(surface != fixture["config"]["pad_token_id"])
    made = net.apply(*given)
    np.testing.assert_allclose(made[:, 0], fixture["pred_in"], atol=2e-6)
    np.testing.assert_allclose(made[:, 1], fixture["pred_out"], atol=2e-6)
    np.testing.assert_allclose(net.bias(*given), fixture["pred_bias"], atol=2e-6)


@pytest.mark.parametrize("case", range(2))
def test_the_published_projector(case):
    fixture = [x for x in numbers("hypernet_tokenkit") if "params" in x][case]
    x_mlnd, real = array(fixture["inputs"], np.float32), array(fixture["mask"], bool)
    m, length, n, d = x_mlnd.shape
    net = Projector(
        n, d, length, fixture["config"]["num_layers"], mean="pooling" in fixture["config"],
        alpha=fixture["config"]["residual_alpha"],
    )  # fmt: skip
    p = hypernets.published(net, {k: v for k, v in fixture["params"].items() if k.startswith("params.")})
    surface = jnp.arange(m * length).reshape(m, length)
    made = net.apply(p, jnp.asarray(x_mlnd.reshape(-1, n, d)), surface, jnp.asarray(real))
    np.testing.assert_allclose(made, fixture["out"], atol=4e-6)
    silent = p | {"out": jax.tree.map(np.zeros_like, p["out"])}
    made = net.apply(silent, jnp.asarray(x_mlnd.reshape(-1, n, d)), surface, jnp.asarray(real))
    np.testing.assert_allclose(made, fixture["out_at_init"], atol=1e-6)


def test_untrained_it_is_fvt():
    source = RNG.normal(size=(700, 2, 8)).astype(np.float32) * 3 + 1
    target = view("qwenlike")
    new = np.setdiff1d(np.array(sorted(target.pieces)), shared_rows(view("gpt2like"), target, 700)[:, 0])
    net = Projector(2, 8, length=48)
    p = net.begun(params.init(jax.random.key(0), net.spec()), source)
    wanted = Task(view("gpt2like"), target, source, new, np.zeros((0, 2), int))
    cuts = decompose(wanted.source, target, new, 700)
    surface, real = surfaces(cuts, net.length)
    assert real.sum(1).max() > 3 and real[:, 0].all() and max(map(len, cuts)) <= net.length
    np.testing.assert_allclose(net.rows(p, source, surface, real), FVT().compose(cuts, source), atol=2e-5)


def test_kept_in_our_format_and_read_from_zetts(tmp_path):
    lm, target = model(), tokenizer("qwenlike")
    net = Projector(2, lm.config.d_model, alpha=4.0)
    p = net.begun(params.init(jax.random.key(0), net.spec()), table(lm))
    p["out"]["w"] = RNG.normal(size=p["out"]["w"].shape).astype(np.float32)
    hypernets.save(tmp_path / "ours", net, p)
    made, report = atom_jax.transplant(lm, target, f"hypernet:path={tmp_path / 'ours'}")
    plain, _ = atom_jax.transplant(lm, target)
    assert report.counts["composed"] > 400 and report.settings["method"] == "hypernet"
    composed = np.array([label == "composed" for label in report.labels])
    assert (table(made)[composed] != table(plain)[composed]).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(table(made)[~composed], table(plain)[~composed])
    with pytest.raises(AtomError, match="hypernet: made for 1 tables of width 4"):
        small = Projector(1, 4)
        atom_jax.transplant(lm, target, "hypernet", hypernet=(small, params.init(jax.random.key(0), small.spec())))
    fixture, tensors, net = zett()
    tree = {}
    for name, x in tensors.items():
        *parents, last = name.removeprefix("params.").split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = x
    (tmp_path / "zett").mkdir()
    (tmp_path / "zett" / "config.json").write_text(json.dumps(fixture["config"]))
    (tmp_path / "zett" / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    again, leaves = hypernets.load(tmp_path / "zett")
    assert again == net
    jax.tree.map(np.testing.assert_array_equal, leaves, hypernets.published(net, tensors))


def test_bad_hypernets(tmp_path):
    with pytest.raises(AtomError, match="no hypernetwork is there"):
        hypernets.load(tmp_path)
    fixture, tensors, net = zett()
    with pytest.raises(AtomError, match="hn_embed_lang_id is not supported"):
        hypernets.zett_of(fixture["config"] | {"hn_embed_lang_id": True}, tensors, "config.json")
    with pytest.raises(AtomError, match="hn_n_layers is missing"):
        hypernets.zett_of({k: v for k, v in fixture["config"].items() if k != "hn_n_layers"}, tensors, "config.json")
    with pytest.raises(AtomError, match=r"no place for the tensor params\.strange"):
        hypernets.published(net, tensors | {"params.strange.kernel": np.zeros(1)})
    with pytest.raises(AtomError, match="sizes must be whole numbers"):
        wrong = {"hn_num_attention_heads": None, "hn_hidden_size": "8"}
        hypernets.zett_of(fixture["config"] | wrong, tensors, "config.json")
    first = next(k for k in tensors if k.endswith("layer.0.output.dense.kernel"))
    with pytest.raises(AtomError, match="is no tensor of numbers"):
        hypernets.published(net, tensors | {first: "words"})
    with pytest.raises(AtomError, match="layers/down/w has another shape in some layers"):
        hypernets.published(net, tensors | {first: np.zeros((1, 1))})
    (tmp_path / "hypernet.json").write_text(json.dumps({"class": "TransformerConfig"}))
    with pytest.raises(AtomError, match="a TransformerConfig is no Projector and no Zett"):
        hypernets.load(tmp_path)
    (tmp_path / "hypernet.json").unlink()
    short = {k: x for k, x in tensors.items() if "token_type" not in k}
    with pytest.raises(AtomError, match="kind is absent, expected"):
        hypernets.published(net, short)
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x93nothing")
    with pytest.raises(AtomError, match=r"flax_model\.msgpack: cannot be read"):
        hypernets.load(tmp_path)
