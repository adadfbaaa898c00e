"""Drafts change nothing: whatever is guessed, ids and memory are those of one token at a time."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax import params
from atom_jax.checkpoint import heads
from atom_jax.inference.generate import generate
from atom_jax.kvcache.policy import PerLayer
from atom_jax.models import registry, transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.session import sampling
from atom_jax.session.decode import Choice
from atom_jax.session.drafts import loop
from atom_jax.session.drafts.drafter import Draft, Drafter, Read, Text
from atom_jax.session.drafts.drafters import DRAFTERS, parse
from atom_jax.session.drafts.local import Local
from atom_jax.session.drafts.mtp import MTP
from atom_jax.session.drafts.ngram import NGram
from atom_jax.session.drafts.pace import Pace
from atom_jax.session.drafts.recycle import Recycle
from atom_jax.session.drafts.slots import DraftSlots
from atom_jax.session.drafts.spine import Spine
from atom_jax.session.session import Session
from atom_jax.typing import LM, AtomError
from tests.kvcache.test_protocol import BUDGETS, DMC_FORMS, DMS_FORMS
from tests.models.tiny_units import MODELS, capacity, stream, weights
from tests.session.taught import taught

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 50, n).tolist() for n in (21, 4, 13)]
NEW, N, VOCAB = 18, 3, 50
LAYERS = 4
HOWS = {"greedy": {}, "drawn": {"temperature": 1.0}, "top_p": {"temperature": 1.2, "top_p": 0.8}}
QUALITIES = ("right", "wrong", "random")


def groups():
    """All policies and the dense cache, as many at a time as a model has layers; two that learn different things
    don't go together."""
    observed, *dms = sorted(DMS_FORMS.values(), key=lambda policy: policy.form != "observed")
    others = [None, *(policy for policy in BUDGETS.values() if not policy.agrees)]
    cut = [others[i : i + LAYERS] for i in range(0, len(others), LAYERS)]
    return [*cut, [None, *dms], [None, observed, *DMC_FORMS.values()]]


@functools.cache
def model(number):
    at = tuple((i, policy) for i, policy in enumerate(groups()[number]) if policy is not None)
    cfg = TransformerConfig(
        vocab_size=VOCAB, d_model=16, n_layers=LAYERS, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=32, max_length=400,
        memory=PerLayer(None, at),
    )  # fmt: skip
    tree = params.init(jax.random.key(1), transformer.spec(cfg))
    return LM(cfg, {**tree, "embed": tree["embed"] * 20}, None)


def with_memory(memory):
    """The first model with this memory."""
    return registry.with_memory(
        dataclasses.replace(model(0), config=dataclasses.replace(model(0).config, memory=None)), memory
    )


@dataclasses.dataclass(frozen=True)
class Given(Drafter):
    """Drafts are what `ids` [b, t] have at the places to come, as many of them as `count` [b, t] says there."""

    name: ClassVar[str] = "given"
    ids: ClassVar[np.ndarray]
    count: ClassVar[np.ndarray]

    def init(self, text, vocab, learned=None):
        return jnp.asarray(self.ids, jnp.int32), jnp.asarray(self.count, jnp.int32)

    def propose(self, state, text, n, model=None):
        ids, count = state
        at = jnp.minimum(text.length[:, None] + jnp.arange(n)[None], ids.shape[1] - 1)
        return Draft(jnp.take_along_axis(ids, at, axis=1), jnp.take_along_axis(count, at[:, :1], axis=1)[:, 0])


def give(monkeypatch, rows, quality):
    """Makes `Given` guess at these rows."""
    ids = np.zeros((len(rows), 128), np.int32)
    for row, out in zip(rows, ids):
        out[: len(row)] = row
    rng = np.random.default_rng(3)
    count = np.full(ids.shape, N)
    if quality == "wrong":
        ids = (ids + 1) % VOCAB
    if quality == "random":
        ids = np.where(rng.random(ids.shape) < 0.7, ids, (ids + 7) % VOCAB)
        count = rng.integers(0, N + 1, ids.shape)
    monkeypatch.setattr(Given, "ids", ids, raising=False)
    monkeypatch.setattr(Given, "count", count, raising=False)


def costs(monkeypatch, price):
    """Makes drafts cost so much; nothing is measured."""
    monkeypatch.setattr(Pace, "measures", False)
    monkeypatch.setattr(Pace, "price", lambda self, n: price)
    monkeypatch.setattr(Pace, "take", lambda *_: None)


