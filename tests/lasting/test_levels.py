"""The law: how many entries are held is what the formulas say, for every length."""

import math

import numpy as np
import pytest

from atom_jax.kvcache.lasting.levels import Law, levels, merge
from atom_jax.kvcache.lasting.score import Linear, Moments, best, features, fit
from atom_jax.lasting.blocks import Blocks, Entries
from atom_jax.lasting.codec import CODECS
from atom_jax.lasting.store import Manifest, Model, Settings
from atom_jax.typing import AtomError

MODEL = Model("none", "0", "float32", 1, 1, 2)
LAWS = [Law(alpha, 6, 8) for alpha in (0.0, 0.25, 0.5)] + [Law(1.0, 8, 8)]


def entries(n, first=0, rng=None):
    k = np.zeros((1, 1, n, 2), np.float16)
    score = np.zeros(n, np.float32) if rng is None else rng.random(n, np.float32)
    place = np.arange(first, first + n, dtype=np.int32)
    return Entries(k, k, score, place, np.zeros(n, np.int32))


def test_levels_are_what_merging_one_after_another_gives():
    standing = []
    for n in range(1, 4097):
        standing.append(0)
        while (at := merge(standing)) is not None:
            assert standing[at] == standing[at + 1]
            standing[at : at + 2] = [standing[at] + 1]
        if n < 600 or n % 97 == 0 or n == 4096:
            assert standing == levels(n)
        assert sum(2**i for i in standing) == n


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_entries_stay_under_the_bounds(alpha):
    e, b0 = (64, 64) if alpha == 1 else (64, 128)
    law = Law(alpha, e, b0)
    for n in range(1, 4097):
        held = law.held(n * b0)
        assert held == sum(map(law.keep, levels(n)))
        top = max(1 + math.log2(n / 3), 0)
        assert max(levels(n)) <= top
        if alpha == 0:
            assert b0 + held <= b0 + 2 * e * (2 + math.log2(max(n / 3, 1))) and held <= 1.75 * e * (1 + math.log2(n))
        elif alpha == 1:
            assert held == n * b0
        else:
            assert held <= 2 * e * (4 * n / 3) ** alpha / (2**alpha - 1) + 2 * (top + 1)
        if alpha == 0.5:
            assert held <= 3.40 * e * math.sqrt(n) + 2


