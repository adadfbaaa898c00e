"""Documents that ask for what was planted in them: what is in them, and that nothing of the evaluation's is."""

import functools
import re

import numpy as np
import pytest

from atom_jax.data import pipeline
from atom_jax.data.config import DataConfig
from atom_jax.data.facts import parse, source, tables, things
from atom_jax.data.facts.kinds import Codes, Numbers, Words, drawn, sentence_ends, woven
from atom_jax.data.facts.source import ROOM
from atom_jax.data.packing import described
from atom_jax.data.pieces import Pieces
from atom_jax.data.pipeline import make_iterator
from atom_jax.data.sources import open_source
from atom_jax.data.vocabulary import trained_tokenizer
from atom_jax.evaluation.tasks import needle, planted
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import AtomError

SMALL = "facts:austen:size=1200:facts=2:gap=200:weight=5"


def words_of(text: str) -> list[str]:
    """The words of a wording; what is put into it is one word, whatever it is."""
    return re.findall(r"\w+", re.sub(r"\{\w*\}", " xx ", text.lower()))


def strings(answers) -> tuple[str, ...]:
    return answers.words if isinstance(answers, Words) else ()


def content(kinds, others) -> set[str]:
    """All subjects, answers and others of a table."""
    return {x for kind in kinds.values() for x in (*kind.subjects, *strings(kind.answers))} | set(others)


THEIRS = [w for kind in planted.KINDS.values() for w in kind.wordings]
THEIR_TEXTS = [text for w in THEIRS for text in w[:3]] + [needle._SENTENCE, needle._QUESTION]
THEIR_THINGS = content(planted.KINDS, planted._OTHERS) | set(needle._CITIES)
OURS = [text for kind in tables.KINDS.values() for w in kind.wordings for text in w[:3]]
OUR_THINGS = content(tables.KINDS, things.OTHERS)


def test_no_wording_of_the_evaluation_is_trained_on():
    runs = lambda texts: {tuple(w[i : i + 4]) for w in map(words_of, texts) for i in range(len(w) - 3)}  # noqa: E731
    assert runs(THEIR_TEXTS) & runs(OURS) == set()
    assert not {" ".join(words_of(text)) for text in THEIR_TEXTS if text} & {" ".join(words_of(x)) for x in OURS}


def test_nothing_that_the_evaluation_asks_about_is_trained_on():
    text = "\n".join([*OURS, *OUR_THINGS]).lower()
    for thing in THEIR_THINGS:
        assert not re.search(rf"\b{re.escape(thing.lower())}\b", text), thing
    # Nor any part of a name.
    names = {word for thing in THEIR_THINGS for word in re.findall(r"\b[A-Z]\w+", thing)}
    mine = {word for thing in OUR_THINGS for word in re.findall(r"\b[A-Z]\w+", thing)}
    assert names and not names & mine
    forms = [kind.answers for kind in planted.KINDS.values() if isinstance(kind.answers, Numbers)]
    assert forms and not [kind.answers for kind in tables.KINDS.values() if kind.answers in forms]


def test_every_kind_is_as_the_tables_say():
    assert len(tables.KINDS) >= 35 and sum(len(kind.wordings) for kind in tables.KINDS.values()) >= 70
    assert "".join([*OURS, *OUR_THINGS]).isascii()
    draw, longest = np.random.default_rng(0), 0
    for name, kind in tables.KINDS.items():
        assert len(set(kind.subjects)) == len(kind.subjects) >= 16, name
        assert len(set(strings(kind.answers))) == len(strings(kind.answers)), name
        for _ in range(20):
            for fact in drawn(tables.KINDS, things.OTHERS, (name,), 10, draw):
                assert fact.kind == name and fact.answer in fact.sentence and fact.answer not in fact.question
                assert fact.sentence[0] in " \n" and fact.question[0] in " \n" and fact.question.count("? ") < 2
                assert not fact.earlier or fact.earlier != fact.sentence
                longest = max(longest, sum(map(len, fact[1:])))
        # The longest names of all.
        said = {"s": kind.subjects, "a": strings(kind.answers) or ("0" * 12,), "m": things.OTHERS}
        said = {k: max(v, key=len) for k, v in said.items()} | {
            "b": max(strings(kind.answers) or ("0" * 12,), key=len)
        }
        for wording in kind.wordings:
            longest = max(longest, sum(len(text.format(**said)) for text in wording))
    # And what a layout puts around a question.
    assert longest + len("\nQ: \nA:  .") <= ROOM