@pytest.fixture
def free(monkeypatch):
    """Drafts cost nothing, and so are tried wherever there are any."""
    costs(monkeypatch, 0.0)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    """(name, number) -> a drafter of this name for model(number)."""

    @functools.cache
    def build(name, number):
        if name == "mtp":
            path, lm = tmp_path_factory.mktemp("heads") / "heads", model(number)
            heads.save(path, lm.config, taught(lm, 100))
            return MTP(str(path))
        return DRAFTERS[name]()

    return build


def make(lm, how, **options):
    return generate(lm, PROMPTS, NEW, key=jax.random.key(2), stop_ids=(), keep_memory=True, **HOWS[how], **options)


def texts(made):
    return [a + b for a, b in zip(PROMPTS, made.ids)]


def test_layers_that_decide_together_have_no_drafts_read_at_once():
    (policy,) = (policy for policy in BUDGETS.values() if policy.agrees)
    lm = with_memory(dataclasses.replace(policy, budget=9, window=2))
    plain, made = make(lm, "drawn"), make(lm, "drawn", draft="ngram")
    assert made.ids == plain.ids and made.acceptance is None
    session = Session.prefill(lm, PROMPTS)
    draft = np.array([ids[:3] for ids in plain.ids])
    kept = session.fork().verify(draft).accept([3, 2, 3])
    for i in range(3):
        session = session.step(draft[:, i], np.array([True, i < 2, True]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept.memory, session.memory)


@pytest.mark.parametrize("number", range(len(groups())))
def test_ids_and_memory_are_those_without_drafts(number, monkeypatch, free):
    lm, before, sizes, call = model(number), loop.compiled()._cache_size(), set(), DraftSlots._call

    def counted(self, until):
        sizes.add(str(jax.tree.map(jnp.shape, self._state)))
        return call(self, until)

    monkeypatch.setattr(DraftSlots, "_call", counted)
    for how in HOWS:
        plain = make(lm, how)
        for quality in QUALITIES:
            give(monkeypatch, texts(plain), quality)
            made = make(lm, how, draft=Given(), draft_tokens=N)
            assert made.ids == plain.ids, (how, quality)
            assert made.stats["kv_entries_peak"] <= plain.stats["kv_entries_peak"] + 1e-3
            if quality == "right":
                assert made.acceptance == [1.0] * 3 and made.stats["tokens_per_call"] > 3
                assert made.stats["kv_reads"] < plain.stats["kv_reads"]
            elif quality == "wrong":
                assert made.acceptance == [0.0] * 3 and made.stats["tokens_per_call"] == 1
                np.testing.assert_allclose(made.stats["kv_reads"], plain.stats["kv_reads"], rtol=1e-5)
                assert made.stats["kv_reads_per_query"] > 2 * plain.stats["kv_reads"]
            else:
                assert all(0.2 < share < 0.9 for share in made.acceptance) and len(set(made.acceptance)) == 3
        # The last ones, after random drafts.
        np.testing.assert_array_equal(made.memory.use()[0], plain.memory.use()[0])
        one, other = made.memory.step(), plain.memory.step()
        for i in range(3):
            np.testing.assert_allclose(one.logits, other.logits, atol=2e-4)
            one, other = one.step([i, 4, 9]), other.step([i, 4, 9])
    # Nothing is compiled for but the model, the length of drafts, and the size of the memory, of which few change it.
    assert loop.compiled()._cache_size() == before + len(sizes) and len(sizes) <= (
        1 if number < len(groups()) - 2 else 4
    )


def slots(lm, drafter, most=N, until=NEW, stop=()):
    ends = np.pad(np.array(stop, np.int32), (0, 8 - len(stop)), constant_values=-1)
    codec = registry.of(lm.config).codec(lm.config)
    choice = Choice(sampling.row_keys(jax.random.key(2), len(PROMPTS)), sampling.sampler(), ends, codec)
    rows = [np.array(row, np.int32) for row in PROMPTS]
    return DraftSlots(Session.prefill(lm, PROMPTS), choice, False, rows, drafter, most, until)


def test_a_row_ends_inside_a_draft_and_a_call_anywhere(monkeypatch, free):
    lm = model(0)
    plain = make(lm, "greedy")
    give(monkeypatch, texts(plain), "right")
    stop = plain.ids[1][6]
    expected = generate(lm, PROMPTS, NEW, stop_ids=[stop]).ids
    assert generate(lm, PROMPTS, NEW, stop_ids=[stop], draft=Given(), draft_tokens=N).ids == expected
    # Some tokens at a time, to one number for all rows or to different ones.
    rows = slots(lm, Given())
    found = [[token] for token in rows.first]
    for until in (2, 3, 7, 12, 13, NEW):
        rows.prepare(until)
        for row, new in zip(found, rows.decode(until).tokens):
            row += new[new >= 0].tolist()
        assert [len(row) for row in found] == [until] * 3
    assert found == plain.ids
    few = slots(lm, Given()).rows([2, 0])
    few.prepare(np.array([5, 9]))
    made = few.decode(np.array([5, 9])).tokens
    assert [new[new >= 0].tolist() for new in made] == [plain.ids[2][1:5], plain.ids[0][1:9]]


def units(name, **fields):
    return LM(dataclasses.replace(capacity(MODELS[name], 1.0), **fields), weights(MODELS[name]), None)


# Marks that come first (in two stages) and last: of a router, white space, places, a predictor, a model of bytes.
@pytest.mark.parametrize("name", ["hnet-2", "words", "megabyte", "gumbel", "blt"])
def test_models_with_units_read_drafts_together(name, monkeypatch, free, scanned):
    lm, prompts = units(name), [stream(n, start).tolist() for n, start in ((9, 0), (1, 30), (14, 11))]
    for how in ("greedy", "drawn"):
        options = {"key": jax.random.key(2), "stop_ids": (), "keep_memory": True, **HOWS[how]}
        for rows, draft in ((prompts[:1], "local"), (prompts, Given())):
            plain = generate(lm, rows, NEW, **options)
            give(monkeypatch, [a + b for a, b in zip(rows, plain.ids)], "random")
            made = generate(lm, rows, NEW, draft=draft, draft_tokens=N, **options)
            assert made.ids == plain.ids, (how, draft)
            # Rows that wait for others have none.
            assert max(made.acceptance) > 0.2
            np.testing.assert_array_equal(made.memory.use()[0], plain.memory.use()[0])
            np.testing.assert_allclose(made.memory.step().logits, plain.memory.step().logits, atol=5e-4)


def test_drafts_of_the_byte_level_are_right_up_to_the_end_of_a_unit(monkeypatch, free, scanned):
    """And the networks inside run less often than once per unit where they are right beyond."""
    lm, prompt = units("megabyte"), [stream(9, 0).tolist()]
    text, drafted = generate(lm, prompt, 31, stop_ids=()).ids[0], []
    propose = Local.propose

    def kept(self, state, text, n, model=None):
        draft = propose(self, state, text, n, model)
        jax.debug.callback(lambda at, ids: drafted.append((int(at), ids.tolist())), text.length[0], draft.tokens[0])
        return draft

    monkeypatch.setattr(Local, "propose", kept)
    made = generate(lm, prompt, 31, stop_ids=(), draft=Local(), draft_tokens=5)
    jax.effects_barrier()
    assert made.ids[0] == text and len(drafted) < 25 and made.stats["tokens_per_call"] > 1.2
    for at, ids in drafted:
        # The unread byte is number `at - 1`; units end at every third.
        sure = 2 - (at - 1) % 3
        right = (prompt[0] + text)[at : at + sure]
        assert ids[: len(right)] == right


def test_models_that_cannot_read_together_read_drafts_in_turn(monkeypatch, free, scanned):
    lm = units("words", memory=BUDGETS["tova"])
    plain = generate(lm, PROMPTS, 9, stop_ids=())
    give(monkeypatch, texts(plain), "random")
    rows = slots(lm, Given())
    found = [[token] for token in rows.first]
    while min(map(len, found)) < 9:
        rows.prepare(9)
        for row, new in zip(found, rows.decode(9).tokens):
            row += new[new >= 0].tolist()
    assert found == plain.ids and rows.accepted.sum() > 3
    # Asked for drafts, they make none, as these gain nothing.
    made = generate(lm, PROMPTS, 9, stop_ids=(), draft="ngram")
    assert made.ids == plain.ids and made.acceptance is None


# Heads see what every kind of memory gives, others the text alone.
@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name in DRAFTERS for i in ((0, -2, -1) if name == "mtp" else (0,))]
)
def test_every_drafter_leaves_ids_and_memory_as_they_are(name, number, drafter, free):
    number %= len(groups())
    lm, draft = model(number), drafter(name, number)
    for how in HOWS:
        plain, made = make(lm, how), make(lm, how, draft=draft, draft_tokens=N)
        assert made.ids == plain.ids, how
        np.testing.assert_array_equal(made.memory.use()[0], plain.memory.use()[0])
        np.testing.assert_allclose(made.memory.step().logits, plain.memory.step().logits, atol=2e-4)


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters_guess_at_text_that_repeats_itself(name, drafter, free):
    lm = units("gumbel") if name == "local" else model(0)
    prompts = PROMPTS[: 1 if name == "local" else None]
    plain = generate(lm, prompts, 60, stop_ids=())
    made = generate(lm, prompts, 60, stop_ids=(), draft=drafter(name, 0), draft_tokens=N)
    assert made.ids == plain.ids
    assert max(made.acceptance) > 0.3 and made.stats["tokens_per_call"] > 1.3


