"""A score fitted on what is looked at again: what it counts, against plain attention, and the policy made of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params
from atom_jax.__main__ import main
from atom_jax.checkpoint.adapters import load_adapter
from atom_jax.data.vocabulary import trained_tokenizer
from atom_jax.evaluation.tasks import lasting_fit, lasting_later
from atom_jax.inference.generate import generate
from atom_jax.inference.score import logprobs, to_batch
from atom_jax.kvcache.lasting.score import features, spread
from atom_jax.kvcache.policy import Mode
from atom_jax.kvcache.shared import Shared
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.typing import LM, AtomError
from tests.kvcache.naive_policies import all_weights

LATER = 8


@pytest.fixture(scope="module")
def lm():
    cfg = TransformerConfig(
        vocab_size=256, d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, max_length=64,
        bos_id=0, eos_ids=(1,), pad_id=2,
    )  # fmt: skip
    tree = params.init(jax.random.key(0), transformer.spec(cfg))
    return LM(cfg, {**tree, "embed": tree["embed"] * 20}, None)


def test_what_counts_is_what_was_paid_near_and_from_afar(lm):
    ids = np.random.default_rng(0).integers(3, 30, 40).astype(np.int32)
    x, far = lasting_later._document(lm, ids, LATER)

    def probe(p, heads, call):
        return call.q, call.k

    q, k = transformer.hidden(lm.params, to_batch(lm, ids[None]), cfg=lm.config, mode=Mode("off"), probe=probe)[2][
        "probe"
    ]
    paid = np.stack([all_weights(*(np.asarray(a, np.float64)[0] for a in one)) for one in zip(q, k)])
    behind = np.arange(40)[:, None] - np.arange(40)[None]
    near = paid * ((behind > 0) & (behind < LATER))
    nll = np.zeros(41, np.float32)
    nll[1:40] = -np.asarray(logprobs(lm, ids[None]))[0]
    want = spread(features(near.max((2, 3)), near.sum((2, 3)), nll[:40], nll[1:]))
    np.testing.assert_allclose(x, want[:, 4:32], atol=1e-4)
    np.testing.assert_allclose(far, (paid * (behind >= LATER)).max((0, 1, 2, 3))[4:32], atol=1e-5)


def test_places_in_any_order_are_averaged_as_in_order():
    rng = np.random.default_rng(1)
    x, place = rng.normal(size=(3, 12)).astype(np.float32), np.stack([rng.permutation(30)[:12] for _ in range(3)])
    place[1, 4:7] = -1
    got = np.asarray(jax.jit(spread)(jnp.asarray(x), jnp.asarray(place)))
    for row, at, values in zip(got, place, x):
        for i in np.flatnonzero(at >= 0):
            near = np.where(at >= 0, np.maximum(1 - abs(at - at[i]) / 5, 0), 0)
            np.testing.assert_allclose(row[i], near @ values / near.sum(), rtol=1e-5)
    np.testing.assert_allclose(spread(x), spread(x, np.tile(np.arange(12), (3, 1))), rtol=1e-6)


def test_a_reasoner_keeps_what_it_looks_at_again(lm, tmp_path):
    lm = dataclasses.replace(lm, tokenizer=trained_tokenizer("words:256", ("reason:subset",)))
    order = lasting_fit.Order(
        ("reason:subset:least=8",), str(tmp_path / "s.safetensors"), tokens=300, later=LATER, least=0.05,
        policy_out=str(tmp_path / "policy"),
    )  # fmt: skip
    said = []
    assert "fitted on 1 texts" in lasting_fit.run(lm, order, said.append)
    assert "looked at after 8 tokens, in 300" in said[0]
    found = load_adapter(lm, tmp_path / "policy")
    assert found.config.memory == Shared(budget=512, horizon=LATER, learned=True)
    small = dataclasses.replace(found.config.memory, budget=12, window=4)
    small = dataclasses.replace(found, config=dataclasses.replace(found.config, memory=small))
    made = generate(small, [[5] * 20, [6, 7]], 9, stop_ids=())
    assert made.stats["kv_reads"] == 8 * 12 + sum(range(3, 11))
    with pytest.raises(AtomError, match="no document has more than 204 tokens"):
        lasting_fit.run(lm, dataclasses.replace(order, later=200), said.append)


def test_what_no_policy_could_have_is_refused_before_the_work():
    with pytest.raises(AtomError, match="later: expected 0"):
        lasting_fit.Order(("emma",), "out", later=1)


def test_flags_of_facts_are_refused_beside_later(capsys, tmp_path):
    fit = ["atom_jax", "fit_memory", "--checkpoint=none", f"--out={tmp_path}/s.safetensors", "emma"]
    for more, what in ([["--later=8", "--facts=3"], "--facts has no meaning beside --later"],
                       [["--least=0.3"], "--least has no meaning without --later"]):  # fmt: skip
        assert main([*fit, *more]) == 1
        assert what in capsys.readouterr().err
