"""The comparison of cache policies on tiny models. The peer here is ours too; kvpress itself needs torch."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.evaluation.tasks.kv import KvSettings
from atom_jax.evaluation.tasks.kv_cells import Ask, Method
from atom_jax.inference import continuation
from atom_jax.kvcache import policies
from atom_jax.kvcache.dms import DMS
from atom_jax.models import registry, transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError
from benchmarks import kv_parity, kv_speed, kv_tables
from benchmarks.kv_speed import Row, Runner, Speed

LEARNED = DMS(form="observed", window=6, scale=1.0, offset=0.0, bias=True, page=4)


def build(memory=None):
    cfg = transformer.TransformerConfig(
        vocab_size=264, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24, max_length=256,
        memory=memory,
    )  # fmt: skip
    tree = params.init(jax.random.key(1), transformer.spec(cfg))
    if memory is not None:
        learned = tree["layers"]["attn"]["dms"]
        learned["alpha"] = jax.random.normal(jax.random.key(2), learned["alpha"].shape)
    return LM(cfg, tree, ByteTokenizer())


@pytest.fixture(scope="module")
def lm():
    return build()


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(3, 250, 200).astype(np.int32)


def peer_of(lm, wrong=0.0):
    """Answers as `benchmarks.press` does, by our own policies."""

    def score(context, target, asks):
        out = []
        for ask in asks:
            policy = None
            if ask["policy"] != "none":
                fields = {f.name for f in dataclasses.fields(policies.POLICIES[ask["policy"]])}
                policy = policies.POLICIES[ask["policy"]](**{k: v for k, v in ask.items() if k in fields})
                assert policy.budget == ask["keep"]
            found = continuation.score(registry.with_memory(lm, policy), [context], [target])
            bias = wrong if ask["policy"] == "knorm" else 0.0
            out.append({"nats": float(-found.logprobs.mean()) + bias, "held": float(found.held.mean())})
        return out

    return lambda name, *args: {"score": score}[name](*args)


def test_both_sides_see_the_same_and_differences_are_marked(lm, ids):
    settings = KvSettings(policies=("none", "knorm", "snapkv:window=4", "h2o"), budgets=(12, 8))
    windows = [Ask(ids[i : i + 40], ids[i + 40 : i + 48], i) for i in (0, 50)]
    learned = build(LEARNED)
    rows = list(kv_parity.compare([("", lm), ("mine", learned)], settings, windows, peer_of(lm, 0.5)))
    assert [(r.policy, r.budget) for r in rows] == [
        ("none", None), ("knorm", 12), ("knorm", 8), ("snapkv:window=4", 12), ("snapkv:window=4", 8), ("h2o", 12),
        ("h2o", 8), ("mine", None),
    ]  # fmt: skip
    for row in rows:
        assert row.nats == pytest.approx(np.mean(row.windows))
        if row.policy in ("h2o", "mine"):
            assert row.peer_nats is None and row.difference is None and row.agrees
        elif row.policy == "knorm":
            assert row.difference == pytest.approx(-0.5, abs=1e-5) and not row.agrees
        else:
            assert abs(row.difference) < 1e-5 and row.agrees and row.peer_held == row.held
    assert rows[0].held == 40 and rows[1].held == 12 and 7 <= rows[-1].held < 40
    lines = kv_parity.table(rows).splitlines()
    assert [line.endswith("*") for line in lines] == [False, False, True, True, *[False] * 5]


def test_without_a_peer_there_is_our_side(lm, ids):
    windows = [Ask(ids[:40], ids[40:48], 0)]
    rows = list(kv_parity.compare([("", lm)], KvSettings(policies=("tova",), budgets=(8,)), windows, None))
    assert [r.policy for r in rows] == ["none", "tova"] and all(r.peer_nats is None for r in rows)


def test_requests_carry_the_settings():
    ask = kv_parity.request(Method("", 12, policies.parse("adakv:budget=12,window=4,floor=0.3")), 48)
    assert ask["policy"] == "adakv" and ask["keep"] == 12 and ask["window"] == 4 and ask["floor"] == 0.3
    assert ask["compression"] == 0.75
    for length in (40, 1000, 2048):
        for n in range(1, length, 7):
            assert int(length * (1 - kv_parity.compression(n, length))) == n
    assert kv_parity.request(Method("none", None, None), 48) == {"policy": "none"}
    assert set(kv_parity.SHARED) - {"none"} < set(policies.POLICIES)


@pytest.mark.parametrize("memory", [None, "tova:budget=16", LEARNED])
def test_rows_of_a_batch_go_on_as_one_does_alone(lm, ids, memory):
    model = build(LEARNED) if memory is LEARNED else registry.with_memory(lm, policies.parse(memory or "none"))
    tokens = []
    for rows in (1, 3):
        layers = transformer.decode_params(model.params, model.config, unroll=True)
        runner = Runner("it", model, layers, ids[:50], 64)
        runner.batch(rows)
        assert runner.step(4) > 0
        tokens.append(runner.slots.decode(runner.slots.made[0] + 8).tokens[:, :8])
        np.testing.assert_array_equal(runner.slots.session.length, np.full(rows, 62))
        result = runner.result([0.1])
        assert result.rows == rows and result.seen == 62 and 7 <= result.held <= 62
        assert result.live == rows * result.held * 2 * 2 * 2 * 8 * 4 < result.buffers
    np.testing.assert_array_equal(tokens[1], np.repeat(tokens[0], 3, axis=0))
    alone = atom_jax.generate(dataclasses.replace(model, tokenizer=None), [ids[:50].tolist()], 13, stop_ids=())
    assert tokens[0][0].tolist() == alone.ids[0][5:13]


def test_speed_of_all_methods(lm, ids, capsys):
    speed = Speed(context=80, rows=(1, 2), seen=(48,), repeats=2, new=4)
    models = [
        ("dense", lm),
        ("learned", build(LEARNED)),
        ("some", registry.with_memory(lm, policies.parse("tova:budget=16"))),
    ]
    one, two = kv_speed.measure(models, ids, speed, lambda text: None)
    assert [(r.method, r.rows, r.seen) for r in one] == [
        ("dense", 1, 71), ("learned", 1, 71), ("some", 1, 71), ("some", 1, 39),
    ]  # fmt: skip
    assert [(r.method, r.rows, r.seen) for r in two] == [("dense", 2, 80), ("learned", 2, 80), ("some", 2, 80)]
    assert one[0].factor == one[0].predicted == 1 and one[3].factor is None and one[2].predicted > 1
    assert one[0].held == 71 and one[2].held == one[3].held == 16
    assert len(kv_speed.table([*one, *two]).splitlines()) == 8


def test_factors_follow_from_seconds_and_bytes():
    dense = Row("dense", 1, 100, 100, 50.0, 150.0, 160.0, [4.0, 6.0, 5.0])
    less = Row("less", 1, 100, 20, 50.0, 30.0, 40.0, [2.0, 2.5, 9.0])
    _, row = kv_speed.related([dense, less])
    assert row.factor == 2.0 and row.predicted == 2.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeats": 0}, "at least 1"),
        ({"repeats": 8, "new": 8}, "at most 63"),
        ({"context": 60}, "more than 82"),
    ],
)
def test_bad_speed_settings(settings, message):
    with pytest.raises(AtomError, match=message):
        Speed(**settings)


def plan(checkpoint, tmp_path, **changes):
    settings = KvSettings(
        policies=("tova",), budgets=(8,), sources=(str(tmp_path / "text.txt"),), context=120, scored=8, facts=1,
        kinds=("code",),
    )  # fmt: skip
    values = {
        "checkpoint": str(checkpoint), "adapters": (), "parts": ("parity",), "kvpress": str(tmp_path / "none"),
        "settings": settings, "speed": Speed(), "speed_policy": "",
    }  # fmt: skip
    return kv_tables.Plan(**values | changes)


def test_the_command(lm, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 20)
    atom_jax.save_hf(lm, tmp_path / "model")
    out = tmp_path / "kv.json"
    assert kv_tables.measure(plan(tmp_path / "model", tmp_path, parts=("parity", "recall")), out)
    text, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "make install-kvpress" in text and "tova" in text
    assert written["complete"] and [r["policy"] for r in written["parity"]] == ["none", "tova"]
    recall = {(r["policy"], r["part"]): r for r in written["recall"]}
    assert set(recall) == {(name, part) for name in ("none", "tova") for part in ("facts", "facts_nats")}
    assert recall["none", "facts"]["held"] == 120 and recall["tova", "facts"]["held"] == 8
    assert "1 facts, planted" in text
    with pytest.raises(AtomError, match="no part 'size'"):
        kv_tables.measure(plan(tmp_path / "model", tmp_path, parts=("size",)))
    with pytest.raises(AtomError, match="there is no directory"):
        kv_tables.measure(plan(tmp_path / "model", tmp_path), tmp_path / "absent" / "kv.json")
