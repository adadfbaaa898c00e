"""The benchmark of a Bolmo: what its sides run, on a tiny teacher."""

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer
from atom_jax.typing import LM, AtomError
from benchmarks.bolmo_side import Side, schedule
from tests.models.tiny_bolmo import DIRECTORY

TEXT = "Language modeling is a fundamental task in natural language processing. Hello!" * 4
NEW = ["It is said", "Hi, world!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = JsonTokenizer(DIRECTORY / "subword_tokenizer")
    cfg = TransformerConfig(
        vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48
    )
    teacher = LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), tokenizer)
    folder = tmp_path_factory.mktemp("models")
    atom_jax.save_hf(teacher, folder / "subwords")
    Side().make(str(folder / "subwords"), str(folder))
    return folder


def opened(folder, name):
    side = Side()
    side.open(str(folder / name), *([0.75] if name == "bolmo" else []))
    facts = side.prompt(TEXT, NEW)
    side.read()
    return side, facts


@pytest.mark.parametrize("name", ["bolmo", "bytes", "subwords"])
def test_given_texts_are_made_by_the_loop_of_generation(folder, name):
    side, facts = opened(folder, name)
    assert (facts["unit"] == pytest.approx(1, abs=0.02)) == (name == "bytes")
    steps, is_bolmo = side.take(2), name == "bolmo"
    given = np.asarray(side.given["text"])
    slots = side.slots("text")
    made = slots.decode(side.until)
    for ids, row, n, text in zip(made.tokens, given, np.asarray(side.until), NEW):
        np.testing.assert_array_equal(ids[:n], row[1 : n + 1])
        # A Bolmo begins with the prompt's last byte, whose form is decided late; the others with the text's first.
        assert side.lm.tokenizer.decode(row[is_bolmo : n + is_bolmo]) == text
    if is_bolmo:
        patches = np.asarray(slots.session.memory.parts.inside.length) - side.units
        np.testing.assert_array_equal(patches, [m[1:-1].sum() for m in side.marks])
        assert steps["runs"] >= patches.max() and steps["steps"] >= 10


def test_patches_may_be_left_out_or_be_all_bytes(folder):
    side, _ = opened(folder, "bolmo")
    side.take(1)
    lengths = {}
    for form in side.choices:
        slots = side.slots(form)
        slots.decode(side.until)
        patches = slots.session.memory.parts.inside.length
        lengths[form] = int(patches[0]) - int(side.begun.parts.inside.length[0])
    assert lengths["never"] == 0 < lengths["text"] < lengths["always"] == len(NEW[0])


def test_the_memory_of_a_policy_is_a_share_of_that_of_all(folder):
    """Per byte: a token's keys and values by the bytes of a token. A Bolmo's last patch is still open."""
    for name in ("bolmo", "bytes", "subwords"):
        side, facts = opened(folder, name)
        dense, tova = (side.hold(policy, 0.25) for policy in ("none", "tova"))
        assert dense["held"] == pytest.approx(2 * 2 * 2 * 8 * 4 / facts["unit"], rel=0.1)
        assert tova["held"] == pytest.approx(dense["held"] / 4, rel=0.1) and tova["buffers"] < dense["buffers"] / 2
        assert (dense["states"] > 0) == (name == "bolmo")


def test_rows_wait_at_the_ends_of_patches():
    ends = [[True, True], [False, True]]
    ends = [np.array(e) for e in ends]
    assert schedule(ends, 2) == {"steps": 3, "runs": 2}
    assert schedule(ends, 1) == {"steps": 2, "runs": 2}
    assert schedule([np.array([False] * 5)], 1) == {"steps": 5, "runs": 0}


def test_other_models_are_refused(folder):
    with pytest.raises(AtomError, match="expected a Bolmo, not a llama"):
        Side().open(str(folder / "subwords"), 0.5)
