"""A session: in whatever order rows are read, tried, copied and left out, each stands where it would alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.inference.generate import generate
from atom_jax.kvcache.policies import parse
from atom_jax.kvcache.policy import PerLayer
from atom_jax.models import registry, transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.session import sampling
from atom_jax.session.decode import Choice
from atom_jax.session.session import Session
from atom_jax.session.slots import Slots
from atom_jax.typing import LM, AtomError
from tests.kvcache.test_protocol import BUDGETS, DMS_FORMS
from tests.models.tiny_units import MODELS, capacity, weights

CONFIG = TransformerConfig(
    vocab_size=50, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, max_length=400
)
SLIDING = dataclasses.replace(CONFIG, family="olmo3", layer_types=("sliding", "full"), sliding_window=6)
EXACT = ("dense", "sliding", *DMS_FORMS)  # memories with which several tokens may be read at once or one by one
UNITS = ("hnet-2", "words")
# Of the others every layer has one; that of some heads is for the first layer.
NAMES = sorted(BUDGETS, key=lambda name: name != "razor_attention")
PAIRS = [f"{a},{b}" for a, b in zip(NAMES[::2], [*NAMES[1::2], NAMES[0]])]
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 50, n).tolist() for n in (21, 4, 13)]
MORE = RNG.integers(0, 50, (3, 6))
LONGEST = 48


@functools.cache
def lm_of(name):
    if name in UNITS:
        return LM(capacity(MODELS[name], 1.0), weights(MODELS[name]), None)
    first, *second = [(DMS_FORMS | BUDGETS).get(part) for part in name.split(",")]
    memory = PerLayer(first, ((1, second[0]),)) if second else first
    cfg = SLIDING if name == "sliding" else dataclasses.replace(CONFIG, memory=memory)
    tree = params.init(jax.random.key(1), transformer.spec(cfg))
    tree["embed"] = tree["embed"] * 20
    return LM(cfg, tree, None)


def said(lm, rows):
    """What the whole forward pass says after every row, [b, v]."""
    ids = np.zeros((len(rows), LONGEST), np.int32)
    for row, out in zip(rows, ids):
        out[: len(row)] = row
    lengths = np.array([len(row) for row in rows])
    logits = np.asarray(atom_jax.apply(lm, ids, np.arange(ids.shape[1])[None] < lengths[:, None]).logits)
    return logits[np.arange(len(rows)), lengths - 1]


def stepped(session, tokens_bn, counts):
    """After the first `counts` of the rows' tokens, one by one."""
    for i in range(tokens_bn.shape[1]):
        if (live := i < np.asarray(counts)).any():
            session = session.step(tokens_bn[:, i], live)
    return session


@pytest.mark.parametrize("name", [*EXACT, *UNITS])
def test_a_prompt_and_steps_are_the_whole(name):
    lm, rows = lm_of(name), [list(row) for row in PROMPTS]
    session = Session.prefill(lm, rows)
    np.testing.assert_allclose(session.logits, said(lm, rows), atol=2e-4)
    for i in range(MORE.shape[1]):
        session = session.step(MORE[:, i])
        rows = [[*row, int(new)] for row, new in zip(rows, MORE[:, i])]
        np.testing.assert_allclose(session.logits, said(lm, rows), atol=2e-4)
    np.testing.assert_array_equal(session.length, [len(row) for row in rows])


@pytest.mark.parametrize("name", [*EXACT, *UNITS])
def test_pieces_of_any_length_are_the_whole(name):
    lm, rows = lm_of(name), [list(row) for row in PROMPTS]
    session = Session.prefill(lm, rows)
    for sizes in ((3, 20, 1), (1, 1, 1), (17, 2, 9)):
        piece = [RNG.integers(0, 50, n).tolist() for n in sizes]
        session, rows = session.extend(piece), [a + b for a, b in zip(rows, piece)]
        np.testing.assert_allclose(session.logits, said(lm, rows), atol=2e-4)


