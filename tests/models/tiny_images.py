"""Official tokenizers of images: their weights under our names. Both stand on a base tokenizer, whose vectors go in
beside the pixels and whose codes come out: here a patch is more numbers, of which the base's pass through."""

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.nn import vit

HEADS, BASE = 2, 8


def affine(w, name):
    return {"w": w[f"{name}.weight"].T, "b": w[f"{name}.bias"]}


def norm(w, name):
    return {k: w[f"{name}.{k}"] for k in ("weight", "bias")}


def blocks(w, name, layers):
    """Layers of CLIP's kind, stacked."""

    def layer(i):
        own = {k.removeprefix(f"{name}.{i}."): v for k, v in w.items() if k.startswith(f"{name}.{i}.")}
        d = own["ln_1.weight"].shape[0]
        heads = HEADS, d // HEADS
        return {
            "attn_norm": norm(own, "ln_1"), "mlp_norm": norm(own, "ln_2"),
            "qkv": own["attn.in_proj_weight"].T.reshape(d, 3, *heads),
            "qkv_bias": own["attn.in_proj_bias"].reshape(3, *heads),
            "o": own["attn.out_proj.weight"].T.reshape(*heads, d), "o_bias": own["attn.out_proj.bias"],
            "up": own["mlp.c_fc.weight"].T, "up_bias": own["mlp.c_fc.bias"],
            "down": own["mlp.c_proj.weight"].T, "down_bias": own["mlp.c_proj.bias"],
        }  # fmt: skip

    return jax.tree.map(lambda *x: jnp.stack(x), *map(layer, range(layers)))


def both(w):
    """What the two have in common: encoder and decoder."""
    encoder = {
        "first_norm": norm(w, "encoder_ln_pre"), "blocks": blocks(w, "encoder.transformer", 2),
        "last_norm": norm(w, "encoder_ln_post"), "outlet": affine(w, "pre_quantizer_mlp"),
    }  # fmt: skip
    decoder = {
        "mask": w["decoder_mask_token"][0, 0], "first_norm": norm(w, "decoder.ln_pre"),
        "blocks": blocks(w, "decoder.transformer", 1), "last_norm": norm(w, "decoder.ln_post"),
        "up": affine(w, "decoder.ffn.0"), "down": affine(w, "decoder.ffn.2"),
    }  # fmt: skip
    return {"encoder": encoder, "decoder": decoder, "quantiser": {"codebook": w["quantize.embedding.weight"]}}


def patch(w, base_first):
    """The projection of a patch: pixels by the official one, beside the base's vectors as they are."""
    conv = w["patch_embed.weight"].transpose(2, 3, 1, 0).reshape(-1, 16)
    out = np.zeros((len(conv) + BASE, 16 + BASE), np.float32)
    at = (slice(BASE, None), slice(None, BASE)) if base_first else (slice(None, 16), slice(16, None))
    out[:-BASE, at[0]], out[-BASE:, at[1]] = conv, np.eye(BASE)
    bias = np.zeros(16 + BASE, np.float32)
    bias[at[0]] = w["patch_embed.bias"]
    return {"w": out, "b": bias}


def inputs(numbers):
    """Pixels and the base's vectors of every patch, [2, 256, 48 + 8]."""
    pixels = vit.patches(jnp.asarray(numbers["image"]).transpose(0, 2, 3, 1), 4)
    base = jnp.asarray(numbers["base.z"]).transpose(0, 2, 3, 1).reshape(2, 256, BASE)
    return jnp.concatenate([pixels, base], axis=-1)


def weights(numbers):
    return {k.removeprefix("w."): v for k, v in numbers.items() if k.startswith("w.")}


def alit(numbers):
    w = weights(numbers)
    p = both(w)
    p["encoder"] |= {
        "patch": patch(w, base_first=True), "class": w["encoder_class_embedding"][0],
        "positions": w["encoder_positional_embedding"], "hidden": w["encoder_mask_token"][0, 0],
        "registers": w["latent_tokens"] + w["latent_token_positional_embedding"], "rounds": w["timestep_embedding"],
        "again_norm": norm(w, "encoder_ln_recursive"),
    }  # fmt: skip
    p["decoder"] |= {
        "class": w["decoder_class_embedding"][0], "positions": w["decoder_positional_embedding"],
        "inlet": affine(w, "decoder.decoder_embed"), "registers": w["decoder.latent_token_positional_embedding"],
    }  # fmt: skip
    return jax.tree.map(jnp.asarray, p)


def karl(numbers, registers):
    w = weights(numbers)
    p, grid = both(w), lambda name: w[name].reshape(24, 256).T
    p["encoder"] |= {
        "patch": patch(w, base_first=False), "positions": grid("encoder_positional_embedding"),
        "registers": w["latent_tokens"][:registers], "bins": w["rec_loss_embeddings"],
        "halt_norm": norm(w, "encoder_ln_post_halt"),
        "halt": {"up": affine(w, "halting_mlp.0"), "down": affine(w, "halting_mlp.2")},
    }  # fmt: skip
    p["decoder"] |= {
        "positions": grid("decoder_positional_embedding"), "inlet": affine(w, "decoder_embed"),
        "registers": w["decoder_latent_tokens_timestep_embed"][:registers],
    }  # fmt: skip
    return jax.tree.map(jnp.asarray, p)


def lively(p):
    """Random parameters of a tokenizer with which codes, and how many are enough, differ between images."""
    for part in ("encoder", "decoder"):
        p[part]["blocks"] |= {"o": 8 * p[part]["blocks"]["o"]}
    p["encoder"]["patch"]["w"] = 30 * p["encoder"]["patch"]["w"]
    return p
