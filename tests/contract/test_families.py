"""The contract between kinds of models and everything that works with models; a new kind is found by itself."""

import pathlib

import numpy as np
import pytest

import atom_jax
from atom_jax.aot import generation
from atom_jax.checkpoint import cli, store
from atom_jax.evaluation.reports import units
from atom_jax.flax_bridge import LinenLM, NnxLM, to_linen
from atom_jax.kvcache.policies import POLICIES
from atom_jax.models import registry
from atom_jax.typing import AtomError, Output
from tests.contract.cells import EXAMPLES, model, prompts, refusal, table, under

ROOT = pathlib.Path(__file__).resolve().parents[2]
every = pytest.mark.parametrize("name", EXAMPLES)
# One example of every family, and every policy with one of the family's examples in turn.
ONE = {registry.of(cfg).name: name for name, cfg in reversed(EXAMPLES.items())}
OF = {family: [name for name, cfg in EXAMPLES.items() if registry.of(cfg).name == family] for family in ONE}
EVICTING = {family: [name for name in names if not refusal(name, "cache policies")] for family, names in OF.items()}
PAIRS = [(names[i % len(names)], policy) for names in EVICTING.values() for i, policy in enumerate(POLICIES) if names]


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
def test_generation_of_a_batch_is_that_of_its_rows_and_goes_on(name):
    lm = model(name)
    rows, more = prompts(lm, 11, 3, 7), prompts(lm, 2, 5, 3)
    first = atom_jax.generate(lm, rows, max_new_tokens=6, stop_ids=(), keep_memory=True)
    assert all(len(ids) == 6 for ids in first.ids)
    assert first.ids[1] == atom_jax.generate(lm, [rows[1]], max_new_tokens=6, stop_ids=()).ids[0]
    second = atom_jax.generate(lm, more, max_new_tokens=4, stop_ids=(), after=first)
    assert [len(ids) for ids in second.ids] == [4, 4, 4]
    if not registry.of(lm.config).codec(lm.config).pending:
        # Else the forms of ids that were made are chosen anew where they are read as a prompt.
        whole = atom_jax.generate(lm, [[*a, *b, *c] for a, b, c in zip(rows, first.ids, more)], 4, stop_ids=())
        assert second.ids == whole.ids


@pytest.mark.parametrize("name, policy", PAIRS, ids=[f"{name}-{policy}" for name, policy in PAIRS])
def test_every_policy_on_layers_that_see_everything(name, policy):
    lm = under(name, policy)
    rows = prompts(lm, 40, 9)
    batch = atom_jax.generate(lm, rows, max_new_tokens=5, stop_ids=(), keep_memory=True)
    assert batch.ids[1] == atom_jax.generate(lm, [rows[1]], max_new_tokens=5, stop_ids=()).ids[0]
    later = atom_jax.generate(lm, prompts(lm, 3, 3), max_new_tokens=3, stop_ids=(), after=batch)
    assert [len(ids) for ids in later.ids] == [3, 3]


def test_a_policy_without_a_layer_for_it_is_refused():
    refused = {name: refusal(name, "cache policies") for name in EXAMPLES}
    assert set(filter(None, refused.values())) == {
        "memory: tova is for layers that see everything before them, here is none"
    }
    assert all(EVICTING.values())


@every
def test_saved_and_loaded_both_ways(name, tmp_path):
    lm = model(name)
    store.save_model(tmp_path / "orbax", lm)
    (ids,) = prompts(lm, 12)
    expected = atom_jax.apply(lm, [ids]).logits
    np.testing.assert_array_equal(atom_jax.apply(atom_jax.load(tmp_path / "orbax"), [ids]).logits, expected)
    assert f"{registry.of(lm.config).name}" in cli.info(str(tmp_path / "orbax"))
    if said := refusal(name, "Hugging Face directory", tmp_path / "hf"):
        assert said and not (tmp_path / "hf").exists()
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


def test_the_table_of_refusals_is_the_present_one():
    assert (ROOT / "docs" / "families.md").read_text() == table()


def test_unknown_policies_are_refused_by_every_family():
    for name in ONE.values():
        with pytest.raises(AtomError, match="memory"):
            registry.with_memory(model(name), "tova")
