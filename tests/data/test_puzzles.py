"""Problems that a program makes up: its chains obey the rules, splits are disjoint, rows hold whole documents."""

import dataclasses

import numpy as np
import pytest

from atom_jax.data import pipeline
from atom_jax.data.config import DataConfig
from atom_jax.data.pipeline import make_iterator
from atom_jax.data.puzzles import PUZZLES, Generated, Subset, parse
from atom_jax.data.puzzles.subset import LETTERS, Problem
from atom_jax.data.sources import open_source
from atom_jax.data.vocabulary import trained_tokenizer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import AtomError

EASY = "reason:subset:letters=5:high=20:goal=40"


def replay(problem: Problem, words: list[str]) -> tuple[list[str], int]:
    """Checks every word of a chain by the rules alone: the bits of its answer, and the coins tossed."""
    state = {}  # letter -> (mark, remainder before)
    at, rest, i, coins = 0, problem.goal, 0, 0
    n = len(problem.numbers)
    while rest:
        if at < n:
            letter, mark = words[i][0], words[i][1]
            assert letter == LETTERS[at] and mark in "+-."
            assert (mark == ".") == (problem.numbers[at] > rest)
            coins += mark != "."
            state[at] = (mark, rest)
            rest -= problem.numbers[at] * (mark == "+")
            assert words[i + 1] == str(rest)
            at, i = at + 1, i + 2
            continue
        assert words[i] == "!"
        i += 1
        while state[at - 1][0] in ".mp":
            at -= 1
            assert words[i] == LETTERS[at].upper()
            i += 1
        at -= 1
        mark, rest = state[at]
        turned = {"+": "m", "-": "p"}[mark]
        assert words[i] == LETTERS[at] + turned
        state[at] = (turned, rest)
        rest -= problem.numbers[at] * (turned == "p")
        assert words[i + 1] == str(rest)
        at, i = at + 1, i + 2
    assert words[i] == "="
    bits = ["1" if k < at and state[k][0] in "+p" else "0" for k in range(n)]
    assert words[i + 1 :] == [w for k in range(n) for w in (f"{LETTERS[k]}:", bits[k])]
    return bits, coins


def test_chains_obey_the_rules_and_answers_are_unique():
    corpus = Generated(Subset(), "all")
    for number in range(1000):
        problem, rng = corpus.pose(number)
        puzzle, chain = corpus.puzzle, corpus.puzzle.chain(problem, rng)
        bits, coins = replay(problem, chain.split())
        sums = [sum(x for k, x in enumerate(problem.numbers) if m >> k & 1) for m in range(2 ** len(problem.numbers))]
        assert sums.count(problem.goal) == 1 and len(set(problem.numbers)) == len(problem.numbers)
        assert puzzle.solves(problem, puzzle.answer(chain))
        wrong = " ".join(f"{x}: {b}" for x, b in zip(LETTERS, ["1" if b == "0" else "0" for b in bits]))
        assert not puzzle.solves(problem, wrong) and puzzle.read(puzzle.prompt(problem)) == problem
        assert sum(step.free for step in puzzle.steps(chain)) == coins


@pytest.mark.parametrize("kind", PUZZLES)
def test_every_puzzle_can_be_read_answered_and_checked(kind):
    corpus = open_source(f"reason:{kind}", "test")
    for number in range(20):
        problem, rng = corpus.pose(number)
        puzzle = corpus.puzzle
        prompt, chain = puzzle.prompt(problem), puzzle.chain(problem, rng)
        assert prompt.split()[-1] == puzzle.END and prompt.split().count(puzzle.END) == 1
        assert puzzle.read(prompt) == problem and puzzle.solves(problem, puzzle.answer(chain))
        assert puzzle.answer("") is None and puzzle.answer(chain.split()[0]) is None
        assert len(puzzle.steps(chain)) == len(chain.split())
        words = [*prompt.split(), *chain.split()]
        assert len(puzzle.dead(words)) == len(words) and not any(puzzle.dead(prompt.split()))
        assert corpus.read(number).decode() == f"{prompt} {chain}"


def test_documents_are_the_same_everywhere():
    texts = [open_source("reason:subset", "train").read(i).decode() for i in (0, 7)]
    assert texts[0].startswith("a ") and texts[0] != texts[1]
    assert [open_source("reason:subset", "train").read(i).decode() for i in (0, 7)] == texts
    assert texts == GOLDEN


GOLDEN = [
    "a 40 b 13 c 18 d 23 e 11 goal 40 ; a- 40 b- 40 c- 40 d+ 17 e+ 6 ! em 17 ! E dm 40 e+ 29 ! em 40 ! E D cp 22 "
    "d. 22 e+ 11 ! em 22 ! E D C bp 27 c+ 9 d. 9 e. 9 ! E D cm 27 d- 27 e+ 16 ! em 27 ! E dp 4 e. 4 ! E D C B ap "
    "0 = a: 1 b: 0 c: 0 d: 0 e: 0",
    "a 54 b 31 c 47 d 10 goal 111 ; a- 111 b+ 80 c+ 33 d- 33 ! dp 23 ! D cm 80 d- 80 ! dp 70 ! D C bm 111 c+ 64 "
    "d- 64 ! dp 54 ! D cm 111 d- 111 ! dp 101 ! D C B ap 57 b+ 26 c. 26 d- 26 ! dp 16 ! D C bm 57 c+ 10 d- 10 ! "
    "dp 0 = a: 1 b: 0 c: 1 d: 1",
]


