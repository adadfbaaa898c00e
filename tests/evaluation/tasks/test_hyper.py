"""Hyper-scaling: grids of one run, the table of policies, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from atom_jax import params
from atom_jax.checkpoint import save_adapter
from atom_jax.data.puzzles import Generated, Subset
from atom_jax.data.vocabulary import trained_tokenizer
from atom_jax.evaluation.reports import chains as report
from atom_jax.evaluation.tasks import EvalConfig, hyper, hyper_grid, hyper_steps, kv
from atom_jax.evaluation.tasks.hyper import Hyper, HyperSettings
from atom_jax.kvcache.dms import DMS, Revised
from atom_jax.models import transformer
from atom_jax.session.queue import Made
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError

PUZZLE = "subset:least=3:letters=3:high=9:goal=20"


@pytest.fixture(scope="module")
def lm():
    cfg = transformer.TransformerConfig(
        family="llama", vocab_size=64, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=16,
        max_length=64, bos_id=0, eos_ids=(1,), pad_id=2, tie_embeddings=True,
    )  # fmt: skip
    tree = params.init(jax.random.key(1), transformer.spec(cfg))
    return LM(cfg, tree, trained_tokenizer("words:64", (f"reason:{PUZZLE}",)).padded(64))


SETTINGS = HyperSettings(
    puzzle=PUZZLE, problems=3, lengths=(4, 12), chains=(1, 2), policies=("none", "streaming_llm"), budgets=(11,),
    steps=2, draws=20,
)  # fmt: skip


def made(n, ended, held=None):
    steps = n - 1 + ended
    held = np.arange(1, steps + 1, dtype=np.float32) if held is None else np.array(held, np.float32)
    return Made([7] * n, ended, False, held, 10 + np.arange(steps, dtype=np.float32))


def test_cells_are_what_shorter_and_fewer_chains_would_have_been():
    one, two, three = made(3, True), made(6, True), made(9, False)
    got = hyper_grid.grid([one, two, three], ["x", "y", None], lambda a: a == "y", (3, 4, 7), (1, 2, 3))
    assert got["finished"] == [[0, 0, 0], [1, 1, 1], [1, 2, 2]]
    # A tie goes to the lower chain.
    assert got["right"] == [[False] * 3, [False] * 3, [False] * 3]
    assert got["any"] == [[False] * 3, [False] * 3, [False, True, True]]
    assert got["reads"][0] == [21, 42, 63] and got["reads"][2] == [33, 33 + 75, 33 + 75 + 75]
    assert got["peak"][2] == [3, 6, 12] and got["held"][1] == [3, 3, 3]
    assert hyper_grid.grid([two], ["y"], lambda a: a == "y", (7,), (1,))["right"] == [[True]]


def test_a_comparison_is_resumed_and_drawn(lm, tmp_path, monkeypatch):
    out = tmp_path / "hyper.json"
    result = Hyper().run(lm, SETTINGS, None, out)
    rows = result.notes["rows"]
    assert {(r["policy"], r["budget"]) for r in rows} == {("none", None), ("streaming_llm", 11)} and len(rows) == 8
    prompt = len(lm.tokenizer.encode(Subset().prompt(Generated(Subset(3, 3, 5, 9, 20), "test").pose(0)[0]))) + 1
    for row in (r for r in rows if r["policy"] == "none" and r["chains"] == 1):
        assert row["reads"] <= sum(prompt + t for t in range(1, row["length"])) and row["held"] > prompt
    assert max(r["held"] for r in rows if r["policy"] == "streaming_llm") <= 11
    assert out.with_suffix(".png").stat().st_size > 10_000 and "steps right" in result.table
    assert [*result.notes["steps"]] == ["none"]
    assert {g["cost"] for g in result.notes["gaps"]} == {"reads", "peak"}
    lines = [json.loads(line) for line in (tmp_path / "hyper.json.cells.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    monkeypatch.setattr(hyper, "reason", None)
    assert Hyper().run(lm, SETTINGS, None, out).notes["rows"] == rows


def test_steps_of_the_programs_chains_are_found(lm):
    found = hyper_steps.judge(lm, Subset(3, 3, 5, 9, 20), 3)
    assert {"mark", "skip", "answer", "chain"} <= set(found) and all(0 <= x <= 1 for x in found.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"lengths": (60,)}, "beyond the model's 64"), ({"policies": ("none", "lru")}, "lru"),
     ({"puzzle": "subset:letters=8"}, "lacks words")],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(lm, changes, message):
    with pytest.raises(AtomError, match=message):
        Hyper().run(lm, dataclasses.replace(SETTINGS, **changes), None, None)


def test_bad_settings():
    for field, value in (("protect", "all"), ("lengths", ()), ("chains", (2, 2)), ("problems", 0), ("split", "dev")):
        with pytest.raises(AtomError, match=field):
            HyperSettings(**{field: value})
    assert EvalConfig().hyper.problems == 400


def test_adapters_of_other_models_are_refused(lm, monkeypatch):
    monkeypatch.setattr(hyper.checkpoint, "load", lambda path: lm)
    with pytest.raises(AtomError, match="has no learned memory"):
        hyper.methods(lm, dataclasses.replace(SETTINGS, adapters=("x",)), 9, "a 5 ;")
    rival = hyper.methods(lm, dataclasses.replace(SETTINGS, rivals=("runs/x/",)), 9, "a 5 ;")[-1]
    assert rival.front == "x" and rival.budget is None
    other = dataclasses.replace(lm, params=jax.tree.map(lambda x: x + 1, lm.params))
    assert not kv._same(lm, other) and kv._same(lm, lm)


def test_an_adapter_is_put_on_the_model(lm, tmp_path):
    cfg = dataclasses.replace(lm.config, memory=DMS(window=4, page=8, bias=True))
    new = params.flatten(params.init(jax.random.key(3), transformer.spec(cfg)))
    save_adapter(LM(cfg, params.unflatten(new | params.flatten(lm.params)), lm.tokenizer), tmp_path / "a")
    (_, _, own) = hyper.methods(lm, dataclasses.replace(SETTINGS, adapters=(str(tmp_path / "a"),)), 9, "a 5 ;")
    assert own.front == "dms" and own.lm.config.memory == cfg.memory and kv._same(lm, own.lm)


def test_what_an_adapter_has_learned_is_run_in_several_ways(lm, monkeypatch):
    cfg = dataclasses.replace(lm.config, memory=DMS("adapter", window=4, scale=1.0, offset=0.0))
    tree = params.flatten(params.init(jax.random.key(2), transformer.spec(cfg))) | params.flatten(lm.params)
    adapted = LM(cfg, params.unflatten(tree), lm.tokenizer)
    monkeypatch.setattr(hyper.checkpoint, "load", lambda path: adapted)
    settings = dataclasses.replace(SETTINGS, policies=(), adapters=("x",))
    ways = "model", "revised:form=model", "every=8", "share=0.3"
    own, revised = hyper.methods(lm, dataclasses.replace(settings, learned=ways), 9, "a 5 ;")[-2:]
    assert (own.front, own.budget, own.lm, own.judged) == ("dms", "x", adapted, True)
    assert not revised.judged and (revised.front, revised.budget) == (
        "revised",
        "x revised:form=model,every=8,share=0.3",
    )
    assert revised.lm.config.memory == Revised.of(cfg.memory, every=8, share=0.3)
    with pytest.raises(AtomError, match="uses nothing of what x has learned"):
        hyper.methods(lm, dataclasses.replace(settings, learned=("revised",)), 9, "a 5 ;")


def test_a_problem_is_thought_about_and_shown(lm):
    task = report.task(PUZZLE, "a 5 b 6 c 9 goal 11", None, "boxed")
    result = report.run(lm, task, 2, 8, 1.0, 0)
    text = report.report(task, result, True, False)
    assert "a 5 b 6 c 9 goal 11 ;" in text and "entries read" in text
    out = report.as_json(task, result)
    assert len(out["chains"]) == 2 and out["right"] in (True, False)
    with pytest.raises(AtomError, match="lacks words"):
        report.run(dataclasses.replace(lm, tokenizer=ByteTokenizer()), task._replace(prompts=["z ж"]), 2, 8, 1.0, 0)
    free = report.task(PUZZLE, None, "a 5", r"\w")
    assert free.verify is None and free.extract("b 7") == "7"


def test_prompts_from_a_file(lm):
    lines = '{"prompt": "a 5 b 6 goal 11", "answer": "0"}\n\n{"prompt": "b 6 c 9 goal 6", "answer": 1}\n'
    task = report.task_of_lines(lines, r"\w", "x")
    assert task.prompts == ["a 5 b 6 goal 11", "b 6 c 9 goal 6"]
    assert task.verify(1, " 1") and not task.verify(0, "1")
    result = report.run(lm, task, 3, 8, 1.0, 0)
    text, out = report.report(task, result, False, False), report.as_json(task, result)
    assert text.splitlines()[1].startswith("a 5 b 6 goal 11") and "of 2 votes are right" in text
    assert (
        out["accuracy"] == sum(one["right"] for one in out["problems"]) / 2 and len(out["problems"][1]["chains"]) == 3
    )
    assert report.task_of_lines("a 5\nb 6\n", r"\w", "x").verify is None
    for bad, told in (("", "no prompts"), ("{", "line 1: not a JSON"), ('{"text": "a"}', "line 1: expected"),
                      ('{"prompt": "a", "answer": 1}\nb', "prompt 2 has no answer")):  # fmt: skip
        with pytest.raises(AtomError, match=told):
            report.task_of_lines(bad, r"\w", "x")
