"""The benchmark's table on tiny models: both sides agree and every row has its figures. No time is asserted."""

import importlib.util
import json
import pathlib

import pytest

from atom_jax.typing import AtomError
from benchmarks import compare, lm, machine, table
from benchmarks.compare import Figures, Plan
from benchmarks.rows import Row, rows
from tests import quick

ROOT = pathlib.Path(__file__).resolve().parents[2]
MISSING = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
needs_torch = pytest.mark.skipif(bool(MISSING), reason="torch or transformers is missing: `make install-torch`")


@pytest.fixture
def plan(golden):
    return Plan(
        checkpoint=str(golden / "hf_tiny" / "llama"), prompts=(16,), new_tokens=4, batch=2,
        train=(f"{ROOT}/configs/lm.py:tiny",), train_steps=1, repeats=1, matmul=64, megabytes=1,
    )  # fmt: skip


@needs_torch
def test_every_row_is_measured(plan, tmp_path, capsys, monkeypatch):
    # Eight simulated devices only cost time here.
    monkeypatch.setenv("XLA_FLAGS", quick.FLAGS)
    out = tmp_path / "table.json"
    assert lm.run(plan, ["*"], out)
    text, written = capsys.readouterr().out, json.loads(out.read_text())
    assert written["complete"] and written["plan"]["prompts"] == [16]
    assert [r["name"] for r in written["rows"]] == [r.name for r in rows(plan)]
    for row, result in zip(rows(plan), written["rows"]):
        assert row.label in text
        assert min(result["ours"], result["peer"], result["ratio"]) > 0
        bound = {"prefill": "matmul", "decode": "read", "train": "matmul"}.get(row.name.partition("-")[0])
        assert bound is None or (result["bound"] == bound and min(result["share"]) > 0)


@needs_torch
def test_a_broken_checkpoint_is_one_sentence(plan, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AtomError, match=r"config\.json"):
        lm.run(Plan(checkpoint=str(tmp_path), repeats=1, matmul=8, megabytes=1), ["prefill-512"])


def test_bad_requests(plan, tmp_path, monkeypatch):
    with pytest.raises(AtomError, match="no such row; there are matmul"):
        lm.run(plan, ["prefill-7"])
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    with pytest.raises(AtomError, match="make install-torch"):
        lm.run(plan, ["*"])
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(AtomError, match="make smollm2"):
        lm.run(Plan(checkpoint=str(tmp_path / "absent")), ["prefill-512"])
    with pytest.raises(AtomError, match="there is no directory"):
        lm.run(plan, ["*"], tmp_path / "absent" / "table.json")


def test_ratio_and_share():
    row = Row("decode", "decode", "tokens/s", lambda bench: None)
    result = table.summary(row, Figures([10.0, 12.0, 11.0], [5.0, 5.5, 6.0], "", "read", 2.0), {"read": 44.0})
    assert result["ratio"] == 2.0 and result["share"] == [0.5, 0.25]
    less = table.summary(Row("m", "m", "GiB", lambda bench: None, less=True), Figures([2.0], [3.0]), {})
    assert less["ratio"] == 1.5 and "share" not in less


def test_counted_work():
    cfg = dict(
        d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16, vocab_size=32, layer_types=[],
        sliding_window=3, tie_embeddings=True,
    )  # fmt: skip
    weights = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16)
    assert machine.weight_bytes(cfg) == 4 * (weights + 32 * 8)
    # Five tokens see 1 + 2 + ... + 5 keys, three at most through a window.
    assert machine.forward_flops(cfg, 1, 5, 1) == 2 * (5 * weights + 32 * 8) + 2 * 15 * 2 * 2 * 8
    sliding = cfg | {"layer_types": ["full", "sliding"]}
    assert machine.forward_flops(sliding, 1, 5, 1) == 2 * (5 * weights + 32 * 8) + (15 + 12) * 2 * 2 * 8
    assert machine.decode_bytes(sliding, 3, 5.0) == 4 * (weights + 32 * 8 + 3 * 2 * 4 * (5 + 3))