def test_splits_share_no_problem():
    seen = {}
    for split in ("train", "validation", "test"):
        corpus = open_source("reason:subset:letters=3:high=12:goal=30", split)
        seen[split] = {(tuple(sorted(p.numbers)), p.goal) for p, _ in map(corpus.pose, range(150))}
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"] and min(map(len, seen.values())) > 1


def test_what_is_dead_is_what_comes_again():
    chain = "a- 4 b. 4 ! B ap 0 = a: 1 b: 0"
    words = f"a 4 b 9 goal 4 ; {chain}".split()
    dead = [w for w, d in zip(words, Subset().dead(words)) if d]
    assert dead == ["a-", "4", "b.", "4", "!", "B"]
    kinds = [s.kind for s in Subset().steps(chain)]
    assert kinds == [
        "mark", "skip", "mark", "skip", "dead end", "capital", "mark", "turn to take", "answer", "answer", "answer",
        "answer", "answer",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [("sudoku", "expected one of subset"), ("subset:letters=9", "letters"), ("subset:letters=2", "least is 3"),
     ("subset:size=2", "no field 'size'"), ("subset:low=55", "as many numbers"), ("subset:goal=100", "2 high <=")],
)  # fmt: skip
def test_bad_puzzles(text, message):
    with pytest.raises(AtomError, match=message):
        parse(text)


@pytest.mark.parametrize("prompt", ["", "a b goal 3", "a 1 c 2 goal 3", "a 1 b 2 goal x", "a 1 b 2 goal 3 ; more"])
def test_bad_problems(prompt):
    with pytest.raises(AtomError, match="expected a problem such as"):
        Subset().read(prompt)


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer("words:256", (EASY,))


def rows(cfg, tokenizer, batches=3):
    data = make_iterator(cfg, tokenizer)
    found = [next(data) for _ in range(batches)]
    state = data.get_state()
    data.close()
    return found, state


def test_rows_hold_whole_documents_whose_chains_alone_are_learned(tokenizer):
    cfg = DataConfig(sources=(EASY,), seq_len=150, batch_size=2, whole=True, prompt_end=";")
    batches, state = rows(cfg, tokenizer)
    full = 0
    for batch in batches:
        for row in range(2):
            one = {k: v[row] for k, v in batch.items()}
            for segment in range(1, one["segments"].max() + 1):
                here = one["segments"] == segment
                text = tokenizer.decode(one["ids"][here][1:-1])
                problem, chain = text.split(" ; ")
                assert Subset().solves(Subset().read(problem), Subset().answer(chain))
                assert one["positions"][here].tolist() == list(range(here.sum()))
                learned = tokenizer.decode(one["targets"][one["loss_mask"] & here][:-1])
                assert learned.split() == chain.split()
                full += 1
            assert not one["loss_mask"][one["segments"] == 0].any()
    assert full > 6
    again = make_iterator(cfg, tokenizer)
    again.set_state(state)
    following, _ = rows(cfg, tokenizer, 4)
    np.testing.assert_array_equal(next(again)["ids"], following[3]["ids"])
    again.close()


def test_prompts_of_documents_that_are_cut_are_left_out_too():
    cfg = DataConfig(sources=(EASY,), seq_len=24, batch_size=2, prompt_end=";", shuffle=False)
    batches, _ = rows(cfg, ByteTokenizer(), 40)
    for row in range(2):
        ids, mask = (np.concatenate([b[name][row] for b in batches]) for name in ("targets", "loss_mask"))
        text = bytes(np.where(mask & (ids < 256), ids, 10).astype(np.uint8)).decode()
        said = [part for part in text.split("\n") if part]
        assert len(said) > 2 and all("goal" not in part and ";" not in part for part in said)
        assert said[0].startswith(" a")


def test_rows_that_are_too_short_for_all_documents_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(pipeline, "_EMPTY_LIMIT", 20)
    cfg = DataConfig(sources=(EASY,), seq_len=8, batch_size=1, whole=True)
    data = make_iterator(cfg, tokenizer)
    with pytest.raises(AtomError, match="longer than 8 tokens"):
        next(data)
    data.close()
    with pytest.raises(AtomError, match=r"data\.tokens"):
        dataclasses.replace(cfg, tokens=64)
    with pytest.raises(AtomError, match=r"data\.piece_bytes"):
        dataclasses.replace(cfg, piece_bytes=640)


def test_words_are_what_lies_between_blanks(tokenizer, tmp_path):
    text = open_source(EASY, "test").read(0)
    ids, spans = tokenizer.spans(text)
    assert len(ids) == len(text.split()) and tokenizer.decode_bytes(ids) == text
    assert tokenizer.encode("a 10 nonsense").tolist()[-1] == 3
    assert [text[a:b].strip() for a, b in spans] == text.split()
