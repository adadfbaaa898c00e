"""What a fit of a learned score takes from a text: whole planted sentences, and features averaged over neighbours."""

import numpy as np

from atom_jax.evaluation.tasks import lasting_fit
from atom_jax.evaluation.tasks.planted import Stream
from atom_jax.kvcache.lasting.score import Seen, features, spread


def test_whole_sentences_are_wanted(monkeypatch):
    rng, t, layers, heads = np.random.default_rng(0), 24, 2, 1
    said, answers = np.zeros(t, bool), np.zeros(t, bool)
    said[3:9], answers[7:9] = True, True
    # The second half is units of two tokens each; the last four tokens are in the window.
    ends = [np.arange(11), np.arange(10, 21, 2)]
    parts = []
    for end in ends:
        n = len(end) - 1
        most = rng.random((layers, heads, n)).astype(np.float32)
        parts.append(Seen(None, None, most, 2 * most, *rng.random((2, n)).astype(np.float32), 0, end[:-1], end))
    monkeypatch.setattr(lasting_fit, "read", lambda *_: iter([(None, None), *((None, part) for part in parts)]))
    stream = Stream(np.arange(t), said, answers, (), np.array([3]), np.array([t]))
    found = lasting_fit._moments(None, stream, 8, "text")
    x = np.concatenate([spread(features(p.most, p.total, p.nll, p.following)) for p in parts], axis=1)
    assert found.n == 15 and x.shape == (2 * layers * heads + 2, 15)
    np.testing.assert_allclose(found.wanted, x[:, 3:9].mean(1), rtol=1e-6)
    np.testing.assert_allclose(found.first, x.sum(1), rtol=1e-5)


def test_neighbours_share():
    x, weights = np.zeros(12, np.float32), [1, 2, 3, 4, 5, 4, 3, 2, 1]
    x[5] = 25
    wanted = np.convolve(x, weights, "same") / np.convolve(np.ones(12), weights, "same")
    np.testing.assert_allclose(spread(x), wanted, rtol=1e-6)
    there = np.where(np.arange(12) < 7, np.arange(12), -1)
    np.testing.assert_allclose(spread(x, there)[:7], spread(x[:7]), rtol=1e-6)
