"""Continuations over a fixed number of rows: the same ones, whatever the rows."""

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax.session import laid_out, queue, sampling
from atom_jax.session.prompts import padded
from atom_jax.session.session import Session
from tests.reliability import rows as examples

MOST, WIDTH = 14, 2
# Ways to keep rows: all slots, a budget, pages with statistics, a pool; and learned units.
MODELS = {
    "dense": ("llama", "plain", None), "budget": ("llama", "plain", "tova"), "quest": ("llama", "plain", "quest"),
    "dms": ("qwen3", "plain", "dms"), "dmc": ("qwen3", "plain", "dmc"), "units": ("hnet", "hnet", None),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("scanned_policies")


@pytest.fixture(autouse=True)
def look(monkeypatch):
    monkeypatch.setattr(queue, "LOOK", 4)


def started(name):
    family, example, policy = MODELS[name]
    lm = examples.plain(family, example) if policy is None else examples.model(family, example, policy)
    ids = [np.array(row, np.int32) for row in examples.texts(lm.config, 3)[0]]
    params, unroll = laid_out.of(lm), laid_out.unrolls(lm)
    session = Session.begin(lm, *padded(ids), capacity=40, params=params, unroll=unroll)
    jobs = np.repeat(np.arange(len(ids)), WIDTH)
    # Ends that come early in some rows.
    stops = np.arange(5, lm.config.vocab_size, 9, dtype=np.int32)
    return lm, ids, session, jobs, stops


def run(session, jobs, stops, rows, **options):
    keys = sampling.row_keys(jax.random.key(5), len(jobs))
    return queue.run(session, jobs, keys, sampling.sampler(1.0), stops, MOST, rows, **options)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_made_does_not_depend_on_the_rows(name, monkeypatch):
    monkeypatch.setattr(queue, "cores", lambda lm: 1)
    lm, ids, session, jobs, stops = started(name)
    together, stats = run(session, jobs, stops, len(jobs))
    waiting, _ = run(session, jobs, stops, 2)
    assert len({len(one.ids) for one in together}) > 2 and any(one.ended for one in together)
    for a, b in zip(together, waiting):
        assert (a.ids, a.ended, a.cut) == (b.ids, b.ended, False)
        np.testing.assert_array_equal(a.held, b.held)
        np.testing.assert_array_equal(a.read, b.read)
        assert len(a.held) == len(a.ids) + a.ended - 1
    steps = sum(len(one.held) for one in together)
    assert stats.row_steps - stats.idle == steps
    if name == "dense":
        for p, row in enumerate(ids):
            for one in together[p * WIDTH : (p + 1) * WIDTH]:
                np.testing.assert_array_equal(one.read, len(row) + 1 + np.arange(len(one.read)))
        prompts = [ids[job].tolist() for job in jobs]
        again = atom_jax.generate(lm, prompts, MOST, 1.0, jax.random.key(5), stop_ids=stops.tolist())
        assert again.ids == [one.ids for one in together]
        assert again.stats["kv_reads"] == pytest.approx(sum(one.read.sum() for one in together))


def test_rows_are_dealt_out_to_cores_and_ended_from_outside(monkeypatch):
    monkeypatch.setattr(queue, "cores", lambda lm: 2)
    _, _, session, jobs, stops = started("dense")
    alone, _ = run(session, jobs, stops, 1)
    seen = []

    def watch(number, made):
        seen.append(number)
        return [j for j in range(len(jobs)) if j != number and jobs[j] == jobs[number]]

    made, stats = run(session, jobs, stops, 4, watch=watch)
    assert sorted(seen) == list(range(len(jobs))) and stats.row_steps >= stats.idle
    for one, whole in zip(made, alone):
        assert one.ids == whole.ids[: len(one.ids)] and (one.cut or one.ids == whole.ids)
    assert any(one.cut for one in made)
    # One after another: all but the first of a prompt are cut before they begin.
    monkeypatch.setattr(queue, "cores", lambda lm: 1)
    single, _ = run(session, jobs, stops, 1, watch=watch)
    assert [one.cut for one in single] == [False, True] * 3 and single[1].ids == []
