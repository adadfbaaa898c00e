"""Generation with a Bolmo: the official bytes and patches, and every row as if it were alone."""

import collections
import dataclasses
import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax.inference import generate as module
from atom_jax.inference import score
from atom_jax.models import bolmo
from atom_jax.models.bolmo import forward
from atom_jax.session import queue, sampling, session
from atom_jax.session.sampling import row_keys
from atom_jax.typing import AtomError
from tests.models.tiny_bolmo import NAMES, ids_of, model, numbers, texts

NEW = 32
CODEC = bolmo.codec(model().config)
PROMPTS = [texts()[name] for name in NAMES]


@functools.cache
def found(temperature=0.0, row=None, top_p=1.0):
    """What is made of all prompts, or of one alone."""
    rows = slice(None) if row is None else slice(row, row + 1)
    keys = row_keys(jax.random.key(4), len(PROMPTS))[rows]
    return atom_jax.generate(model(), PROMPTS[rows], NEW, temperature, keys, top_p=top_p)


def test_greedy_bytes_and_patches_equal_the_official_ones():
    made = found()
    assert made.stats["new_tokens"] == 6 * NEW
    for name, row, text in zip(NAMES, made.ids, made.text):
        n = len(ids_of(name))
        official = numbers()[f"{name}.gen_ids"][0, n:], numbers()[f"{name}.gen_boundary_mask"][0, n:]
        np.testing.assert_array_equal(np.array(row) % 260, official[0])
        np.testing.assert_array_equal(np.array(row) >= 260, official[1])
        assert text == model().tokenizer.decode(row)


@pytest.mark.parametrize(("temperature", "top_p", "row"), [(0.0, 1.0, 4), (0.9, 0.9, 0), (0.9, 0.9, 3)])
def test_a_row_is_the_same_alone_and_in_a_batch(temperature, top_p, row):
    assert found(temperature, row, top_p).ids[0] == found(temperature, None, top_p).ids[row]


def test_the_layers_over_patches_run_once_per_patch_of_the_batch(monkeypatch):
    """And not whenever a patch of any row ends, where all rows wait for each other."""
    monkeypatch.setattr(queue, "SHARED", 0)
    expected = found().ids
    runs, blocks = [], forward.transformer.blocks

    def counted(*args, **kwargs):
        jax.debug.callback(lambda: runs.append(1))
        return blocks(*args, **kwargs)

    monkeypatch.setattr(forward.transformer, "blocks", counted)
    monkeypatch.setattr(forward, "enough", lambda p, cfg, cache: len(cache.length))
    # A configuration that nothing has compiled for.
    lm = dataclasses.replace(model(), config=dataclasses.replace(model().config, max_length=500))
    rows = atom_jax.generate(lm, PROMPTS, NEW).ids
    jax.effects_barrier()
    assert rows == expected
    # The prompt's last byte and all new ones but the last are read; the prompts themselves take one run.
    patches = [int(numbers()[f"{name}.gen_boundary_mask"][0, len(ids_of(name)) - 1 :][:NEW].sum()) for name in NAMES]
    assert len(runs) == 1 + max(patches) and sum(patches) > 3 * max(patches)


