"""The comparison of lasting memories: sessions, ages, another book, and memories on disk that processes have read."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.data.builtin import novels
from atom_jax.evaluation import cache
from atom_jax.evaluation import run as evaluation
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.tasks import EvalConfig, lasting, lasting_ask, lasting_sessions, lasting_table, planted
from atom_jax.evaluation.tasks.lasting_streams import methods, stream_of
from atom_jax.evaluation.tasks.needle import Haystack
from atom_jax.kvcache.lasting.levels import Law
from atom_jax.lasting.memory import Memory
from atom_jax.lasting.reader import model_of
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError

ENCODER = Encoder(ByteTokenizer(), 1 << 20, False)
SQRT, ALL = "sqrt:entries=8,block=16+reread", "all:block=16+knn"
LAWS = f"none,{SQRT},{ALL}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    cfg = transformer.TransformerConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, max_length=2048, eos_ids=(257,)
    )
    tree = params.init(jax.random.key(0), transformer.spec(cfg))
    tree["embed"] = tree["embed"] * 20
    path = tmp_path_factory.mktemp("lasting_eval")
    atom_jax.save_hf(LM(cfg, tree, ByteTokenizer()), path / "model")
    for name in ("emma", "persuasion", "sense_and_sensibility"):
        (path / f"{name}.txt").write_bytes(novels()[name][3000:6000])
    return path


@pytest.fixture(scope="module")
def lm(home):
    return atom_jax.load(home / "model")


def settings(home, *more):
    texts = "+".join(str(home / f"{name}.txt") for name in ("emma", "sense_and_sensibility"))
    of = [f"streams={texts}", "tokens=900", "facts=6", "kinds=number,pet", "part=64", "batch=2", "windows=3",
          "scored=24", f"later={home}/persuasion.txt", f"laws={LAWS}", "scores=observed", "choice.whole=400",
          "choice.pages=3", *more]  # fmt: skip
    return evaluation.resolve(config.override(EvalConfig(), [f"lasting.{s}" for s in of]), str(home / "model"))


def measured(lm, cfg, out, monkeypatch):
    monkeypatch.setattr(evaluation.jax, "devices", lambda: jax.local_devices()[:1])
    return evaluation.evaluate(lm, ["lasting"], cfg, out)["lasting"].notes


def test_a_stream_of_several_texts(home):
    name = f"emma+persuasion+{home}/emma.txt"
    stream = stream_of(name, (), 26, 7000, np.random.default_rng(0), ENCODER)
    assert len(stream.ids) == 7000 == stream.ends[-1] and len(stream.texts) == 3
    n = 7000 - sum(len(fact.sentence) + len(fact.earlier) for fact in stream.facts)
    for text, (raw, share) in zip(stream.texts, [
        (novels()["emma"], n // 3), (novels()["persuasion"], 2 * n // 3 - n // 3),
        ((home / "emma.txt").read_bytes(), n - 2 * n // 3),
    ]):  # fmt: skip
        said = ByteTokenizer().decode(text.tolist())
        for sentence in sorted(
            (s for f in stream.facts for s in (f.sentence, f.earlier) if s), key=len, reverse=True
        ):
            said = said.replace(sentence, "", 1)
        assert said == raw[:share].decode()
    whole = ByteTokenizer().decode(stream.ids.tolist())
    assert all(whole[at:].startswith(fact.sentence) for fact, at in zip(stream.facts, stream.at))
    # One text alone is what it has always been.
    hay, facts = Haystack.of(novels()["emma"], ENCODER), planted.facts((), 13, np.random.default_rng(1))
    one, same = planted.plant(hay, facts, 4000, ENCODER), planted.plant_in_all([hay], facts, 4000, ENCODER)
    assert np.array_equal(one.ids, same.ids) and one.ends.tolist() == [4000]
    with pytest.raises(AtomError, match="of 2 texts, the shortest of which has 3000"):
        stream_of(f"emma+{home}/emma.txt", (), 4, 9000, np.random.default_rng(0), ENCODER)


def test_methods_are_laws_with_what_is_beside_them():
    found = methods(("sqrt:entries=8", "block=16+reread", "reread", "all+knn"), ("observed", "random"), "m")
    assert [(m.name, m.score, m.rereads, m.mixes) for m in found] == [
        ("none", "", False, False),
        ("sqrt:entries=8,block=16+reread", "observed", True, False),
        ("sqrt:entries=8,block=16+reread", "random", True, False),
        ("reread", "", True, False),
        ("all:block=128+knn", "observed", False, True),
    ]
    assert found[1].law == Law(0.5, 8, 16) and found[3].law is None
    with pytest.raises(AtomError, match="expected reread or knn behind"):
        methods(("sqrt+sorcery",), ("observed",), "m")
    with pytest.raises(AtomError, match="learned: no score ships for this model"):
        methods(("sqrt",), ("learned",), "m")
    with pytest.raises(AtomError, match="sqrt:entries=64,block=128 by random is there twice"):
        methods(("sqrt", "sqrt:block=128"), ("random",), "m")


def test_ages_and_other_books_by_hand():
    row = {"stream": "a", "law": "none", "score": "", "kind": "", "facts": 4, "ages": [1, 3, 4, 17],
           "rights": [1.0, 0.5, 1.0, 0.25], "later": [1.0, 3.0]}  # fmt: skip
    other = {**row, "stream": "b", "ages": [2, 63, 64, 5], "rights": [0.0, 1.0, 1.0, 1.0], "later": [2.0, 2.0]}
    better = {**row, "law": "log", "later": [1.0, 1.5]}, {**other, "law": "log", "later": [1.5, 2.0]}
    rows = [row, better[0], other, better[1]]
    found = [r for r in lasting_table.ages(rows) if r["law"] == "none"]
    assert [(r["from"], r["to"], r["facts"]) for r in found] == [(1, 4, 3), (4, 16, 2), (16, 64, 2), (64, 256, 1)]
    assert [r["right"] for r in found] == [0.5, 1.0, 0.625, 1.0]
    assert [round(r["whole"], 3) for r in found] == [0.333, 1.0, 0.5, 1.0] and found[2]["age"] == 40.0
    none, log = lasting_table.later(rows)
    assert none["nats"] == 2.0 and none["added"] == none["added_stderr"] == 0
    # Means over streams: 1.5 and 2.5 against 1.25 and 1.75.
    assert log["added"] == -0.5 and log["added_stderr"] == pytest.approx(0.25)


def test_a_memory_without_entries_changes_nothing_of_another_book(lm, home, monkeypatch):
    # The stream is one part, so nothing has left the window.
    cfg = settings(home, f"streams={home}/emma.txt", "tokens=700", "part=1000", "facts=4", "laws=log,sqrt",
                   "choice.gated=false")  # fmt: skip
    notes = measured(lm, cfg, None, monkeypatch)
    assert [row["entries"] for row in notes["rows"] if not row["kind"]] == [0, 0, 0]
    assert [row["added"] for row in notes["later"]] == [0, 0, 0] and len({r["nats"] for r in notes["later"]}) == 1
    with pytest.raises(AtomError, match="is among the streams; name another book"):
        measured(lm, settings(home, f"later={home}/emma.txt"), None, monkeypatch)
    with pytest.raises(AtomError, match="has no window of"):
        measured(lm, settings(home, "scored=3000"), None, monkeypatch)
    with pytest.raises(AtomError, match="exceed the 2048 positions of the model"):
        measured(lm, settings(home, "tokens=2500", "choice.whole=4000"), None, monkeypatch)
    with pytest.raises(AtomError, match="memories lie beside --out"):
        measured(lm, settings(home, "processes=true"), None, monkeypatch)


def test_processes_read_what_one_reads(lm, home, tmp_path, monkeypatch):
    one = measured(lm, settings(home), tmp_path / "one.json", monkeypatch)
    cfg = settings(home, "processes=true")
    assert cfg.lasting.checkpoint == str(home / "model")
    calls, run = [], lasting_sessions.subprocess.run

    def counted(command, **how):
        calls.append(command)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(command, **how)

    monkeypatch.setattr(lasting_sessions.subprocess, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        measured(lm, cfg, tmp_path / "many.json", monkeypatch)
    assert not list((tmp_path / "many.json.memories").glob("*.npy"))
    many = measured(lm, cfg, tmp_path / "many.json", monkeypatch)
    # Two sessions for each of two memories; one was interrupted, and none that was read is read again.
    assert len(calls) == 2 * 2 + 1 and calls[2] == calls[1]
    mine, others = ({(r["law"], r["kind"]): r for r in notes["rows"]} for notes in (one, many))
    kinds = {kind for _, kind in mine}
    assert mine.keys() == others.keys() and len(mine) == 3 * len(kinds) and kinds >= {"", "number", "pet"}
    for name, row in mine.items():
        there = others[name]
        assert all(row[x] == there[x] for x in ("entries", "by_law", "front", "ages", "rights"))
        assert row["nats"] == pytest.approx(there["nats"], abs=1e-3)
        assert row["bytes"] is None and (there["bytes"] is None) == (name[0] == "none")
    whole, less = mine[ALL, ""], mine[SQRT, ""]
    assert whole["entries"] == whole["by_law"] > 700 > less["entries"] == less["by_law"] > 60
    assert others[ALL, ""]["bytes"] > others[SQRT, ""]["bytes"]
    assert len(others[ALL, ""]["growth"]) == 3 and others[ALL, ""]["growth"][-1] == whole["growth"][-1]
    for a, b in zip(one["later"], many["later"]):
        assert a["nats"] == pytest.approx(b["nats"], abs=1e-3)
    again = measured(lm, cfg, tmp_path / "many.json", monkeypatch)
    assert again["rows"] == many["rows"] and len(calls) == 5
    assert json.loads((tmp_path / "many.json").read_text())["tasks"]["lasting"]["later"]
    _same_entries(lm, cfg.lasting, tmp_path / "many.json.memories")
    assert len(calls) == 5


def _same_entries(lm, cfg, where):
    """What memories on disk hold is what one process holds, entry by entry."""
    name, model = cfg.streams[0], model_of(lm)
    chosen = methods(cfg.laws, cfg.scores, model.fingerprint)
    stream = stream_of(name, cfg.kinds, cfg.facts, cfg.tokens, np.random.default_rng((0, 7, 0)), ENCODER)
    how = (lm, model, stream, chosen, cfg.part, name, cfg.choice, cfg.neighbours)
    kept = lasting.Held(*how)
    with contextlib.closing(cache.Lines(None, {})) as lines:
        on_disk = lasting.Directories(*how, cfg.checkpoint, where, lines)
    for method in chosen[1:]:
        directory = on_disk._homes[lasting_sessions._made_by(method)].directory
        ours, theirs = kept._blocks[method.law, method.file].all(), Memory.open(directory).entries()
        assert [len(e) for e in ours] == [len(e) for e in theirs] and Memory.open(directory).verify()
        for a, b in zip(ours, theirs):
            assert np.array_equal(a.place, b.place) and np.array_equal(a.source, b.source)
            np.testing.assert_allclose(a.k.astype(np.float32), b.k.astype(np.float32), atol=2e-3)
    # Nothing is known of how they grew, but how they stand now.
    with on_disk.kept(chosen[1]) as found:
        assert found.growth == [(0, 0), kept._growth[chosen[1].law, chosen[1].file][-1]]
    on_disk._stream = dataclasses.replace(stream, ids=stream.ids[::-1].copy())
    with pytest.raises(AtomError, match="and not the stream as it is"), on_disk.kept(chosen[1]):
        pass


def test_windows_of_another_book():
    ids = np.arange(1000)
    found = lasting_ask.another_book(ids, 3, 100)
    assert [(q[0], a[0], a[-1], len(a)) for q, a in found] == [
        (0, 16, 115, 100),
        (442, 458, 557, 100),
        (884, 900, 999, 100),
    ]


def test_numbers_of_capitals_are_asked_again_in_other_words():
    facts = planted.facts(("number", "place"), 48, np.random.default_rng(0))
    again = [planted.in_other_words(fact) for fact in facts]
    found = [(fact, other) for fact, other in zip(facts, again) if other is not None]
    assert len(found) == 13 and all(
        fact.kind == "number" and other.kind not in planted.KINDS for fact, other in found
    )
    for fact, other in found:
        assert (other.sentence, other.answer) == (fact.sentence, fact.answer)
        city = next(city for city in planted._CAPITALS if city in fact.sentence)
        assert f" {city}?" not in other.question and planted._CAPITALS[city] in other.question


def test_quotes_are_the_texts_own(lm, home, monkeypatch):
    cfg = settings(home, "quotes=5", "laws=log", "windows=0")
    of = cfg.lasting
    stream = stream_of(of.streams[0], of.kinds, of.facts, of.tokens, np.random.default_rng((of.seed, 7, 0)), ENCODER)
    found = planted.quotes(stream, 5)
    assert len(found) == 5 and planted.quotes(stream, 0) == []
    for question, answer, at in found:
        assert np.concatenate([question, answer]).tolist() == stream.ids[at : at + 32].tolist()
        assert len(question) == len(answer) == 16 and not stream.said[at : at + 32].any()
        assert (stream.ends <= at).sum() == (stream.ends <= at + 31).sum()
    rows = [row for row in measured(lm, cfg, None, monkeypatch)["rows"] if row["kind"] == "quotes"]
    assert [row["facts"] for row in rows] == [5, 5]
    assert rows[0]["ages"] == [len(stream.ids) - at for _, _, at in found]
    with pytest.raises(AtomError, match=r"lasting\.quotes: the text has"):
        planted.quotes(stream, 10_000)