def test_drafts_that_fail_are_given_up(monkeypatch):
    lm = model(0)
    give(monkeypatch, texts(make(lm, "greedy")), "wrong")
    costs(monkeypatch, 0.8)
    rows = slots(lm, Given(), until=100)
    rows.prepare(100)
    rows.decode(100)
    # The credit lasts for two; with what comes in there is at most one in 80 steps more.
    assert rows.tried.tolist() == [3 * N] * 3 and rows.steps.tolist() == [99] * 3


def text(*rows):
    ids = np.zeros((len(rows), 24), np.int32)
    for row, out in zip(rows, ids):
        out[: len(row)] = row
    return Text(jnp.asarray(ids), jnp.asarray([len(row) for row in rows], jnp.int32))


def drafts(found):
    return [row[:n].tolist() for row, n in zip(np.asarray(found.tokens), np.asarray(found.count))]


def test_ngram_copies_what_followed_the_longest_end_the_newest_time():
    rows = text([1, 2, 3, 9, 8, 2, 3, 4, 7, 2, 3], [5, 1, 2, 3, 6, 2, 3, 7, 1, 2, 3], [1, 2, 3, 4, 5], [3, 6, 3, 6])
    assert drafts(NGram().propose((), rows, 3)) == [[4, 7, 2], [6, 2, 3], [], [3, 6, 3]]
    assert drafts(NGram(least=3).propose((), rows, 3)) == [[], [6, 2, 3], [], []]
    assert drafts(NGram(least=1).propose((), text([7, 4, 7], [7, 7]), 3)) == [[4, 7, 4], [7, 7, 7]]


