"""Corrections of low rank beside the projections of a transformer."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from atom_jax import params
from atom_jax.inference.generate import generate
from atom_jax.kvcache.dms import DMS
from atom_jax.models import lora, registry, transformer
from atom_jax.models.lora import LoRA
from atom_jax.typing import LM, AtomError, Batch

SOME = LoRA(rank=3, alpha=6.0, targets=("q", "v", "o", "down"))


def model(family="llama", tune=SOME, **changes):
    """(configuration, parameters whose corrections are not zero)."""
    cfg = dataclasses.replace(registry.FAMILIES[family].examples()["plain"], n_layers=2, lora=tune, **changes)
    spec = params.flatten(transformer.spec(cfg))
    spec = {k: dataclasses.replace(s, init=params.normal(0.2)) if k.endswith("_b") else s for k, s in spec.items()}
    return cfg, params.init(jax.random.key(2), params.unflatten(spec))


def batch():
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, 256)
    positions = jnp.broadcast_to(jnp.arange(12)[None], ids.shape)
    return Batch(ids, positions, jnp.ones_like(ids))


@functools.partial(jax.jit, static_argnames="cfg")
def logits(p, cfg):
    return transformer.apply(p, batch(), cfg=cfg)[0].logits


@pytest.mark.parametrize(
    ("family", "memory"), [("llama", None), ("olmo2", DMS(form="observed", window=3, rank=2, offset=0.0, scale=1.0))]
)
def test_beside_the_weights_and_merged_are_the_same(family, memory):
    cfg, p = model(family, memory=memory)
    without, merged = lora.without(cfg), lora.merged(p, cfg.lora)
    assert params.flatten(merged).keys() == params.flatten(transformer.spec(without)).keys()
    beside = logits(p, cfg)
    chex.assert_trees_all_close(beside, logits(merged, without), atol=2e-5)
    plain = {**p, "layers": {k: v for k, v in p["layers"].items() if k != "lora"}}
    assert jnp.abs(beside - logits(plain, without)).max() > 0.01


def test_generation_reads_the_corrections_too(scanned):
    cfg, p = model()
    merged = LM(lora.without(cfg), lora.merged(p, cfg.lora), None)
    assert generate(LM(cfg, p, None), [[1, 2, 3]], 6).ids == generate(merged, [[1, 2, 3]], 6).ids


def test_a_new_correction_is_zero_and_scaled_by_alpha_over_rank():
    cfg, _ = model()
    p = params.init(jax.random.key(0), transformer.spec(cfg))
    chex.assert_trees_all_equal(
        lora.merged(p, cfg.lora), {**p, "layers": {k: v for k, v in p["layers"].items() if k != "lora"}}
    )
    assert lora.paths(cfg) == {k for k in params.flatten(p) if "lora/" in k}
    _, p = model()
    a, b = (p["layers"]["lora"][name] for name in ("down_a", "down_b"))
    expected = p["layers"]["mlp"]["down"] + 2.0 * jnp.einsum("lfr,lrd->lfd", a, b)
    chex.assert_trees_all_close(lora.merged(p, SOME)["layers"]["mlp"]["down"], expected, atol=1e-6)


def test_weights_need_no_gradient_where_corrections_learn():
    cfg, p = model(tune=LoRA(rank=2))
    flat = params.flatten(p)

    def gradient(names):
        rest = {k: x for k, x in flat.items() if k not in names}
        loss = lambda some: jnp.mean(logits(params.unflatten(rest | some), cfg) ** 2)  # noqa: E731
        return jax.grad(loss), {k: flat[k] for k in names}

    def products(names):
        """How many matrix products give something of the size of the MLP's matrices."""
        grad, some = gradient(names)
        _, d, f = flat["layers/mlp/gate"].shape
        made = [line.partition("=") for line in str(jax.make_jaxpr(grad)(some)).splitlines()]
        sizes = f"f32[{d},{f}]", f"f32[{f},{d}]"
        return sum("dot_general" in how and any(size in what for size in sizes) for what, _, how in made)

    assert products(lora.paths(cfg)) == 0 < products(["layers/mlp/gate"])
    grad, some = gradient(lora.paths(cfg))
    assert all(jnp.abs(g).max() > 0 for g in jax.jit(grad)(some).values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": -1.0}, "alpha"),
        ({"targets": ()}, r"lora\.targets: expected some of q, k, v, o, gate, up, down"),
        ({"targets": ("q", "embed")}, "got q, embed"),
        ({"targets": ("q", "q")}, "got q, q"),
    ],
)
def test_other_settings_are_refused(fields, message):
    with pytest.raises(AtomError, match=message):
        LoRA(**fields)
