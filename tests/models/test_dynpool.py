"""Dynamic token pooling as the official code has it, its five kinds of boundaries, through the same model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from atom_jax import params
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules import predictor
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.predictor import Predictor
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.models import hnet, registry
from atom_jax.models.hnet import HNetConfig
from atom_jax.training import losses
from atom_jax.typing import AtomError, Batch

RULES = {
    "gumbel": Predictor(calibrated=False),
    "unigram": Predictor(supervision="marks", double_sigmoid=True),
    "entropy": Predictor(supervision="entropy", double_sigmoid=True),
    "whitespaces": Spaces(characters=(0,)),
    "fixed": Fixed(2, phase="dynpool"),
}
LENGTHS = np.ones(27, np.int32)


def config(rule, **changes):
    chunking = Chunking(rule=rule, pool="mean", residual="identity", norm=True, capacity=1.0, **changes)
    return HNetConfig(
        vocab_size=27, layout=("x1", "x2", "x1"), d_model=(32, 32), d_intermediate=(64, 64), n_heads=(2, 2),
        rotary_dim=(0, 0), window=(-1, -1), head_bias=True, chunking=(chunking,), eos_ids=(), bos_id=None,
    )  # fmt: skip


def layers(w, *names):
    """A run of layers from published ones; matrices there are [outputs, inputs]."""

    def one(name):
        f = {k.removeprefix(f"w.layers.{name}."): v for k, v in w.items() if k.startswith(f"w.layers.{name}.")}
        return {
            "qkv": f["dec_attn.qkv_net.weight"].T.reshape(32, 3, 2, 16),
            "qkv_bias": f["dec_attn.qkv_net.bias"].reshape(3, 2, 16),
            "r": f["dec_attn.r_net.weight"].T.reshape(32, 2, 16),
            "o": f["dec_attn.o_net.weight"].T.reshape(2, 16, 32),
            "o_bias": f["dec_attn.o_net.bias"],
            "norm": {n: f[f"dec_attn.layer_norm.{n}"] for n in ("weight", "bias")},
            "up": f["pos_ff.CoreNet.0.weight"].T,
            "up_bias": f["pos_ff.CoreNet.0.bias"],
            "down": f["pos_ff.CoreNet.3.weight"].T,
            "down_bias": f["pos_ff.CoreNet.3.bias"],
            "mlp_norm": {n: f[f"pos_ff.layer_norm.{n}"] for n in ("weight", "bias")},
        }

    return {"0": jax.tree.map(lambda *x: np.stack(x), *map(one, names))}


def mlp(w, prefix):
    """The boundary predictor's tensors under our names."""
    return {
        "hidden": w[f"{prefix}.0.weight"].T[None],
        "hidden_bias": w[f"{prefix}.0.bias"][None],
        "out": w[f"{prefix}.2.weight"],
        "out_bias": w[f"{prefix}.2.bias"],
    }


@pytest.fixture(scope="module")
def official(golden):
    return load_file(golden / "dynpool" / "dynpool.safetensors")


def weights(w, cfg):
    outer = {
        "encoder": layers(w, "0.0"),
        "rule": mlp(w, "w.boundary_predictor.boundary_predictor"),
        "null": w["w.null_group"].reshape(32),
        "norm": {"w": w["w.down_ln.weight"], "b": w["w.down_ln.bias"]},
        "decoder": layers(w, "2.0"),
    }
    p = {
        "embed": w["w.word_emb.weight"],
        "unembed": w["w.final_cast.weight"].T,
        "unembed_bias": w["w.final_cast.bias"],
        "relative": {n: w[f"w.{n}"] for n in ("r_w_bias", "r_r_bias")},
        "stage0": outer,
        "stage1": {"main": layers(w, "1.0", "1.1")},
    }
    spec = params.flatten(hnet.spec(cfg))
    p = {k: jnp.asarray(v) for k, v in params.flatten(p).items() if k in spec}
    assert {k: v.shape for k, v in p.items()} == {k: s.shape for k, s in spec.items()}
    return params.unflatten(p)


def batch_of(w, kind):
    ids, targets = (w[name].T.astype(np.int32) for name in ("data", "target"))
    positions = np.tile(np.arange(ids.shape[1], dtype=np.int32), (2, 1))
    marks = w["unigram.boundaries_gt"].T if kind == "unigram" else None
    return Batch(ids, positions, np.ones_like(ids), targets, np.ones(ids.shape, bool), marks)


@pytest.mark.parametrize(("kind", "pack"), [(kind, False) for kind in RULES] + [("entropy", True)])
def test_loss_logits_and_gradients_equal_the_official_ones(official, monkeypatch, kind, pack):
    w, relax, to_logits, made = official, predictor.relax, hnet.logits, []
    cfg, batch = config(RULES[kind], pack=pack), batch_of(official, kind)
    noise = w["gumbel.uniform"]
    monkeypatch.setattr(predictor, "relax", lambda logit, _, temperature: relax(logit, noise, temperature))
    kept = lambda *args, **kwargs: made.append(to_logits(*args, **kwargs)) or made[-1]  # noqa: E731
    monkeypatch.setitem(registry.FAMILIES, "hnet", dataclasses.replace(hnet.FAMILY, logits=kept))

    def loss(p):
        sums = losses.next_token(p, batch, cfg=cfg, lengths=LENGTHS)
        return sums.objective / sums.tokens, (sums.nats / sums.tokens, made[-1], sums.learned["lost_0"])

    (value, (nats, logits, lost)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights(w, cfg))
    assert lost[0] == 0
    np.testing.assert_allclose(logits, w[f"{kind}.logits"].reshape(39, 2, 27).swapaxes(0, 1), atol=1e-5)
    np.testing.assert_allclose(nats, w[f"{kind}.lm_loss"].mean(), rtol=1e-5)
    np.testing.assert_allclose(value - nats, w[f"{kind}.loss_boundaries"], atol=1e-5)
    found = {"word_emb": grads["embed"], "null_group": grads["stage0"]["null"].reshape(1, 1, 32)}
    if f"{kind}.g.bp.boundary_predictor.0.weight" in w:
        official_mlp = mlp(w, f"{kind}.g.bp.boundary_predictor")
        w = w | {f"{kind}.g.{k}": v for k, v in official_mlp.items()}
        found |= grads["stage0"]["rule"]
    for name, mine in found.items():
        theirs = w[f"{kind}.g.{name}"]
        np.testing.assert_allclose(mine, theirs, atol=2e-4 * np.abs(theirs).max(), err_msg=name)


def test_entropy_spikes_cut_bytes_only():
    cfg = config(RULES["entropy"])
    inner = Chunking(rule=Predictor(supervision="entropy"), pool="mean")
    with pytest.raises(AtomError, match="supervision: 'entropy' is about the next byte"):
        HNetConfig(**{
            **{f: getattr(cfg, f) for f in ("vocab_size", "head_bias")}, "layout": ("m1",) * 5, "d_model": (32,) * 3,
            "d_intermediate": (0,) * 3, "n_heads": (2,) * 3, "rotary_dim": (0,) * 3, "window": (-1,) * 3,
            "chunking": (cfg.chunking[0], inner),
        })  # fmt: skip
