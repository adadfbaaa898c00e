import dataclasses

import jax
import numpy as np
import pytest

from atom_jax import params
from atom_jax.inference import continuation, score
from atom_jax.kvcache import policies
from atom_jax.kvcache.knorm import KNorm
from atom_jax.models import transformer
from atom_jax.session import reading
from atom_jax.typing import LM, AtomError
from tests.inference.toy_policy import Toy

CONFIG = transformer.TransformerConfig(
    vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, max_length=128
)


@pytest.fixture(scope="module")
def lm():
    tree = params.init(jax.random.key(1), transformer.spec(CONFIG))
    tree["embed"] = tree["embed"] * 20
    return LM(CONFIG, tree, None)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(0, 50, (3, 40))


@pytest.mark.parametrize("s", [1, 9])
def test_equals_the_whole_sequence_read_at_once(lm, ids, s):
    whole = np.asarray(score.logprobs(lm, ids[:, : 20 + s]))[:, 19:]
    found = continuation.score(lm, ids[:, :20], ids[:, 20 : 20 + s])
    np.testing.assert_allclose(found.logprobs, whole, atol=1e-5)
    best = np.asarray(score.apply(lm, ids[:, : 20 + s]).logits)[:, 19:-1].argmax(-1)
    np.testing.assert_array_equal(found.hits, best == ids[:, 20 : 20 + s])
    assert found.held.shape == (2, 3, 2) and (found.held == 20).all() and (found.held_after == 19 + s).all()
    # Two layers, keys and values, three rows, two heads of 8 floats, room for 24 tokens.
    assert found.nbytes == 2 * 2 * 3 * 2 * 24 * 8 * 4


def test_ragged_rows_equal_rows_alone(lm, ids, monkeypatch):
    lengths, sizes = [20, 7, 13], [5, 9, 1]
    contexts, after = np.full((3, 20), -1), np.full((3, 9), -1)
    for r, (n, m) in enumerate(zip(lengths, sizes)):
        contexts[r, :n], after[r, :m] = ids[r, :n], ids[r, n : n + m]
    together = continuation.score(lm, contexts, after, lengths, sizes)
    # In parts of 6 tokens it must be the same.
    monkeypatch.setattr(reading, "plan", lambda cfg: reading.Plan(part=6, passes=1, shrinks=False))
    in_parts = continuation.score(lm, contexts, after, lengths, sizes)
    monkeypatch.undo()
    for r, (n, m) in enumerate(zip(lengths, sizes)):
        alone = continuation.score(lm, contexts[r : r + 1, :n], after[r : r + 1, :m])
        for found in (together, in_parts):
            np.testing.assert_allclose(found.logprobs[r, :m], alone.logprobs[0], atol=1e-5)
            np.testing.assert_array_equal(found.hits[r, :m], alone.hits[0])
            assert not found.logprobs[r, m:].any() and not found.hits[r, m:].any()
            assert (found.held[:, r] == n).all() and (found.held_after[:, r] == n + m - 1).all()


def test_a_policy_decides_what_the_continuation_sees(lm, ids, monkeypatch):
    monkeypatch.setitem(policies.POLICIES, "toy", Toy)
    dense = continuation.score(lm, ids[:, :20], ids[:, 20:26])
    all_of_it, little = (
        continuation.score(
            dataclasses.replace(lm, config=dataclasses.replace(CONFIG, memory=Toy(budget=n))),
            ids[:, :20],
            ids[:, 20:26],
        )
        for n in (20, 4)
    )
    np.testing.assert_allclose(all_of_it.logprobs, dense.logprobs, atol=1e-5)
    assert (all_of_it.held == 20).all() and (little.held == 4).all()
    # The context itself is read whole, so its last token says the same.
    np.testing.assert_allclose(little.logprobs[:, 0], dense.logprobs[:, 0], atol=1e-5)
    assert np.abs(little.logprobs[:, 1:] - dense.logprobs[:, 1:]).max() > 1e-2


@pytest.mark.parametrize("policy", [None, Toy(budget=4), KNorm(budget=8)])
def test_many_continuations_of_a_context_that_is_read_once(lm, ids, monkeypatch, policy):
    monkeypatch.setitem(policies.POLICIES, "toy", Toy)
    lm = dataclasses.replace(lm, config=dataclasses.replace(CONFIG, memory=policy))
    of = [0, 0, 0, 1, 1, 0]
    after = np.random.default_rng(1).integers(0, 50, (6, 7))
    sizes = [7, 3, 1, 7, 6, 5]
    apart = continuation.score(lm, ids[of, :20], after, None, sizes)
    calls, read = [], continuation.Session.read
    counted = lambda self, ids, sizes: calls.append(ids.shape) or read(self, ids, sizes)  # noqa: E731
    monkeypatch.setattr(continuation.Session, "read", counted)
    found = continuation.score(lm, ids[:2, :20], after, None, sizes, of)
    # The last call repeats a row: one program for all.
    assert calls == [(continuation.ROWS, 6)] * 2
    np.testing.assert_allclose(found.logprobs, apart.logprobs, atol=1e-6)
    np.testing.assert_array_equal(found.hits, apart.hits)
    np.testing.assert_array_equal(found.held, apart.held[:, [0, 3]])
    np.testing.assert_array_equal(found.held_after, apart.held_after)
    assert found.nbytes * 3 == apart.nbytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2]], [[50]]), "token id 50 is outside"),
        (([1, 2], [[3]]), "contexts must be integers"),
        (([[1, 2]], [[1.5]]), "continuations must be integers"),
        (([[1, 2]], [[3], [4]]), "1 contexts, but 2 continuations"),
        (([[1, 2]], [[3]], [0]), "contexts: expected 1 lengths between 1 and 2"),
        (([[1, 2]], [[3]], None, [2]), "continuations: expected 1 lengths"),
    ],
)
def test_bad_input(lm, arguments, message):
    with pytest.raises(AtomError, match=message):
        continuation.score(lm, *arguments)