def test_recycle_follows_what_the_model_said():
    rows = text([4, 5, 6, 4], [9])
    table = Recycle().init(rows, 10)
    assert drafts(Recycle().propose(table, rows, 4)) == [[5, 6, 4, 5], []]
    says, none = jax.nn.one_hot(jnp.array([[2, 0], [1, 9]]), 10), jnp.zeros((2, 2, 4))
    read = Read(jnp.array([[6, 4], [9, 1]]), jnp.array([1, 2]), says, none, jnp.array([1, 1]))
    table = Recycle().observe(table, read)
    assert drafts(Recycle().propose(table, rows, 4)) == [[5, 6, 2], [1, 9, 1, 9]]
    more = text([4, 5, 6, 4, 5], [7, 9, 3, 7, 9])
    assert drafts(Spine().propose(table, more, 4)) == [[6, 4, 5, 6], [3, 7, 9, 3]]
    assert drafts(Spine(least=3).propose(table, more, 4)) == [[6, 2], [1, 9, 1, 9]]


def test_the_length_of_drafts_follows_their_gain():
    pace = Pace(7)
    assert pace.lengths == [1, 3, 7] and pace.price(7) < 0
    pace.take(10, 0, np.zeros(8), 1.0)
    assert pace.price(7) > 0 and pace.seconds[0] == pytest.approx(0.1)
    # Ten calls at 0.24 s, five single ones between; of every draft one token is right.
    pace.take(15, 10, np.array([0, 10, 0, 0, 0, 0, 0, 0]), 2.9)
    assert pace.price(7) == pytest.approx(1.4) and pace.price(3) == pytest.approx(0.6)
    assert pace.expected(7) == pace.expected(1) == 1
    pace.choose(100, {7}, compiling=1e6)
    assert pace.n == 7
    pace.choose(100, {7}, compiling=1.0)
    assert pace.n == 1
    # They turn out to be as good as they can be.
    pace.take(10, 10, np.array([0, 10]), 1.2)
    for _ in range(20):
        pace.take(10, 10, np.array([0, 0, 0, 0, 0, 0, 0, 10]), 2.4)
    pace.choose(100, {1, 7}, compiling=0)
    assert pace.n == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "n-gram"}, "draft 'n-gram': expected none, ngram, recycle, spine, mtp, local"),
        ({"draft": "ngram:size=4"}, "draft ngram: no field 'size'"),
        ({"draft": "spine:least=9"}, "least"),
        ({"draft": "mtp"}, "draft mtp: which heads"),
        ({"draft": "mtp:heads=nowhere"}, "nowhere: no heads are there"),
        ({"draft": "ngram", "draft_tokens": 0}, "draft_tokens is 0"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(AtomError, match=message) as e:
        generate(model(0), PROMPTS, 4, **options)
    assert "\n" not in str(e.value)


def test_drafters_are_named():
    assert parse("ngram:longest=3,least=1") == NGram(3, 1) and parse("none") is None and parse(Spine()) == Spine()
    assert parse("mtp:heads=some/where") == MTP("some/where")
