"""Generation on a CPU holds the weights once, and a first call compiles few programs."""

import dataclasses
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params as params_lib
from atom_jax.inference.generate import generate
from atom_jax.models import transformer
from atom_jax.models.lora import LoRA
from atom_jax.models.transformer import TransformerConfig
from atom_jax.session import laid_out, queue, reading
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM

# Every entry of a stack begins at a multiple of 64 bytes.
CFG = TransformerConfig(d_model=64, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=128, max_length=512)
SLIDING = ("sliding", "sliding", "full") * 2


def model(cfg=CFG, dtype=None):
    return LM(cfg, params_lib.init(jax.random.key(3), transformer.spec(cfg), dtype), ByteTokenizer())


def place(x):
    return x.unsafe_buffer_pointer(), x.unsafe_buffer_pointer() + x.nbytes


def own(tree, lm):
    """Bytes of the arrays of a tree that are no part of the model's parameters."""
    inside = [place(x) for x in jax.tree.leaves(lm.params)]
    at = {place(x)[0]: x for x in jax.tree.leaves(tree)}
    return sum(x.nbytes for x in at.values() if not any(a <= place(x)[0] and place(x)[1] <= z for a, z in inside))


@pytest.mark.parametrize("layer_types", [(), SLIDING, ("full", *SLIDING[:5])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_apart_are_the_memory_of_the_stack(layer_types, dtype):
    sizes = {"layer_types": layer_types, "sliding_window": 16} if layer_types else {}
    lm = model(dataclasses.replace(CFG, dtype=dtype, **sizes), dtype)
    parts = laid_out.of(lm)
    assert own(parts["layers"], lm) == 0
    assert sum(x.nbytes for x in jax.tree.leaves(parts["layers"])) == params_lib.nbytes(lm.params["layers"])


def test_nothing_as_large_as_the_weights_stays_after_generation():
    lm = model()
    gc.collect()
    before = jax.live_arrays()
    known = {id(x) for x in before}
    generate(lm, ["a"], 8, stop_ids=())
    gc.collect()
    new = [x for x in jax.live_arrays() if id(x) not in known]
    # The transposed table of a small vocabulary, and what has a few bytes.
    assert own(new, lm) < lm.params["embed"].nbytes + 0.02 * params_lib.nbytes(lm.params)


def test_what_is_cast_or_corrected_is_all_that_is_copied():
    layers = params_lib.nbytes(model().params["layers"])
    cast = model(dataclasses.replace(CFG, dtype="bfloat16"))
    assert own(laid_out.of(cast)["layers"], cast) == layers // 2
    tuned = model(dataclasses.replace(CFG, lora=LoRA(rank=2, targets=("o",))))
    assert own(laid_out.of(tuned)["layers"], tuned) == tuned.params["layers"]["attn"]["o"].nbytes


@pytest.mark.parametrize("layer_types", [(), SLIDING])
def test_a_prompt_is_read_without_a_copy_of_the_weights(layer_types):
    sizes = {"layer_types": layer_types, "sliding_window": 16} if layer_types else {}
    cfg = dataclasses.replace(CFG, d_model=256, d_ff=1024, n_layers=12, **(sizes | {"layer_types": layer_types * 2}))
    shapes = params_lib.abstract(transformer.spec(cfg))
    ids, lengths = jax.ShapeDtypeStruct((1, 16), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    # As XLA does by default: the copy that is looked for is not made with the quick compiles of tests.
    options = {"xla_cpu_use_fusion_emitters": True}
    program = reading.read_prompt.lower(shapes, ids, lengths, cfg=cfg, capacity=32).compile(options)
    weights = params_lib.nbytes(shapes["layers"])
    # One step of the scan is copied out at a time.
    assert program.memory_analysis().temp_size_in_bytes < 0.5 * weights


def test_the_parameters_stay_usable_and_their_memory_is_given_to_no_other_program():
    lm = model()
    first = generate(lm, ["some text"], 8, stop_ids=()).ids
    step = jax.jit(lambda p: jax.tree.map(lambda x: -x, p), donate_argnums=0)
    before = jax.tree.map(np.array, lm.params["layers"])
    after = step(lm.params["layers"])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: -np.asarray(x), after), before)
    jax.tree.map(
        np.testing.assert_array_equal, laid_out.of(lm)["layers"][0][0][2], jax.tree.map(lambda x: x[2], before)
    )
    assert generate(lm, ["some text"], 8, stop_ids=()).ids == first


def test_with_the_model_goes_its_hold_on_the_memory():
    lm = model()
    generate(lm, ["some text"], 4, stop_ids=())
    weights, kept = lm.params["layers"], weakref.ref(laid_out.of(lm)["layers"][0][0][0]["attn"]["q"])
    del lm
    gc.collect()
    assert kept() is None
    jax.jit(lambda p: jax.tree.map(lambda x: -x, p), donate_argnums=0)(weights)
    assert all(x.is_deleted() for x in jax.tree.leaves(weights))


def test_a_batch_of_another_size_compiles_few_programs(caplog, monkeypatch):
    monkeypatch.setattr(queue, "SHARED", 0)  # rows stay together
    lm = model(dataclasses.replace(CFG, max_length=509))
    with jax.log_compiles():
        generate(lm, ["a"] * 5, 4, stop_ids=())
    names = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    assert {"read_prompt", "decode"} < set(names)
    expected = ("_folded", "read_prompt", "_pick", "use", "_each", "begin", "short", "decode")
    # And what makes the key, where nothing has made one before.
    assert len([name for name in names if name not in expected]) <= 4, names
    assert all(names.count(name) <= 1 for name in expected), names


def test_weights_on_a_mesh_of_one_device():
    lm = model()
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*[None] * x.ndim)))  # noqa: E731
    placed = dataclasses.replace(lm, params=jax.tree.map(place, lm.params))
    assert own(laid_out.of(placed)["layers"], placed) == 0
    assert generate(placed, ["a"], 4, stop_ids=()).ids == generate(lm, ["a"], 4, stop_ids=()).ids
