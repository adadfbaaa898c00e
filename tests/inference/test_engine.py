"""An engine: whoever joins and leaves, each text is what `generate` gives for it alone, and nothing stays behind."""

import dataclasses
import functools
import gc
import threading

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.inference import engine as module
from atom_jax.inference.engine import Busy, Closed, Engine
from atom_jax.kvcache import memory as memory_lib
from atom_jax.kvcache import paged
from atom_jax.session import cost as cost_module
from atom_jax.session import parts as parts_module
from atom_jax.session.cost import Cost
from atom_jax.session.lane import Lane
from atom_jax.session.session import Session
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError
from tests.reliability import rows as examples

# Ways to keep rows: slots for all, in parts; a budget, prompts whole; pages, in parts, with an adapter's decisions.
MODELS = {"dense": ("llama", None), "budget": ("llama", "tova"), "dms": ("qwen3", "dms")}
pytestmark = pytest.mark.usefixtures("scanned_policies")
COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: COMPILED.append(name) if name.endswith("backend_compile_duration") else None
)


@functools.cache
def model(name):
    family, policy = MODELS[name]
    lm = examples.plain(family, "plain") if policy is None else examples.model(family, "plain", policy, 8)
    return LM(dataclasses.replace(lm.config, max_length=200), lm.params, ByteTokenizer())


WAYS = ({}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 1.3, "top_k": 9, "min_p": 0.05})


