"""Every example of every family reads: what is said of a text, of a file with the model, and by its Flax modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.__main__ import main
from atom_jax.checkpoint import store
from atom_jax.flax_bridge import LinenLM, NnxLM, as_batch, from_linen, to_linen
from atom_jax.models import registry
from tests.contract import cells

T = 24
LENGTHS = (24, 17)


@functools.cache
def read(name):
    """What a model says of two rows."""
    lm = cells.example(name)
    return atom_jax.apply(lm, *cells.padded(cells.texts(lm, *LENGTHS), T))


def test_apply_looks_back_only_and_at_no_padding(name):
    lm, found = cells.example(name), read(name)
    logits = np.asarray(found.logits)
    assert logits.shape == (2, T, lm.config.vocab_size) and logits.dtype == np.float32 and np.isfinite(logits).all()
    # Another end of the first row, other padding of the second, and both in the other order.
    ids, mask = cells.padded(cells.texts(lm, *LENGTHS), T)
    ids[0, 18:], ids[1, 17:] = ids[0, :6], 9
    changed = np.asarray(atom_jax.apply(lm, ids[::-1], mask[::-1]).logits)[::-1]
    # What looks ahead decides on a position with the next one.
    np.testing.assert_allclose(changed[0, :17], logits[0, :17], atol=2e-4)
    np.testing.assert_allclose(changed[1, :17], logits[1, :17], atol=2e-4)
    assert np.abs(changed[0, 18:] - logits[0, 18:]).max() > 1e-2


def test_units_are_reported_stage_by_stage(name):
    cfg, aux = cells.EXAMPLES[name], read(name).aux
    if not getattr(cfg, "chunking", ()):
        assert "boundaries" not in aux
        return
    assert len(aux["boundaries"]) == len(aux["boundary_probs"]) == len(cfg.chunking) and aux["lost"] == 0
    inside = np.arange(T)[None] < np.array(LENGTHS)[:, None]
    for mark in map(np.asarray, aux["boundaries"]):
        assert mark.dtype == bool and mark.any() and not (mark & ~inside).any()
        inside = mark


@pytest.mark.parametrize("form", ["orbax", "hf"])
def test_saved_and_loaded_it_says_the_same(name, form, tmp_path, capsys):
    lm, path = cells.example(name), tmp_path / "model"
    if form == "orbax":
        store.save_model(path, lm)
    elif sentence := cells.refusal(name, "Hugging Face directory"):
        with pytest.raises(atom_jax.AtomError) as e:
            atom_jax.save_hf(lm, path)
        assert str(e.value) == sentence and "\n" not in sentence and not path.exists()
        return
    else:
        atom_jax.save_hf(lm, path)
    loaded = atom_jax.load(path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, lm.params)
    assert type(loaded.tokenizer) is type(lm.tokenizer)
    if loaded.config != lm.config:
        # The published format leaves out what only says how a model is trained or run.
        assert form == "hf"
        ids, mask = cells.padded(cells.texts(lm, *LENGTHS), T)
        np.testing.assert_allclose(atom_jax.apply(loaded, ids, mask).logits, read(name).logits, atol=5e-3)
    assert main(["", "info", str(path)]) == 0
    said = capsys.readouterr().out
    family = registry.of(loaded.config)
    count = f"{params.count(lm.params):,}"
    for label, text in [("family", lm.family), *family.describe(loaded.config), ("parameters", count)]:
        assert f"{label:<12}{text}" in said


def test_flax_modules_are_the_same_program(name):
    lm = cells.example(name)
    ids = jnp.asarray(cells.padded(cells.texts(lm, *LENGTHS), T)[0])
    apply = registry.of(lm.config).apply
    functions = jax.make_jaxpr(lambda tree: apply(tree, as_batch(ids), cfg=lm.config)[0].logits)(lm.params)
    linen = jax.make_jaxpr(lambda variables: LinenLM(lm.config).apply(variables, ids).logits)(to_linen(lm.params))
    nnx = jax.make_jaxpr(lambda tree: NnxLM(lm.config, tree)(ids).logits)(lm.params)
    assert str(linen) == str(functions) == str(nnx)
    for tree in (from_linen(to_linen(lm.params)), NnxLM(lm.config, lm.params).tree()):
        jax.tree.map(np.testing.assert_array_equal, tree, lm.params)