def test_rows_without_a_token_stay_where_they_are():
    lm, rows = lm_of("dense"), PROMPTS
    session = Session.prefill(lm, rows)
    session, _ = session.read(np.array([[5, 7], [0, 0], [9, 0]], np.int32), np.array([2, 0, 1]))
    np.testing.assert_allclose(session.logits, said(lm, [[*rows[0], 5, 7], rows[1], [*rows[2], 9]]), atol=2e-4)
    np.testing.assert_array_equal(session.token, [7, rows[1][-1], 9])


@pytest.mark.parametrize("name", [*EXACT, *PAIRS, *UNITS])
def test_what_is_tried_leaves_no_trace_and_what_is_accepted_is_read(name):
    lm, accepted = lm_of(name), np.array([2, 0, 6])
    session = Session.prefill(lm, PROMPTS)
    alone = [stepped(session.fork(), MORE, np.full(3, n)) for n in range(7)]
    tried = session.verify(MORE)
    assert tried.logits.shape == (3, 7, lm.config.vocab_size)
    for n, one in enumerate(alone):
        np.testing.assert_allclose(tried.logits[:, n], one.logits, atol=2e-4)
    # Nothing has changed in the session that tried.
    again, expected = session.verify(MORE[::-1]), stepped(session.fork(), MORE, accepted)
    del again
    now = tried.accept(accepted)
    np.testing.assert_array_equal(now.length, expected.length)
    np.testing.assert_array_equal(now.token, expected.token)
    np.testing.assert_array_equal(now.use()[0], expected.use()[0])
    for i in range(3):
        np.testing.assert_allclose(now.logits, expected.logits, atol=2e-4)
        now, expected = now.step(MORE[:, i]), expected.step(MORE[:, i])
    np.testing.assert_allclose(now.logits, expected.logits, atol=2e-4)


def test_rows_may_try_fewer_tokens_than_others():
    lm = lm_of("dense")
    session = Session.prefill(lm, PROMPTS)
    tried = session.verify(MORE, [1, 3, 0])
    np.testing.assert_allclose(tried.logits[1, 3], said(lm, [[*PROMPTS[1], *MORE[1, :3].tolist()]])[0], atol=2e-4)
    with pytest.raises(AtomError, match=r"accept: expected up to \[1, 3, 0\]"):
        tried.accept([2, 3, 0])
    np.testing.assert_array_equal(tried.accept([1, 2, 0]).length, [22, 6, 13])


@pytest.mark.parametrize("name", [*EXACT, *PAIRS, *UNITS])
def test_rows_are_those_of_a_session_with_these_prompts(name):
    lm, index = lm_of(name), [2, 0, 2]
    session = Session.prefill(lm, PROMPTS)
    chosen = session.rows(index)
    expected = Session.prefill(lm, [PROMPTS[i] for i in index], longest=21)
    for i in range(4):
        np.testing.assert_allclose(chosen.logits, expected.logits, atol=2e-4)
        np.testing.assert_array_equal(chosen.use()[0], expected.use()[0])
        chosen, expected = chosen.step(MORE[:, i]), expected.step(MORE[:, i])
    # Repeated rows have gone apart, and the session that they come from is as it was.
    assert np.abs(np.asarray(chosen.logits[0] - chosen.logits[2])).max() > 1e-3
    np.testing.assert_allclose(session.rows([1]).step([3]).logits, session.step([3, 3, 3]).logits[1:2], atol=2e-4)