def orders(n):
    """Prompts and options of so many requests, of different lengths and ways."""
    rng = np.random.default_rng(4)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(3), n)))
    for i in range(n):
        prompt = rng.integers(32, 126, (3, 16, 41)[i // 3 % 3]).tolist()
        yield prompt, dict(max_new_tokens=1 + 5 * i % 23, key=keys[i : i + 1], **WAYS[i % 3])


def expected(lm, wanted):
    """What `generate` makes of them: those of one way together, as if each were alone."""
    found = [None] * len(wanted)
    for way in range(3):
        mine = list(range(way, len(wanted), 3))
        keys = np.concatenate([wanted[i][1]["key"] for i in mine])
        prompts, most = [wanted[i][0] for i in mine], max(wanted[i][1]["max_new_tokens"] for i in mine)
        made = atom_jax.generate(lm, prompts, most, key=keys, **WAYS[way])
        for i, ids in zip(mine, made.ids):
            found[i] = ids[: wanted[i][1]["max_new_tokens"]]
    return found


def together(engine, wanted):
    """The requests, ended, all of which waited before the first was begun."""
    with engine.together:
        requests = [engine.submit(prompt, **options) for prompt, options in wanted]
    return [request.result() for request in requests]


def live():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_generate_and_nothing_is_compiled_again_or_left(name):
    lm, wanted = model(name), list(orders(9))
    alone = expected(lm, wanted)
    with Engine(lm, rows=2 if name == "dms" else 4, part=16, beginnings=0) as engine:
        first = together(engine, wanted)
        compiled = len(COMPILED)
        again = together(engine, wanted)
        assert len(COMPILED) == compiled
        for requests in (first, again):
            assert [request.ids for request in requests] == alone
            assert all(request.text == lm.tokenizer.decode(request.ids) for request in requests)
            assert all(request.entries > 0 and request.end == "length" for request in requests)
        tally = engine.tally
        assert tally.nbytes == tally.running == tally.waiting == 0 and tally.ended == {"length": 18}
        assert tally.new_tokens == 2 * sum(map(len, alone))
    del first, again, requests
    held = live()
    with Engine(lm, rows=2 if name == "dms" else 4, part=16, beginnings=0) as engine:
        together(engine, wanted)
    assert live() == held


def test_ends_are_those_of_generate():
    lm, prompt = model("dense"), list(range(40, 56))
    free = atom_jax.generate(lm, [prompt], 40, 1.1)
    letter = next(c for c in free.text[0][4:] if c < "\x80")
    ends = [{"stop_ids": free.ids[0][9:12]}, {"stop": ["never", letter]}, {"stop_ids": ()}]
    with Engine(lm, rows=2) as engine:
        requests = [engine.submit(prompt, 40, 1.1, **end).result() for end in ends]
    assert [request.end for request in requests] == ["stop", "stop", "length"]
    for request, end in zip(requests, ends):
        one = atom_jax.generate(lm, [prompt], 40, 1.1, **end)
        assert (request.ids, request.text) == (one.ids[0], one.text[0])


def test_who_leaves_disturbs_nobody_and_beginnings_are_read_once():
    lm = model("dense")
    start = list(range(33, 66))
    prompts = [[*start, 70 + i] for i in range(4)]
    with Engine(lm, rows=4, part=16) as engine:
        gone, started = [], threading.Event()
        long = engine.submit(prompts[0], 150, listen=lambda piece: (gone.append(piece), started.set()))
        others = [engine.submit(prompt, 20) for prompt in prompts[1:3]]
        started.wait(60)
        long.cancel()
        others = [request.result() for request in others]
        third = engine.submit(prompts[3], 20).result()
        never = engine.submit(prompts[0], 9)
        never.cancel()
        assert never.result().end in ("cancelled", "length")
    assert long.end == "cancelled" == gone[-1].end and 0 < len(long.ids) < 150
    assert third.known == 32 and engine.tally.known >= 32
    for prompt, request in zip(prompts[1:], [*others, third]):
        assert request.ids == atom_jax.generate(lm, [prompt], 20).ids[0]
    assert long.ids == atom_jax.generate(lm, [prompts[0]], len(long.ids)).ids[0]


def test_what_the_model_says_of_its_tokens():
    lm, prompt = model("dense"), list(range(40, 56))
    with Engine(lm, rows=2, part=16) as engine:
        plain = engine.submit(prompt, 6, 0.9)
        told = engine.submit(prompt, 6, 0.9, logprobs=3).result()
        assert plain.result().ids == told.ids and plain.marks == []
    ids = [*prompt, *told.ids]
    says = np.asarray(jax.nn.log_softmax(atom_jax.apply(lm, np.array([ids], np.int32)).logits[0]))
    for k, mark in enumerate(told.marks):
        row = says[len(prompt) + k - 1]
        assert mark.id == told.ids[k] and mark.logprob == pytest.approx(row[mark.id], abs=1e-4)
        assert [i for i, _ in mark.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([p for _, p in mark.top], np.sort(row)[::-1][:3], atol=1e-4)


@pytest.mark.parametrize("name", ["dense", "dms"])
def test_a_request_is_begun_when_its_memory_fits(name):
    lm, wanted = model(name), list(orders(6))
    cost = Cost(lm.config)
    longest = max(len(prompt) + options["max_new_tokens"] for prompt, options in wanted)
    room = cost.nbytes(2, longest, [cost.expected(longest)] * 2)
    with Engine(lm, rows=4, part=16, cache_memory=room) as engine:
        assert all(request.end for request in together(engine, wanted))
        tally = engine.tally
    assert tally.peak_running >= 2
    if name == "dense":
        assert (tally.peak_running, tally.peak_nbytes) == (2, room)
    with Engine(lm, cache_memory=room // 4) as engine, pytest.raises(AtomError, match="may need"):
        engine.submit([1] * 50, 140)


@pytest.mark.parametrize("apart", [False, True])
def test_layers_that_keep_more_than_others_are_reckoned_with(apart, monkeypatch):
    monkeypatch.setattr(paged, "AHEAD", 8)
    monkeypatch.setattr(paged, "UNEVEN", 1.01)
    lm, prompts = model("dms"), [list(range(40, 99)), list(range(40, 140, 2))]
    session, level = Session.prefill(lm, prompts, room=8), paged.Level()
    memory = memory_lib.unstack(session.memory) if apart else session.memory
    held = np.concatenate([np.asarray(x.pool.n).sum((-2, -1)).reshape(-1) for x in memory_lib.layers(memory)])
    fitted = level(memory)
    assert level.fullest == held.max() / held.mean() > 1.01
    pages = [x.k.shape[-3] for x in memory_lib.layers(fitted)]
    assert (len(set(pages)) > 1) == apart == (level.evenness < 1)
    for x in memory_lib.layers(fitted):
        assert x.pool.pages_for(8) <= x.k.shape[-3]
    need = Cost(lm.config).nbytes(2, 100, session.use()[0].tolist(), level)
    taken = memory_lib.nbytes(fitted)
    assert 0.7 * need <= taken <= 1.1 * need


def test_a_request_that_fits_alone_is_begun():
    lm, cost = model("dms"), Cost(model("dms").config)
    room = cost.nbytes(1, 70, [cost.expected(70)])
    with Engine(lm, rows=2, part=16, cache_memory=room) as engine:
        engine._level.fullest = 9.0
        wanted = [(list(range(40, 99)), {"max_new_tokens": 9, "stop_ids": ()})] * 2
        assert all(request.end == "length" for request in together(engine, wanted))


def test_rows_that_short_texts_left_do_not_grow_with_a_long_one(monkeypatch):
    for place in (cost_module, parts_module):
        monkeypatch.setattr(place, "LEAST", 16)
    lm = model("dense")
    room = Cost(lm.config).nbytes(2, 192, [])
    with Engine(lm, rows=8, part=16, cache_memory=room) as engine:
        with engine.together:
            requests = [engine.submit([40 + i], 3 + 9 * (i == 0), stop_ids=()) for i in range(4)]
            requests.append(engine.submit([50], 190, stop_ids=()))
        assert all(request.result().end == "length" for request in requests)
    assert engine.tally.peak_running == 4 and engine.tally.peak_nbytes <= room


def test_refusals():
    lm = model("dense")
    with Engine(lm, rows=1, waiting=1, length=60) as engine:
        for options, message in (
            ({"max_new_tokens": 58}, "exceed the 60 tokens"), ({"temperature": -1}, "temperature"),
            ({"stop": [""]}, "stop"), ({"stop_ids": range(40)}, "stop_ids"), ({"logprobs": 21}, "logprobs"),
            ({"stop": 3}, "stop"), ({"max_new_tokens": 0}, "max_new_tokens"),
        ):  # fmt: skip
            with pytest.raises(AtomError, match=message):
                engine.submit([1, 2, 3], **options)
        with engine.together:
            first = engine.submit([1, 2, 3], 3)
            with pytest.raises(Busy, match="wait already"):
                engine.submit([1, 2, 3], 3)
        first.result()
        left = engine.submit([1, 2, 3], 50)
    assert left.result().end in ("cancelled", "length")
    with pytest.raises(Closed, match="being closed"):
        engine.submit([1], 1)


def test_what_breaks_ends_its_own_requests(monkeypatch, caplog):
    lm = model("dense")
    with Engine(lm, rows=2, part=16) as engine:
        whole = engine.submit([40, 41], 5).result()
        read = module.Parts.read

        def broken(parts):
            if len(parts._ids) == 3:
                raise RuntimeError("no room")
            return read(parts)

        monkeypatch.setattr(module.Parts, "read", broken)
        failed = engine.submit([40, 41, 42], 5).result()
        assert (failed.end, failed.error) == ("failed", "RuntimeError: no room")
        assert engine.submit([40, 41], 5).result().ids == whole.ids
        monkeypatch.setattr(Lane, "decode", lambda *args: 1 / 0)
        assert "ZeroDivisionError" in engine.submit([40, 41], 5).result().error
        monkeypatch.undo()
        assert engine.submit([40, 41], 5).result().ids == whole.ids
