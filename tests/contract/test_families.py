"""The contract between kinds of models and everything that works with models; a new kind is found by itself."""

import numpy as np
import pytest

import atom_jax
from atom_jax.aot import generation
from atom_jax.checkpoint import cli, store
from atom_jax.evaluation.reports import units
from atom_jax.flax_bridge import LinenLM, NnxLM, to_linen
from atom_jax.models import registry
from atom_jax.typing import AtomError, Output
from tests.contract.cells import EXAMPLES, model, prompts

every = pytest.mark.parametrize("name", EXAMPLES)
# One example of every family.
ONE = {registry.of(cfg).name: name for name, cfg in reversed(EXAMPLES.items())}


@every
def test_apply_ignores_padding_and_the_future(name):
    lm = model(name)
    (ids,) = prompts(lm, 24)
    whole = atom_jax.apply(lm, [ids])
    assert isinstance(whole, Output) and whole.logits.shape == (1, 24, lm.config.vocab_size)
    assert np.isfinite(whole.logits).all()
    padded = atom_jax.apply(lm, [[*ids[:16], *[0] * 8]], np.arange(24)[None] < 16).logits
    alone = atom_jax.apply(lm, [ids[:16]]).logits
    np.testing.assert_allclose(padded[:, :15], alone[:, :15], atol=2e-4)


@every
def test_saved_and_loaded_both_ways(name, tmp_path):
    lm = model(name)
    store.save_model(tmp_path / "orbax", lm)
    (ids,) = prompts(lm, 12)
    expected = atom_jax.apply(lm, [ids]).logits
    np.testing.assert_array_equal(atom_jax.apply(atom_jax.load(tmp_path / "orbax"), [ids]).logits, expected)
    assert f"{registry.of(lm.config).name}" in cli.info(str(tmp_path / "orbax"))
    try:
        atom_jax.save_hf(lm, tmp_path / "hf")
    except AtomError as e:
        assert "published format cannot say" in str(e) and not (tmp_path / "hf").exists()
        return
    np.testing.assert_array_equal(atom_jax.apply(atom_jax.load(tmp_path / "hf"), [ids]).logits, expected)
    assert f"{registry.of(lm.config).name}" in cli.info(str(tmp_path / "hf"))


@every
def test_units_cover_the_text(name):
    lm = model(name)
    text = "The house stood on a hill."
    found = units.units(lm, text)
    for stage in found.stages:
        assert b"".join(found.text[a:b] for a, b in stage.spans) == text.encode()


@pytest.mark.parametrize("family", ONE)
def test_compiled_without_weights_and_as_modules(family):
    lm = model(ONE[family])
    report = str(generation.generation(lm, 1, 16, None))
    assert "token" in report
    (ids,) = prompts(lm, 10)
    expected = atom_jax.apply(lm, [ids]).logits
    linen = LinenLM(lm.config).apply(to_linen(lm.params), np.array([ids], np.int32)).logits
    nnx = NnxLM(lm.config, lm.params)(np.array([ids], np.int32)).logits
    np.testing.assert_allclose(linen, expected, atol=1e-5)
    np.testing.assert_allclose(nnx, expected, atol=1e-5)


def test_unknown_policies_are_refused_by_every_family():
    for name in ONE.values():
        with pytest.raises(AtomError, match="memory"):
            registry.with_memory(model(name), "tova")