def test_codes_have_their_form():
    for a in Codes("AA-00").two(np.random.default_rng(0)):
        assert re.fullmatch(r"[A-Z]{2}-\d\d", a)


def test_a_document_of_a_seed_is_the_same_everywhere():
    name = "facts:austen:size=900:facts=2:gap=0"
    corpus, again, other = (open_source(f"{name}{more}", "train") for more in ("", "", ":seed=1"))
    one = corpus.marked(8)
    assert one["text"].decode() == GOLDEN == corpus.read(8).decode() and corpus.read(8, 10, 20) == one["text"][10:20]
    assert [one["text"][a:b] for a, b in one["answers"]] == [b"841", b"Teodor Fujita"] and one["weight"] == 20
    assert corpus.read(7) == again.read(7) != corpus.read(0) and corpus.crc == again.crc
    assert other.read(0) != corpus.read(0) and other.crc != corpus.crc and len(other) == 2**20


GOLDEN = (
    " When you have\nlived to my age, you will begin to think letters are never worth going\nthrough the rain "
    'for." The fare to Valencia is 143 pence.\n\nThere was a little blush, and then this answer,\n\n"I must '
    "not hope to be ever situated as you are, in the midst of every\ndearest connexion, and therefore I cannot "
    'expect that simply growing\nolder should make me indifferent about letters." From this week on the fare to '
    'Valencia is 841 pence.\n\n"Indifferent! Oh! "Careful with the engraved typewriter, it is mine," said '
    "Teodor Fujita. no--I never conceived you could become indifferent.\nLetters are no matter of indifference; "
    'they are generally a very\npositive curse."\n\n"You are speaking of letters of business; mine are letters '
    'of\nfriendship."\n\nHow many pence is the fare to Valencia from this week on? It is 841.\nWho said that '
    "the engraved typewriter was theirs? It was Teodor Fujita."
)


@pytest.fixture
def planted_in(monkeypatch):
    """(a source, a number) -> the text of a document, its answers, where they begin, and all facts in it."""
    seen, open_once = [], functools.cache(open_source)
    monkeypatch.setattr(source, "drawn", lambda *args: seen.append(drawn(*args)) or seen[-1])

    def document(name, i):
        one = open_once(name, "train").marked(i)
        spans = one["answers"].tolist()
        return one["text"].decode(), [one["text"][a:b].decode() for a, b in spans], [a for a, _ in spans], seen[-1]

    return document


