"""Initialisers against the numbers of mergekit, tokenkit and the authors' code, and what must hold of them."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_jax import params
from atom_jax.tokenizers import train
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.transfer import initialisers
from atom_jax.transfer.hypernet import Projector
from atom_jax.transfer.initialisers import FVT, INITIALISERS, Aux, Task, base, focus, landmarks, omp, vectors, wechsel
from atom_jax.transfer.initialisers.neighbours import Neighbours
from atom_jax.transfer.initialisers.trained import trained
from atom_jax.transfer.transplant import new_table, shared_rows
from atom_jax.typing import AtomError
from tests.transfer.numbers import array, numbers, view

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("source,special", [("gpt2like", {}), ("gemmalike", {"<|endoftext|>": "<pad>"})])
def test_fvt_equals_tokenkit(source, special):
    fixture = numbers("fvt")[f"{source}_to_qwenlike"]
    table = array(fixture["source_embeddings"], np.float32)[:, None]
    mean = initialisers.parse("mean")
    rows, labels, _ = new_table(view(source), view("qwenlike"), table, FVT(), Aux(), mean, special)
    # Parts of characters: left out there, composed of bytes here.
    cut = [int(i) for i, pieces in fixture["decompositions"].items() if pieces == "UnicodeDecodeError"]
    assert len(cut) == 5 and set(labels[cut]) == {"composed"}
    composed = [i for i in fixture["diff_indices"] if i not in cut]
    assert set(labels[composed]) == {"composed"} and set(np.delete(labels, fixture["diff_indices"])) <= {
        "special", "exact", "byte",
    }  # fmt: skip
    # Names of roles in Gemma's template ("model" for "assistant") are copied there; here they are words.
    names = [i for i in (290, 300) if source == "gemmalike"]
    others = np.delete(np.arange(1000), [*cut, *names])
    copied = [
        pair for pair in shared_rows(view(source), view("qwenlike"), len(table)).tolist() if pair[0] not in names
    ]
    assert len(copied) > 400 and all(fixture["original_to_new"][i] == j for i, j in copied)
    np.testing.assert_allclose(rows[others, 0], array(fixture["new_embeddings"])[others], atol=1e-7)


def test_fvt_weights():
    table = RNG.normal(size=(9, 2, 3)).astype(np.float32)
    cuts = [np.array([1, 4, 2]), np.array([], int), np.array([5])]
    a, b, c = table[1], table[4], table[2]
    got = FVT("falling", "rising").compose(cuts, table)
    np.testing.assert_allclose(got[0, 0], (3 * a + 2 * b + c)[0] / 6, rtol=1e-5)
    np.testing.assert_allclose(got[0, 1], (a + 2 * b + 3 * c)[1] / 6, rtol=1e-5)
    assert not got[1].any() and (got[2] == table[5]).all()
    got = FVT("last", "first").compose(cuts, table)
    np.testing.assert_array_equal(got[0], [c[0], a[1]])
    np.testing.assert_allclose(FVT("sum").compose(cuts, table)[0], [(a + b + c)[0], (a + b + c)[1] / 3], rtol=1e-5)


@pytest.mark.parametrize("case", range(5))
def test_omp_equals_mergekit(case):
    fixture = numbers("omp")[case]
    double = fixture["dtype"] == "torch.float64"
    dtype = np.float64 if double else np.float32
    k = min(fixture["k"], fixture["N"], fixture["D"])
    with jax.enable_x64(double):
        points = array(fixture["donor_points"], dtype)
        x = array(fixture["targets"], dtype)
        index, weight = omp.pursue(x, points.T, k=k, tolerance=1e-9 if double else 1e-6)
        index, weight = np.asarray(index), np.asarray(weight)
    close = {"rtol": 1e-6, "atol": 2e-8} if double else {"rtol": 2e-4, "atol": 2e-5}
    if k == fixture["k"]:
        np.testing.assert_array_equal(index, fixture["indices"])
        np.testing.assert_allclose(weight, fixture["coeffs"], **close)
        made = base.mix_at(weight, index, array(fixture["base_points"], dtype))
        np.testing.assert_allclose(made, fixture["transplanted"], **close)
    made = base.mix_at(weight, index, points)
    # More picks than dimensions leave nothing, and are not unique: mergekit's noise adds up to the same.
    np.testing.assert_allclose(made, fixture["reconstruction"], **close)
    rest = np.linalg.norm(x - made, axis=1)
    np.testing.assert_allclose(rest, fixture["residual_norm"], rtol=1e-3, atol=1e-6)


def test_omp_finds_what_was_planted_and_stops():
    fixture = next(c for c in numbers("omp") if c.get("name") == "planted")
    points, x = array(fixture["donor_points"], np.float32), array(fixture["targets"], np.float32)
    index, weight = omp.pursue(x, points.T, k=6, tolerance=1e-5)
    for i, w, support, true in zip(
        *map(np.asarray, (index, weight)), fixture["true_support"], fixture["true_weights"]
    ):
        found = dict(zip(i.tolist(), w.tolist()))
        assert {j for j, value in found.items() if value} == set(support)
        np.testing.assert_allclose([found[j] for j in support], true, rtol=1e-4)
    # A shared token is itself.
    index, weight = omp.pursue(points[[7, 3]] * 4, points.T, k=5, tolerance=1e-5)
    best = np.argmax(np.abs(np.asarray(weight)), axis=1)
    assert np.asarray(index)[[0, 1], best].tolist() == [7, 3] and (np.asarray(weight) != 0).sum() == 2


def test_principal_directions_as_few_tokens():
    """mergekit's sparse basis, which it gets by the same pursuit; the sign of a direction is arbitrary."""
    fixture = numbers("interp")["sparse_basis"]
    points = array(fixture["points"], np.float32)
    points -= points.mean(0)
    directions = landmarks.components(points, fixture["d"])
    index, weight = omp.pursue(directions, points.T, k=fixture["k"], tolerance=1e-6)
    np.testing.assert_array_equal(index, fixture["indices"])
    expected = array(fixture["coeffs"])
    sign = np.sign((np.asarray(weight) * expected).sum(1, keepdims=True))
    np.testing.assert_allclose(sign * weight, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10))