@pytest.mark.parametrize("name", ["dense", "tova", "dms-adapter", "hnet-2"])
def test_slots_make_what_generation_makes_and_their_session_goes_on(name):
    lm = lm_of(name)
    made = generate(lm, PROMPTS, 9, stop_ids=())
    none = np.full(8, -1, np.int32)
    slots = Slots(Session.prefill(lm, PROMPTS), Choice(sampling.row_keys(None, 3), sampling.sampler(), none))
    assert slots.first.tolist() == [ids[0] for ids in made.ids]
    slots = slots.rows([0, 2])
    slots.prepare(9)
    tokens = slots.decode(9).tokens[:, :8]
    assert tokens.tolist() == [made.ids[0][1:], made.ids[2][1:]]
    session = slots.session
    with pytest.raises(AtomError, match=r"step\(\) reads them"):
        session.logits  # noqa: B018
    with pytest.raises(AtomError, match="is to be read first"):
        session.step([1, 2])
    tried = session.verify(MORE[:2, :2])
    now = tried.accept([0, 0])
    np.testing.assert_allclose(tried.logits[:, 0], now.logits, atol=2e-4)
    if name in EXACT:
        rows = [PROMPTS[i] + made.ids[i] for i in (0, 2)]
        np.testing.assert_allclose(now.logits, said(lm, rows), atol=2e-4)
        np.testing.assert_array_equal(now.length, [len(row) for row in rows])


@pytest.mark.parametrize("name", ["dense", "dms-adapter"])
def test_a_session_that_was_continued_is_refused(name):
    lm = lm_of(name)
    session = Session.prefill(lm, PROMPTS)
    copy, tried = session.fork(), session.verify(MORE)
    after = session.step(MORE[:, 0])
    for use in (
        lambda: session.step(MORE[:, 0]), lambda: session.extend([[1]] * 3), lambda: session.rows([0]),
        lambda: session.verify(MORE), session.fork,
    ):  # fmt: skip
        with pytest.raises(AtomError, match="continued already"):
            use()
    assert session.spent and not copy.spent
    np.testing.assert_array_equal(copy.step(MORE[:, 0]).logits, after.logits)
    del tried


@pytest.mark.parametrize("memory", ["none", "tova:budget=16"])
def test_turns_neither_grow_nor_compile_while_there_is_room(monkeypatch, memory):
    traced, family = [], registry.FAMILIES["llama"]
    counted = lambda f: lambda *a, **k: traced.append(1) or f(*a, **k)  # noqa: E731
    changed = dataclasses.replace(family, hidden=counted(family.hidden), step=counted(family.step))
    monkeypatch.setitem(registry.FAMILIES, "llama", changed)
    # A configuration that nothing has compiled for.
    lm = lm_of("dense")
    lm = dataclasses.replace(lm, config=dataclasses.replace(CONFIG, memory=parse(memory), max_length=399))
    turn, sizes, counts, text = None, [], [], [list(PROMPTS[0])]
    for i in range(20):
        said_now = [PROMPTS[0]] if turn is None else [MORE[0, : 1 + i % 4].tolist()]
        turn = generate(lm, said_now, 5, stop_ids=(), keep_memory=True, after=turn)
        text = [row + new for row, new in zip(text if i == 0 else [text[0] + said_now[0]], turn.ids)]
        sizes.append(turn.stats["kv_bytes"])
        counts.append(len(traced))
    # The first turns fill a budget, and find what the longest of them needs beside it.
    assert counts[5] == counts[-1] and sizes[5] == sizes[-1]
    if memory == "none":
        assert turn.ids[0] == generate(lm, [text[0][:-5]], 5, stop_ids=()).ids[0]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda s: s.extend([[1]]), "has 3 rows, but 1 are given"),
        (lambda s: s.extend([[1], [2], [50]]), "token id 50 is outside"),
        (lambda s: s.extend([[1] * 400, [2], [3]]), "421 tokens exceeds the 400 positions"),
        (lambda s: s.step(), "expected a token for every row"),
        (lambda s: s.step([1, 2]), "step: expected 3 tokens"),
        (lambda s: s.verify([1, 2, 3]), "verify: expected ids of shape"),
        (lambda s: s.verify(MORE, [7, 0, 0]), "verify: expected 3 counts between 0 and 6"),
        (lambda s: s.rows([3]), "rows: expected numbers from 0 to 2"),
        (lambda s: s.rows([]), "rows: expected numbers from 0 to 2"),
    ],
)
def test_bad_input_is_one_sentence(use, message):
    with pytest.raises(AtomError, match=message) as e:
        use(Session.prefill(lm_of("dense"), PROMPTS))
    assert "\n" not in str(e.value)
