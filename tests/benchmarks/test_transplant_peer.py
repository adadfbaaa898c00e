"""Rows compared with mergekit's, on a tiny model. The peer here does what mergekit does, which itself needs torch."""

import dataclasses
import types

import numpy as np
import pytest

from atom_jax.tokenizers import ByteTokenizer
from atom_jax.transfer.initialisers import base, omp
from atom_jax.typing import AtomError
from benchmarks import transplant_rows
from benchmarks.transplant_rows import Plan
from tests.transfer.numbers import tokenizer
from tests.transfer.test_transplant import model

PLAN = Plan(fvt=300, omp=20, k=4, repeats=2)


def peer_of(lm, home, wrong=0.0):
    """Looks tokens up as text, with the splitting rule of the source."""
    asked = []

    def cuts(tokens, prefix):
        texts = [token.replace(prefix, " ", 1) if token.startswith(prefix) else token for token in tokens]
        return [lm.tokenizer.encode(text).tolist() for text in texts]

    def call(name, *args):
        asked.append(name)
        read = lambda name: np.load(home / f"{name}.npy")  # noqa: E731
        if name == "cuts":
            return cuts(*args)
        if name == "fvt":
            np.save(home / "fvt.npy", wrong + np.stack([read("table")[cut].mean(0) for cut in cuts(*args)]))
        if name == "omp":
            index, weight = map(np.asarray, omp.pursue(read("targets"), read("points").T, k=args[0], tolerance=0.0))
            np.save(home / "omp.npy", base.mix_at(weight, index, read("base")))
        return 2.0

    return types.SimpleNamespace(call=call, asked=asked)


def test_the_same_rows_are_compared(tmp_path):
    lm = model()
    peer = peer_of(lm, tmp_path)
    fvt, pursuit = transplant_rows.compare(lm, tokenizer("qwenlike"), None, PLAN, tmp_path, peer.call)
    assert peer.asked == ["open", "fvt", "fvt", "fvt", "cuts", "omp", "omp", "omp"]
    assert (fvt.rows, fvt.peer, len(fvt.ours)) == (300, [2.0, 2.0], 2) and fvt.difference < 1e-6 and not fvt.apart
    assert fvt.others["read as they are spelled"] > 0 and sum(fvt.others.values()) < 150
    assert pursuit.difference < 1e-5 and pursuit.method == "omp, k=4" and "x" in str(pursuit)
    lines = transplant_rows.compare(lm, tokenizer("qwenlike"), None, dataclasses.replace(PLAN, omp=0), tmp_path, None)
    (alone,) = lines
    assert alone.peer == [] and alone.difference is None and "x" not in str(alone)


def test_rows_that_differ_are_counted(tmp_path):
    lm = model()
    plan = dataclasses.replace(PLAN, omp=0, repeats=1)
    peer = peer_of(lm, tmp_path, wrong=1.0)
    (row,) = transplant_rows.compare(lm, tokenizer("gemmalike"), None, plan, tmp_path, peer.call)
    assert row.apart == row.rows - sum(row.others.values()) > 100 and row.difference > 0.1


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    lm, peer = model(), peer_of(model(), tmp_path)
    with pytest.raises(AtomError, match=r"bytes: has no tokenizer\.json"):
        next(transplant_rows.compare(lm, ByteTokenizer(), None, PLAN, tmp_path, None))
    with pytest.raises(AtomError, match="gpt2like: the model has a row for each of its tokens already"):
        next(transplant_rows.compare(lm, tokenizer("gpt2like"), None, PLAN, tmp_path, peer.call))
    assert peer.asked == []
