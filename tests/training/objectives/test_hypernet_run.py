"""A hypernetwork is trained on tokenizers that are drawn, and makes the rows of another one."""

import contextlib
from collections import Counter

import chex
import numpy as np
import orbax.checkpoint as ocp
import pytest

import atom_jax
from atom_jax.checkpoint import hypernets
from atom_jax.data.sampled import Sampling, drawn
from atom_jax.tokenizers import train
from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.training import loop, start
from atom_jax.training.objectives.base import Setting
from atom_jax.training.record import read
from atom_jax.typing import AtomError


def experiment(source, *settings):
    return start.configure("configs/transfer.py:tiny_hypernet", [f"init_from={source}", *settings])


def test_pieces_are_the_commonest_and_noise_changes_them():
    words = Counter({b" the": 50, b" then": 9, " \u00e9".encode(): 3, b"q": 99})
    quiet, logp = drawn(words, Sampling(vocabulary=262, noise=0.0), np.random.default_rng(0))
    # Length times how often, of what begins with a character: " the" 59 times, then "the", " th" and so on.
    assert quiet == [b" the", b" th", b"the", b" t", b"he"] and (np.diff(logp) <= 0).all()
    every, _ = drawn(words, Sampling(vocabulary=400, noise=0.0), np.random.default_rng(0))
    assert b"\xc3\xa9" in every and b" \xc3" in every and not any(piece[0] == 0xA9 for piece in every)
    loud, _ = drawn(words, Sampling(vocabulary=262, noise=0.5, spread=0.0), np.random.default_rng(1))
    assert set(loud) != set(quiet) and len(loud) <= 5


def test_rows_in_drawn_tokens(source):
    exp = experiment(source)
    lm = atom_jax.load(source)
    with contextlib.closing(exp.objective.rows(Setting(exp, None, lm.tokenizer), exp.data, 0, 1)) as data:
        first, second = next(data), next(data)
        state = data.get_state()
        third = next(data)
        data.set_state(state)
        for name, x in next(data).items():
            np.testing.assert_array_equal(x, third[name])
    assert (first["surface"] != second["surface"]).any() and (first["surface"][0] == first["surface"][1]).all()
    view = byte_view(lm.tokenizer)
    surface, real = first["surface"][0], first["real"][0]
    spelled = [b"".join(view.pieces.get(i, b"") for i in row[there]) for row, there in zip(surface, real)]
    assert spelled[1:257] == [bytes([b]) for b in range(256)] and surface[0, 0] == lm.tokenizer.eos_ids[0]
    targets = first["targets"][first["loss_mask"]]
    whole = real[targets].sum(1) < exp.objective.net.length
    assert whole.mean() > 0.8 and first["sizes"].sum() >= first["loss_mask"].sum()
    sizes = first["sizes"][first["loss_mask"]]
    assert [len(spelled[i]) for i in targets[whole]] == sizes[whole].tolist() and max(sizes) > 2


def test_it_gets_better_than_it_began_and_is_used(source, tmp_path, one_device):
    result = loop.fit(experiment(source, "optim.ema=0.3"), tmp_path)
    before, after = [x for x in read(tmp_path / "metrics.jsonl") if x["kind"] == "validation"]
    # Before training it is FVT.
    assert before["bits_per_byte"] == pytest.approx(before["fvt_bits"], rel=1e-4)
    assert after["bits_per_byte"] < before["bits_per_byte"] - 0.05 and result.step == 6
    assert after["fvt_bits"] == before["fvt_bits"]
    net, p = hypernets.load(tmp_path)
    assert net == experiment(source).objective.net and np.asarray(p["out"]["w"]).any()
    # What was validated is the average, and the model is what it was.
    step = tmp_path / "checkpoints" / "6"
    with ocp.StandardCheckpointer() as reader:
        average, last = reader.restore(step / "ema")["hypernet"], reader.restore(step / "hypernet")
    average, last = (np.asarray(found["out"]["w"]) for found in (average, last))
    assert (p["out"]["w"] == average).all() and (p["out"]["w"] != last).any()
    chex.assert_trees_all_equal(atom_jax.load(tmp_path).params, atom_jax.load(source).params)
    lm, target = atom_jax.load(source), train.train("unigram:300", [b"the other version of another " * 30])
    made, report = atom_jax.transplant(lm, target, f"hypernet:path={tmp_path}")
    plain, _ = atom_jax.transplant(lm, target)
    assert report.counts["composed"] > 0 and (made.params["embed"] != plain.params["embed"]).any()


@pytest.mark.parametrize(
    "settings, words",
    [
        (["objective.net.d=16"], "for 1 tables of width 16, the model has 1 of 32"),
        (["optim.groups="], "hypernet: embed must not learn"),
        (["objective.net=none"], "hypernet.net is not set"),
        (["objective.net.length=1", "objective.lexical=1"], "lexical needs hypernet.net.length 2 or more"),
        (["data.stochastok=0.1"], "hypernet: data.stochastok does not go with"),
    ],
)
def test_what_does_not_fit_is_one_sentence(source, tmp_path, settings, words):
    with pytest.raises(AtomError, match=words):
        loop.fit(experiment(source, *settings), tmp_path)