@pytest.mark.parametrize("options", ["", ":size=3000:facts=3:gap=1700", ":size=16000:facts=40:gap=100"])
def test_facts_are_planted_where_sentences_end_long_before_their_questions(planted_in, options):
    how, kinds, counts, between = parse(f"austen{options}")[1], set(), set(), 0
    for i in range(30):
        text, answers, starts, facts = planted_in(f"facts:austen{options}", i)
        assert how.size - 600 < len(text) <= how.size and len(facts) == how.facts == len(set(facts))
        assert -(-how.facts // 2) <= len(answers) <= how.facts
        kinds |= {fact.kind for fact in facts}
        counts.add(len(answers))
        by_question = []
        for fact in facts:
            at = text.index(fact.sentence)
            assert text.count(fact.sentence) == 1 and (at == 0 or text[at - 1] in '.!?"\n')
            between += at > 0
            if fact.earlier:
                assert text.index(fact.earlier) < at
            question = fact.question.strip().split("? ")[0]
            if question in text:
                asked = text.rindex(question)
                assert asked - (at + len(fact.sentence)) >= how.gap
                by_question.append((asked, fact.answer))
        assert [answer for _, answer in sorted(by_question)] == answers
        assert all(q < start for (q, _), start in zip(sorted(by_question), starts))
    assert len(counts) > 1 and len(kinds) > 25 and between


def test_news_are_asked_for_as_they_are_now(planted_in):
    changed = 0
    for i in range(200):
        text, answers, _, facts = planted_in("facts:austen", i)
        for fact in facts:
            if fact.kind in ("desk", "postponed", "chair", "fare", "override"):
                assert fact.answer not in fact.earlier and text.index(fact.earlier) < text.index(fact.sentence)
                changed += fact.answer in answers
    assert changed > 30


def test_splits_share_no_text():
    novels = {split: open_source("austen", split) for split in ("train", "validation", "test")}
    whole = {k: {line for i in range(len(v)) for line in v.read(i).split(b"\n")} for k, v in novels.items()}
    firsts = set()
    for split in novels:
        corpus = open_source("facts:austen", split)
        for i in range(20):
            text = corpus.read(i)
            firsts.add(text[:200])
            lines = [line for line in text.split(b"\n") if len(line) > 50]
            inside = {name: sum(line in all_ for line in lines) for name, all_ in whole.items()}
            # Lines with facts in them are nowhere.
            assert inside[split] > 40 and not any(inside[name] for name in inside if name != split)
    assert len(firsts) == 60


def test_passages_go_on_where_documents_end_and_are_utf8(tmp_path):
    for i in range(40):
        name = tmp_path / f"{i:02d}.txt"
        name.write_text(f"<{i}> " + "Dïés ist ein Säťz, dér kéin Endé hat " * 6)
    corpus = open_source(f"facts:{tmp_path}/*.txt:size=3000:facts=2:gap=0", "train")
    seen = set()
    for i in range(40):
        text = corpus.read(i).decode()
        assert len(text.encode()) <= 3000 and text.count("<") > 3
        found = [int(x) for x in re.findall(r"<(\d+)>", text)]
        steps = np.diff(found)
        # One after the other, those of the other splits left out, and around the end.
        assert ((steps > 0) | (steps < -30)).all()
        seen |= set(found)
    assert len(seen) == 36


def test_sources_whose_documents_have_unknown_sizes(tmp_path):
    array_record = pytest.importorskip("array_record.python.array_record_module")
    writer = array_record.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for i in range(30):
        writer.write(f"{i}. ".encode() + b"It was a fine day, and nobody said so. " * 30)
    writer.close()
    corpus = open_source(f"facts:{tmp_path}/a.array_record:size=2500:facts=2:gap=500", "train")
    for i in range(5):
        assert 1900 < len(corpus.read(i)) <= 2500


@pytest.mark.parametrize("tokens", ["bytes", "bpe:400"])
def test_weights_lie_on_answers(tokens):
    tokenizer = ByteTokenizer() if tokens == "bytes" else trained_tokenizer(tokens, ("austen",))
    cfg = DataConfig(sources=(SMALL,), seq_len=1300, batch_size=2, shuffle=False)
    data, corpus = make_iterator(cfg, tokenizer), open_source(SMALL, "train")
    for batch in (next(data), next(data)):
        assert batch["loss_weights"].dtype == np.float32 and batch["loss_mask"].dtype == bool
        assert set(np.unique(batch["loss_weights"])) == {0, 1, 5}
        for row in range(2):
            one = {k: v[row] for k, v in batch.items()}
            assert ((one["loss_weights"] > 0) == one["loss_mask"]).all()
            for segment in range(1, one["segments"].max() + 1):
                here = one["segments"] == segment
                text = tokenizer.decode_bytes(one["ids"][here & (one["positions"] > 0)][:-1])
                marked = next(m for m in map(corpus.marked, range(12)) if m["text"] == text)
                weighted = np.flatnonzero(here & (one["loss_weights"] == 5))
                runs = np.split(weighted, np.flatnonzero(np.diff(weighted) > 1) + 1)
                said = [tokenizer.decode_bytes(one["targets"][run]) for run in runs]
                answers = [text[a:b] for a, b in marked["answers"]]
                if tokens == "bytes":
                    assert said == answers
                else:
                    # A token may begin with the blank before, and end with what follows.
                    assert [x.strip(b" .\n\t") for x in said] == [x.strip(b" .") for x in answers]
    data.close()


def rows(cfg, tokenizer=None, n=6):
    data = make_iterator(cfg, tokenizer or ByteTokenizer())
    found = [next(data) for _ in range(n)]
    state = data.get_state()
    following = next(data)
    data.close()
    again = make_iterator(cfg, tokenizer or ByteTokenizer())
    again.set_state(state)
    for name, x in next(again).items():
        np.testing.assert_array_equal(x, following[name])
    again.close()
    return found


def test_documents_stay_whole_among_text_that_is_cut():
    cfg = DataConfig(sources=("austen", SMALL), weights=(1.0, 1.0), seq_len=1280, batch_size=2, piece_bytes=2000)
    whole = cut = asking = 0
    for batch in rows(cfg, n=12):
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            k: (v.shape, v.dtype) for k, v in described(cfg).items()
        }
        for row in range(2):
            one = {k: v[row] for k, v in batch.items()}
            for segment in range(1, one["segments"].max() + 1):
                here = one["segments"] == segment
                if (one["loss_weights"][here] == 5).any():
                    asking += here.sum()
                    ids = one["ids"][here]
                    assert ids[0] == 256 and ids[-1] == 257 and one["positions"][here][0] == 0
                    whole += 1
                else:
                    assert (one["loss_weights"][here] == one["loss_mask"][here]).all()
                    cut += here.sum()
    assert whole > 6 and 0.3 < asking / (asking + cut) < 0.7