def test_a_shared_token_is_itself(seed, scale):
    """Of points as long as each other; inner products with longer ones may be greater."""
    points = base.unit(np.random.default_rng(seed).normal(size=(12, 8))).astype(np.float32)
    index, weight = omp.pursue(points * scale, points.T, k=4, tolerance=1e-5)
    assert np.asarray(index)[:, 0].tolist() == list(range(12))
    np.testing.assert_allclose(weight[:, 0], scale, rtol=1e-5)
    assert not np.asarray(weight)[:, 1:].any()


@pytest.mark.parametrize("row", range(6))
def test_interpolation_equals_mergekit(row):
    fixture = numbers("interp")
    result = fixture["results"][row]
    scheme = {"distance_proportional": "distance"}.get(result["scheme"], result["scheme"])
    points, x = (array(fixture[name]) for name in ("donor_points", "targets"))
    at, weights = Neighbours(result["k"], result["metric"], scheme).weigh(x, points)
    np.testing.assert_array_equal(at, result["indices"])
    np.testing.assert_allclose(weights, result["weights"], atol=2e-6)
    made = base.mix_at(weights, at, array(fixture["base_points"]))
    np.testing.assert_allclose(made, result["transplanted"], atol=5e-6)


def test_landmarks_use_the_rotation_that_fits():
    fixture = numbers("interp")["landmark_pca"]
    a, b, x = (array(fixture[name]) for name in ("points_a", "points_b", "targets"))
    np.testing.assert_allclose(landmarks.carry(x, a, b), fixture["exact"], atol=1e-4)
    # Where the spaces are turned against each other, mergekit's transpose is worse than the mean.
    turn = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
    b = a @ turn + 0.1 * RNG.normal(size=a.shape)
    error = np.square(landmarks.carry(a, a, b) - b).sum()
    assert error < 0.1 * np.square(b - b.mean(0)).sum()