def test_the_numbers_of_the_table():
    log, root = Law.parse("log"), Law.parse("sqrt")
    assert [log.held(t) for t in (8192, 131072, 1048576, 2097152)] == [448, 704, 896, 960]
    assert [root.held(t) for t in (8192, 131072, 1048576, 2097152)] == [1148, 4858, 13899, 19692]
    # A stream of 8,192 tokens, of which 512 are in the window and four are sinks.
    assert (root.held(7676), log.held(7676), Law.parse("all").held(7676)) == (1411, 636, 7676)
    assert Law.parse("sqrt:entries=128").held(7676) == 2696 and Law.parse("log:entries=128").held(7676) == 1148
    assert round(root.horizon(0.11)) == 5289 and round(log.horizon(0.11)) == 1164


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_blocks_hold_what_the_law_says_however_entries_come(law):
    rng, n = np.random.default_rng(0), 1000
    whole = entries(n, rng=rng)

    def held(cuts):
        blocks = Blocks(None, Manifest(1, MODEL, Settings(law)), None)
        for start, end in zip([0, *cuts], [*cuts, n]):
            blocks.add(whole.cut(start, end))
            assert sum(map(len, blocks.all())) == law.held(end)
        return [e.place.tolist() for e in blocks.all()]

    first = held(range(13, n, 13))
    assert first == held([1, 2, 500, 999]) == held([])
    if law.alpha == 0:
        for places, level in zip(first, levels(n // 8)):
            span = np.arange(places[0] // 8 * 8, places[0] // 8 * 8 + 8) if level == 0 else None
            if span is not None:
                assert places == sorted(span[np.argsort(-whole.score[span])[:6]])


def test_work_of_merging_is_bounded():
    n = 4096
    for law, bound in ((Law(0.0, 64, 128), 2.0), (Law(0.5, 64, 128), 2.71)):
        touched, standing = 0, []
        for _ in range(n):
            standing.append(0)
            while (at := merge(standing)) is not None:
                touched += 2 * law.keep(standing[at])
                standing[at : at + 2] = [standing[at] + 1]
        assert (touched + n * 128) / (n * 128) <= bound


@pytest.mark.parametrize("text", ["sqrt:entries=64,block=128", "log:entries=3,block=8", "all:block=16",
                                  "power:alpha=0.25,entries=2,block=4"])  # fmt: skip
def test_laws_as_texts(text):
    assert str(Law.parse(text)) == text and Law.parse(str(Law.parse(text))) == Law.parse(text)


@pytest.mark.parametrize("text, message", [
    ("cube", "law 'cube': expected log, sqrt, all or power"), ("log:alpha=1", "alpha belongs to power"),
    ("power", "alpha belongs to power"), ("all:entries=3", "all keeps whole blocks"),
    ("sqrt:entries=200", "a block of 128 tokens can't hold 200"), ("sqrt:m=2", "no field 'm'"),
    ("power:alpha=2", "alpha: expected a number from 0 to 1"),
])  # fmt: skip
def test_laws_that_are_none(text, message):
    with pytest.raises(AtomError, match=message):
        Law.parse(text)


def test_of_equal_scores_the_newest_are_kept():
    assert best(np.array([1, 3, 3, 0, 3.0]), 2).tolist() == [2, 4]
    assert best(np.array([[1, 2, 0.0], [0, 0, 0.0]]), 1).tolist() == [[1], [2]]


def test_a_fit_is_the_discriminant_of_all_texts():
    rng = np.random.default_rng(0)
    texts = [rng.normal(size=(5, n)) * np.array([[1], [2], [3], [1], [9]]) + 4 for n in (400, 300)]
    wanted = [np.arange(x.shape[1]) % 7 == 0 for x in texts]
    for x, w in zip(texts, wanted):
        x[2, w] += 6
    both = np.concatenate(texts, axis=1)
    mean, std = both.mean(1, keepdims=True), both.std(1, keepdims=True)
    a, b = 3.0 * np.eye(5), 0
    for x, w in zip(texts, wanted):
        x = (x - mean) / std
        a, b = a + x @ x.T / x.shape[1] / 2, b + (x[:, w].mean(1) - x.mean(1)) / 2
    found = fit([Moments.of(x, w) for x, w in zip(texts, wanted)], 3.0, "m")
    np.testing.assert_allclose(found.weight, np.linalg.solve(a, b), rtol=1e-4, atol=1e-6)
    scores = found(texts[0].astype(np.float32))
    t = np.arange(400)
    near = np.maximum(1 - abs(np.subtract.outer(t, t)) / 5, 0)
    plain = found.weight @ ((texts[0] - mean) / std)
    np.testing.assert_allclose(scores, near @ plain / near.sum(1), rtol=1e-4, atol=1e-4)
    assert plain[wanted[0]].mean() > plain[~wanted[0]].mean() + 0.4
    with pytest.raises(AtomError, match="weighs 5 features, and this model has 6"):
        found(np.zeros((6, 2), np.float32))


def test_features_are_logarithms_of_what_was_received():
    most, total = np.full((2, 3, 4), 0.5, np.float32), np.full((2, 3, 4), 2, np.float32)
    x = features(most, total, np.arange(4, dtype=np.float32), np.ones(4, np.float32))
    assert x.shape == (2 * 2 * 3 + 2, 4)
    np.testing.assert_allclose(x[:, 1], [*[np.log(0.5001)] * 6, *[np.log(2.001)] * 6, 1, 1], rtol=1e-6)
    with pytest.raises(AtomError, match="as many positive deviations"):
        Linear(np.zeros(2), np.array([1.0, 0.0]), np.zeros(2), "m")


def test_bytes_are_within_half_a_step_of_what_they_stand_for():
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(2, 3, 70, 4)).astype(np.float16) * 3 for _ in range(2))
    k[0, 0, 5] = 0
    stored = CODECS["int8"].encode(k, v)
    for old, new in zip((k, v), CODECS["int8"].decode(stored)):
        scale = np.abs(old.astype(np.float32)).max() / 127
        assert np.abs(old.astype(np.float32) - new).max() <= 0.51 * scale + 2e-3
    assert sum(x.nbytes for x in stored.values()) < 0.9 * (k.nbytes + v.nbytes)
    with pytest.raises(AtomError, match="beyond float16"):
        CODECS["float16"].encode(k.astype(np.float32) * 1e5, v)
