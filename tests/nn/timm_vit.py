"""timm's tiny vision transformer (tests/golden/vision) under our names: patch 2, width 24, four layers of 3 heads,
class token, eps 1e-6."""

import jax
import jax.numpy as jnp

from atom_jax.nn import vit

EPS = 1e-6


def parameters(w):
    """Parameters of `embed` and of `vit.blocks`."""
    patch = w["w.patch_embed.proj.weight"].transpose(2, 3, 1, 0).reshape(-1, 24)
    embed = {
        "patch": {"w": patch, "b": w["w.patch_embed.proj.bias"]},
        "positions": w["w.pos_embed"][0],
        "class": w["w.cls_token"][0, 0],
    }
    layers = jax.tree.map(lambda *x: jnp.stack(x), *(_layer(w, i) for i in range(4)))
    return jax.tree.map(jnp.asarray, embed), layers


def embed(p, image):
    """Patches of an image [b, 16, 16, 3] after the class token, in their places."""
    x = vit.affine(p["patch"], vit.patches(image, 2))
    x = jnp.concatenate([jnp.broadcast_to(p["class"], (len(x), 1, 24)), x], axis=1)
    return x + jnp.broadcast_to(p["positions"], x.shape)


def logits(w, x):
    """Of the states after the last layer."""
    x = vit.norm({k: jnp.asarray(w[f"w.norm.{k}"]) for k in ("weight", "bias")}, x, EPS)[:, 0]
    return x @ w["w.head.weight"].T + w["w.head.bias"][None]


def _layer(w, i):
    w = {k.removeprefix(f"w.blocks.{i}."): v for k, v in w.items() if k.startswith(f"w.blocks.{i}.")}
    d, heads = 24, (3, 8)
    p = {
        "qkv": w["attn.qkv.weight"].T.reshape(d, 3, *heads), "qkv_bias": w["attn.qkv.bias"].reshape(3, *heads),
        "o": w["attn.proj.weight"].T.reshape(*heads, d), "o_bias": w["attn.proj.bias"],
        "up": w["mlp.fc1.weight"].T, "up_bias": w["mlp.fc1.bias"],
        "down": w["mlp.fc2.weight"].T, "down_bias": w["mlp.fc2.bias"],
    }  # fmt: skip
    for ours, theirs in (("attn_norm", "norm1"), ("mlp_norm", "norm2")):
        p[ours] = {name: w[f"{theirs}.{name}"] for name in ("weight", "bias")}
    return p