def test_wechsel_equals_the_authors():
    fixture = numbers("wechsel")
    theirs, ours, table = (array(fixture[name]) for name in ("source_aux", "target_aux", "source_matrix"))
    at, weights = wechsel.Wechsel(fixture["neighbors"], fixture["temperature"]).weigh(
        base.unit(ours[:5]), base.unit(theirs)
    )
    for row, (words, expected) in enumerate(fixture["weights"].values()):
        assert [f"w{i}" for i in at[row]] == words
        np.testing.assert_allclose(weights[row], expected, rtol=1e-6)
    # Row 0 is a special token, copied last there; row 5 has no vector.
    np.testing.assert_allclose(base.mix_at(weights, at, table)[1:], fixture["new_embeddings"][1:5], rtol=1e-6)
    pairs = list(zip(array(fixture["procrustes"]["X"]), array(fixture["procrustes"]["Y"])))
    np.testing.assert_allclose(wechsel.aligned(np.eye(5), pairs), fixture["procrustes"]["R"], atol=1e-7)


def test_focus_equals_the_authors():
    fixture = numbers("focus")
    alike = base.unit(array(fixture["aux_new"])) @ base.unit(array(fixture["aux_overlap"])).T
    np.testing.assert_allclose(alike, fixture["similarity"], atol=1e-7)
    weights = focus.sparsemax(alike)
    np.testing.assert_allclose(weights, fixture["sparsemax_weights"], atol=1e-7)
    made = base.mix(weights, array(fixture["source_embeddings"])[:, None])[:, 0]
    np.testing.assert_allclose(made, fixture["new_embeddings"], atol=1e-6)