def traced(n, folder):
    """How often each event of a trace occurs while n bytes are made."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder / str(n), profiler_options=options):
        atom_jax.generate(model(), PROMPTS[4], n, stop_ids=())
    (file,) = (folder / str(n)).rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return collections.Counter(e["name"] for e in events if e.get("ph") == "X")


def test_the_host_does_the_same_for_any_number_of_bytes(tmp_path):
    """One compiled loop makes them: a trace has as many calls, copies and looks at results for 20 as for 100."""
    atom_jax.generate(model(), PROMPTS[4], 100, stop_ids=())
    few, many = traced(20, tmp_path), traced(100, tmp_path)
    host = ("PjitFunction", "DevicePut", "np.asarray", "ThunkExecutor::Execute (wait")
    few_host, many_host = ({k: n for k, n in events.items() if k.startswith(host)} for events in (few, many))
    assert few_host == many_host and few_host["PjitFunction(decode)"] > 0 and few_host["np.asarray(jax.Array)"] > 0
    assert not any("callback" in name for name in many)
    # What the loop does is in the trace: some of it for every byte, some for every patch.
    inside = {(few[name], n) for name, n in many.items()}
    assert (20, 100) in inside and any(few[name] < 20 and 20 < n < 50 for name, n in many.items())


@pytest.mark.parametrize("n", [1, 3])
def test_new_tokens_are_new_bytes(n):
    made = atom_jax.generate(model(), PROMPTS, n)
    assert made.ids == [row[:n] for row in found().ids]


def test_a_prompt_of_nothing_begins_a_text():
    """Its bos ends a patch, as position 0 always does; what follows is that of the whole forward pass."""
    row = atom_jax.generate(model(), [""], 4).ids[0]
    ids = np.array([[1, *row]], np.int32)
    batch = score.to_batch(model(), ids)
    ends = (ids >= 260) | (np.arange(5) == 0)

    @jax.jit
    def read(p):
        return bolmo.logits(p, bolmo.hidden(p, batch, cfg=model().config, ends=ends)[0], cfg=model().config)

    logits = np.asarray(read(model().params))[0]
    assert list(logits[:4].argmax(-1)) == row


def test_caches_may_grow(monkeypatch):
    expected = found(row=4)
    monkeypatch.setattr(session, "LEAST", 16)
    monkeypatch.setattr(module, "ROOM", 1)
    short = [PROMPTS[4]]
    grown = atom_jax.generate(model(), short, NEW)
    assert grown.ids == expected.ids
    assert grown.stats["kv_bytes"] < expected.stats["kv_bytes"]


def test_either_form_of_a_stop_id_ends_its_row_only():
    free = found().ids
    stop = free[1][5] % 260
    made = atom_jax.generate(model(), PROMPTS, NEW, stop_ids=[stop])
    for row, whole in zip(made.ids, free):
        ends = [i for i, token in enumerate(whole) if token % 260 == stop]
        assert row == whole[: ends[0] if ends else None]


def test_the_law_of_bytes_and_of_patches():
    """At temperature 1 ids are drawn as their logits have it; else bytes by the sum of forms, which stay likely."""
    logits = jnp.log(jnp.array([0.3, 0.05, 0.2, 0.0, 0.1, 0.25, 0.1, 0.0]))
    used = np.array([4, 5, 6, 7, 264, 265, 266, 267])
    many = jnp.full((20_000, 520), -jnp.inf).at[:, used].set(logits)
    keys = row_keys(jax.random.key(0), 20_000)

    def shares(**how):
        token = CODEC.choose(many, sampling.Draw(keys, jnp.int32(3), sampling.sampler(**how)))
        return np.bincount(np.asarray(token), minlength=520)[used] / 20_000

    np.testing.assert_allclose(shares(temperature=1.0), jnp.exp(logits), atol=0.012)
    byte = np.array([0.4, 0.3, 0.3]) ** 2
    byte = byte / byte.sum()
    form = np.array([0.25, 0.25 / 0.3, 0.1 / 0.3])
    expected = np.array([*(byte * (1 - form)), 0, *(byte * form), 0])
    np.testing.assert_allclose(shares(temperature=0.5), expected, atol=0.012)
    # The cut is by bytes: either of the two with 0.3 alone would be less likely than 0.7.
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.35), [0.75, 0, 0, 0, 0.25, 0, 0, 0], atol=0.012)
    assert shares(temperature=0.0)[0] == 1.0


def test_unused_ids_are_never_made():
    lm = model()
    head = lm.params["unembed"].at[:, jnp.array(CODEC.unused)].set(lm.params["unembed"].sum(1, keepdims=True) * 9)
    rows = atom_jax.generate(dataclasses.replace(lm, params=lm.params | {"unembed": head}), PROMPTS[4:5], 12, 1.0).ids
    assert not set(rows[0]) & set(CODEC.unused) and len(rows[0]) == 12


def test_log_probabilities_of_given_text():
    ids = ids_of("compound")[None]
    out = atom_jax.apply(model(), ids)
    logp = np.asarray(jax.nn.log_softmax(out.logits))[0, :-1]
    target, mark = ids[0, 1:], np.asarray(out.aux["boundaries"][0])[0, 1:]
    joint = logp[np.arange(56), target + 260 * mark]
    np.testing.assert_allclose(score.logprobs(model(), ids)[0], joint, atol=1e-4)
    marginal = np.logaddexp(logp[np.arange(56), target], logp[np.arange(56), target + 260])
    np.testing.assert_allclose(score.logprobs(model(), ids, marginal=True)[0], marginal, atol=1e-4)
    assert (joint < marginal).all()


def test_bad_prompts_are_refused():
    with pytest.raises(AtomError, match="outside the vocabulary of 520"):
        atom_jax.generate(model(), [[1, 520]], 2)
    with pytest.raises(AtomError, match="exceed the 512 positions"):
        atom_jax.generate(model(), ["a" * 600], 2)