def test_validation_reads_documents_that_ask_as_they_are():
    pieces = Pieces(open_source(SMALL, "validation"), 64)
    assert pieces[3]["first"] and pieces[3]["last"] and len(pieces[3]["answers"])


def test_rows_without_such_sources_have_no_weights():
    assert "loss_weights" not in rows(DataConfig(seq_len=64, batch_size=1), n=1)[0]
    assert "loss_weights" not in described(DataConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "expected a source of running text"), ("reason:subset", "expected a source of running text"),
     ("facts:austen", "expected a source of running text"), ("austen:pages=2", "no field 'pages'; valid names"),
     ("austen:size", "'size': expected NAME=VALUE"), ("austen:sizes:gap=9", "'sizes': expected NAME=VALUE"),
     ("austen:facts=0", "facts: expected a whole number from 1"), ("austen:gap=x", "gap=x: 'x' is not an integer"),
     ("austen:size=1000", "size is 1000: a gap of 1000 and facts=8 need 3816 bytes"),
     ("austen:weight=0", "weight: expected a number"), ("no/such/text", "There is no source no/such/text"),
     ("austen:size=9000000", "too few for documents of 9000000")],
)  # fmt: skip
def test_bad_sources(text, message):
    with pytest.raises(AtomError, match=message):
        open_source(f"facts:{text}", "train")


def test_what_does_not_go_with_questions():
    for more in ({"tokens": 64}, {"chat": True, "whole": True}, {"fim": 0.5}):
        with pytest.raises(AtomError, match=f"which data.{next(iter(more))} does not know"):
            DataConfig(sources=(SMALL,), **more)
    learned = make_iterator(DataConfig(sources=(SMALL,), seq_len=1280, batch_size=1, prompt_end="."), ByteTokenizer())
    batch = next(learned)
    learned.close()
    assert not batch["loss_mask"][0, :10].any() and (batch["loss_weights"][batch["loss_mask"]] == 5).any()


def test_rows_that_are_too_short_for_all_documents_are_refused(monkeypatch):
    monkeypatch.setattr(pipeline, "_EMPTY_LIMIT", 20)
    data = make_iterator(DataConfig(sources=(SMALL,), seq_len=64, batch_size=1), ByteTokenizer())
    with pytest.raises(AtomError, match="longer than 64 tokens"):
        next(data)
    data.close()
    cfg = DataConfig(sources=("austen", SMALL), seq_len=1150, batch_size=1)
    assert any("are longer than 1150 tokens" in note for note in pipeline.remarks(cfg, ByteTokenizer(), 10**6))
    short = DataConfig(sources=("austen", SMALL), seq_len=64, batch_size=1)
    with pytest.raises(AtomError, match=r"data\.seq_len is 64: documents of facts:.* are never cut"):
        pipeline.remarks(short, ByteTokenizer(), 10**6)


def test_the_parts_of_a_text():
    assert woven("abcd", [(0, "x"), (2, "y"), (2, "z")]) == ["", "x", "ab", "y", "", "z", "cd"]
    assert np.flatnonzero(sentence_ends(b'A b. "C?" d\n\ne.')).tolist() == [4, 9, 12]