def test_sparsemax_of_many():
    z = RNG.normal(size=(4, 3000)).astype(np.float32)
    z[1] = 0.5  # all alike: everything is in the support
    w = focus.sparsemax(z)
    np.testing.assert_allclose(w.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(w[1], 1 / 3000, rtol=1e-3)
    high = np.argsort(-z[0])
    assert w[0, high[0]] > 0.1 and w[0, high[-1]] == 0


def task(**aux):
    target = view("qwenlike")
    table = RNG.normal(size=(700, 2, 8)).astype(np.float32)
    shared = shared_rows(view("gpt2like"), target, 700)
    new = np.setdiff1d(np.array(sorted(target.pieces)), shared[:, 0])
    return Task(view("gpt2like"), target, table, new, shared, Aux(**aux))


def aux():
    donor = RNG.normal(size=(1000, 1, 6)).astype(np.float32)
    e = RNG.normal(size=(1000, 5)).astype(np.float32)
    e[500:520] = 0
    net = Projector(2, 8)
    trained_net = net, net.begun(params.init(jax.random.key(0), net.spec()), RNG.normal(size=(9, 2, 8)))
    return {"donor": donor, "source_vectors": e[:700], "target_vectors": e, "hypernet": trained_net}


@pytest.mark.parametrize("name", INITIALISERS)
def test_every_method_keeps_the_contract(name):
    wanted = task(**aux())
    rows, found = INITIALISERS[name]().rows(wanted)
    assert rows.shape == (len(wanted.new), 2, 8) and rows.dtype == np.float32 and found.dtype == bool
    assert np.isfinite(rows[found]).all() and found.mean() > 0.9
    assert (rows[:, 0] != rows[:, 1]).any() or name == "zero"


@pytest.mark.parametrize("name,need", [("omp", "donor"), ("focus", "target_vectors"), ("wechsel", "source_vectors")])
def test_what_is_missing_is_named(name, need):
    with pytest.raises(AtomError, match=f"needs {need}"):
        INITIALISERS[name]().rows(task())
    short = aux()
    short[need] = short[need][:9]
    with pytest.raises(AtomError, match=f"{need} has 9 rows"):
        INITIALISERS[name]().rows(task(**short))


def test_methods_are_written_like_policies():
    assert initialisers.parse("omp:k=3,tolerance=0.1") == omp.OMP(3, 0.1)
    for text, message in (
        ("best", "'best': expected fvt, omp"), ("omp:n=3", "no field 'n'"), ("omp:k=0", "k: expected"),
        ("fvt:input=best", "input=best: expected one of mean"),
    ):  # fmt: skip
        with pytest.raises(AtomError, match=message):
            initialisers.parse(text, "--method")


def test_draws_have_the_mean_and_deviation_of_the_table():
    table = RNG.normal(size=(500, 2, 3)).astype(np.float32) @ np.array(
        [[1, 0.9, 0], [0, 0.3, 0], [0, 0, 2]], np.float32
    )
    wanted = Task(view("gpt2like"), view("qwenlike"), table + 1, np.arange(20_000), np.zeros((0, 2), int))
    for name, cov in (("normal", np.diag(table[:, 0].var(0))), ("covariance", np.cov(table[:, 0].T))):
        rows = INITIALISERS[name]().rows(wanted)[0]
        np.testing.assert_allclose(rows[:, 0].mean(0), (table + 1)[:, 0].mean(0), atol=0.1)
        np.testing.assert_allclose(np.cov(rows[:, 0].T), cov, atol=0.15)


def test_rows_that_were_never_trained():
    fixture = numbers("normalise")["magikarp"]
    table = np.stack([array(fixture["embed"]), array(fixture["lm_head"])], axis=1)
    unused = [int(name[1:]) for name in fixture["known_unused"]] + list(range(fixture["vocab_size_named"], 200))
    np.testing.assert_array_equal(
        np.flatnonzero(trained(table, np.array(unused), fixture["quantile"])), fixture["good"]
    )


def test_vectors_from_text_know_what_is_alike():
    texts = [f"the {a} sat on a {b} and ate".encode() for a in ("cat", "dog") for b in ("mat", "rug")] * 60
    tk = train.train("bpe:330", texts)
    found = vectors.from_text(tk, texts, width=8, least=5)
    ids = {piece: i for i, piece in tk.pieces.items()}
    unit = base.unit(found)
    cat, dog, ate = (unit[ids[word]] for word in (b" cat", b" dog", b" ate"))
    assert found.shape == (tk.vocab_size, 8) and cat @ dog > max(cat @ ate, dog @ ate)
    assert not found[ids[b"z"]].any()
    np.testing.assert_array_equal(found, vectors.from_text(tk, texts, width=8, least=5))


def test_word_vectors_become_token_vectors():
    tk = train.train("bpe:330", [b"the cat sat on the mat " * 30])
    words = {"cat": np.array([1.0, 0]), "mat": np.array([0, 1.0])}
    found = wechsel.token_vectors(tk, words, {"cat": 3.0})
    forms = {word: [tk.encode(text).tolist() for text in (word, f" {word}")] for word in words}
    for i in range(tk.vocab_size):
        cat, mat = (sum(i in ids for ids in forms[word]) * n for word, n in (("cat", 3.0), ("mat", 1.0)))
        np.testing.assert_allclose(found[i], np.array([cat, mat]) / max(cat + mat, 1), rtol=1e-6)
    assert len(wechsel.pairs_of([("cat", "mat"), ("dog", "mat")], words, words)) == 1
    assert byte_view(tk).size == len(found)


def test_tokenadapt_mixes_pieces_and_neighbours():
    wanted = task()
    alone, found = initialisers.parse("tokenadapt:share=0").rows(wanted)
    pieces = FVT().rows(wanted)[0]
    assert found.all() and np.abs(alone).max() <= np.abs(wanted.table).max()
    # One piece: it is that piece, whatever the weights are.
    cuts = [wanted.source.cut(wanted.target.pieces[i]) for i in wanted.new.tolist()]
    single = [i for i, cut in enumerate(cuts) if len(set(cut)) == 1]
    np.testing.assert_allclose(alone[single], pieces[single], atol=1e-6)

    def embed(strings):
        return np.array([[len(s), sum(map(ord, s)) % 7, 1.0] for s in strings])

    wanted = task(embed=embed)
    near, _ = initialisers.parse("tokenadapt:share=1,neighbours=1").rows(wanted)
    assert all((row == wanted.table).all((1, 2)).any() for row in near[:5])
