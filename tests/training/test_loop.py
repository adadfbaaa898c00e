import json
import re
import signal

import chex
import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import config, sharding
from atom_jax.checkpoint import store
from atom_jax.data import vocabulary
from atom_jax.data.sources import open_source
from atom_jax.evaluation.run import make_encoder
from atom_jax.evaluation.tasks import EvalConfig
from atom_jax.models import transformer
from atom_jax.sharding import MeshConfig
from atom_jax.training import interrupt, loop, losses, plots, start
from atom_jax.training.record import read
from atom_jax.typing import AtomError

# Every one of the eight simulated devices takes a row.
TINY = ["mesh.data=8", "data.seq_len=16", "optim.schedule=constant", "optim.ema=0.9", "train.eval_every=6"]


def experiment(*settings: str):
    return start.configure("configs/lm.py:tiny", [*TINY, *settings])


def losses_of(workdir):
    return {x["step"]: x["loss"] for x in read(workdir / "metrics.jsonl") if x["kind"] == "train"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, curves):
    """A run of twelve steps without any interruption."""
    workdir = tmp_path_factory.mktemp("whole")
    with curves():
        result = loop.fit(experiment("train.steps=12"), workdir)
    assert result.step == 12 and result.signal == 0
    return workdir, result


def test_what_a_run_leaves_behind(whole):
    workdir, result = whole
    kinds = [(x["step"], x["kind"]) for x in read(workdir / "metrics.jsonl")]
    assert [s for s, k in kinds if k == "train"] == list(range(1, 13))
    assert [s for s, k in kinds if k == "validation"] == [6, 12]
    assert kinds.index((6, "train")) < kinds.index((6, "validation")) < kinds.index((7, "train"))
    assert {p.name for p in (workdir / "plots").iterdir()} == {"loss.png", "optimizer.png", "throughput.png"}
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["10", "12"]
    saved = json.loads((workdir / "experiment.json").read_text())
    assert config.from_json(object, saved) == experiment("train.steps=12")
    last = read(workdir / "metrics.jsonl")[-1]
    assert result.validation == {"loss": last["loss"], "bits_per_byte": last["bits_per_byte"]}
    assert 0 < last["bits_per_byte"] < 8.5


def test_stopped_and_continued_equals_uninterrupted(whole, tmp_path, monkeypatch):
    workdir, result = whole
    loop.fit(experiment("train.steps=7"), tmp_path)
    # Lines that a run cut off after its last checkpoint would have left.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "kind": "train", "loss": 0.0}\n{"step": 9')
    traced = chex.assert_max_traces(n=2)(losses.next_token)  # the step and the validation
    monkeypatch.setattr(losses, "next_token", traced)
    again = loop.fit(experiment("train.steps=12"), tmp_path)
    assert losses_of(tmp_path) == losses_of(workdir)
    assert again.validation == result.validation
    for a, b in zip(store.load_params(workdir)[1:2], store.load_params(tmp_path)[1:2]):
        chex.assert_trees_all_equal(a, b)


def test_a_finished_run_is_left_alone(whole):
    workdir, _ = whole
    before = (workdir / "metrics.jsonl").read_text()
    result = loop.fit(experiment("train.steps=12"), workdir)
    assert result == loop.Result(12, {}, 0) and (workdir / "metrics.jsonl").read_text() == before


def test_another_configuration_is_refused_and_harmless_changes_are_not(whole):
    workdir, _ = whole
    settings = ["train.steps=12"]
    with pytest.raises(AtomError) as caught:
        loop.fit(experiment(*settings, "optim.b1=0.8", "data.seed=4"), workdir)
    text = str(caught.value)
    assert "optim.b1: 0.9 -> 0.8" in text and "data.seed: 0 -> 4" in text and "train.steps" not in text
    loop.fit(experiment(*settings, "train.log_every=3", "mesh.data=4", "mesh.fsdp=2"), workdir)


@pytest.mark.parametrize(
    "settings, words",
    [
        (["data.batch_size=12"], "batch_size 12 is not a multiple of 8"),
        (["optim.accumulate=2"], "batch_size 8 is not a multiple of 8 .* times 2"),
        (["model.vocab_size=100"], "vocab_size 100 is smaller than the tokenizer's 264"),
        (["mesh.data=3"], "does not fit 8 devices"),
        (["data.sources=nowhere"], "nowhere"),
        (["init_from=nowhere"], "nowhere"),
        (["init_from=tests/golden/hf_tiny/llama", "tokenizer="], "no tokenizer"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path, settings, words):
    with pytest.raises(AtomError, match=words) as caught:
        loop.fit(experiment(*settings), tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AtomError, match="workdir"):
        loop.fit(experiment(), tmp_path / "file")


def test_gradients_that_stay_not_finite_end_the_run(tmp_path, curves):
    with pytest.raises(AtomError, match="4 steps in a row, from step 3 on"), curves():
        settings = ["train.steps=30", "train.checkpoint_every=2", "train.max_bad_steps=4", "train.eval_every=0"]
        # The first two steps make the parameters huge.
        loop.fit(experiment("optim.learning_rate=1e6", "optim.warmup_steps=0", *settings), tmp_path)
    assert store.is_checkpoint(tmp_path) and (tmp_path / "plots" / "loss.png").exists()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(store.load_params(tmp_path)[1]))


def test_a_signal_saves_and_a_later_run_goes_on(tmp_path, monkeypatch):
    ask = interrupt.Agreement.ask

    def later(self, interrupted):
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked == 3:
            signal.raise_signal(signal.SIGTERM)
            interrupted = True
        return ask(self, interrupted)

    with monkeypatch.context() as m:
        m.setattr(interrupt.Agreement, "ask", later)
        result = loop.fit(experiment(), tmp_path)
    assert result == loop.Result(3, {}, signal.SIGTERM)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert loop.fit(experiment("train.steps=5"), tmp_path).step == 5


def test_checkpoints_and_curves_by_the_clock(tmp_path, monkeypatch):
    settings = ["train.steps=5", "train.checkpoint_every=0", "train.keep=9", "train.eval_every=0"]
    drawn = []

    def draw(workdir, pages):
        drawn.append(read(workdir / "metrics.jsonl")[-1]["step"])
        if len(drawn) == 2:
            raise OSError(28, "No space left on device")
        if len(drawn) > 2:
            raise AtomError("metrics.jsonl: cannot be read (Input/output error)")

    with monkeypatch.context() as m:
        m.setattr(plots, "draw", draw)
        m.setattr(plots, "SECONDS", 0.0)
        loop.fit(experiment(*settings, "train.checkpoint_minutes=1e-9"), tmp_path / "often")
    assert drawn == [1, 2, 3, 4, 5]  # the last one when all is closed
    assert sorted(p.name for p in (tmp_path / "often" / "checkpoints").iterdir()) == ["1", "2", "3", "4", "5"]
    loop.fit(experiment(*settings), tmp_path / "once")
    assert sorted(p.name for p in (tmp_path / "once" / "checkpoints").iterdir()) == ["5"]


def test_fine_tuning_starts_from_a_run(whole, tmp_path):
    workdir, _ = whole
    exp = experiment(f"init_from={workdir}", "train.steps=5", "optim.learning_rate=1e-9", "train.eval_every=0")
    loop.fit(exp, tmp_path)
    # What the run kept as an average is what it starts from.
    chex.assert_trees_all_close(store.load_params(tmp_path)[1], store.load_params(workdir)[1], atol=1e-6)


def test_the_model_of_init_from(whole, tmp_path):
    workdir, _ = whole
    file = tmp_path / "finetune.py"
    file.write_text(
        "from atom_jax.training.config import Experiment\n"
        f"VARIANTS = {{'a': lambda: Experiment(init_from={str(workdir)!r}, tokenizer='')}}\n"
    )
    exp = start.configure(str(file), ["model.remat=true", "data.batch_size=8"])
    assert exp.model == config.override(experiment().model, ["remat=true"])
    assert start.tokenizer(exp).name == "bytes"
    with pytest.raises(AtomError, match=r"embed is \[264, 32\] there and \[272, 32\] in this model"):
        start.parameters(config.override(exp, ["model.vocab_size=272"]), None)
    with pytest.raises(AtomError, match="model is not set"):
        start.configure(str(file), ["init_from="])


def test_the_model_of_a_published_checkpoint(tmp_path):
    file = tmp_path / "finetune.py"
    file.write_text(
        "from atom_jax.training.config import Experiment\n"
        "VARIANTS = {'a': lambda: Experiment(init_from='tests/golden/hf_tiny/llama')}\n"
    )
    exp = start.configure(str(file), [])
    places = sharding.shardings(transformer.spec(exp.model), sharding.make_mesh(MeshConfig(1, 4, 2)))
    params, notes = start.parameters(exp, places)
    assert notes == [] and params["embed"].sharding == places["embed"] and params["embed"].dtype == np.float32
    chex.assert_trees_all_equal(params, atom_jax.load(exp.init_from, dtype="float32").params)


def test_samples(tmp_path, capfd):
    settings = ["train.steps=6", "train.sample_prompt=It was", "train.sample_tokens=4"]
    loop.fit(experiment(*settings), tmp_path)
    assert re.search(r"step 6: ['\"]It was", capfd.readouterr().err)


def test_a_tokenizer_trained_on_the_runs_own_text(tmp_path):
    settings = ["tokenizer=bpe:300", "model.vocab_size=304", "train.eval_every=0"]
    loop.fit(experiment(*settings, "train.steps=2"), tmp_path)
    saved = (tmp_path / "tokenizer.json").read_bytes()
    vocabulary.trained_tokenizer.cache_clear()
    assert loop.fit(experiment(*settings, "train.steps=3"), tmp_path).step == 3
    assert (tmp_path / "tokenizer.json").read_bytes() == saved
    lm = atom_jax.load(tmp_path)
    text = "It was nothing extraordinary – Emma <|eos|> said.".encode()
    ids = lm.tokenizer.encode(text)
    assert len(ids) < len(text) and lm.tokenizer.decode_bytes(ids) == text
    lengths = losses.byte_lengths(lm.tokenizer, lm.config.vocab_size)
    assert lengths[ids].sum() == len(text)
    encoder = make_encoder(lm, EvalConfig(max_length=32))
    novel = open_source("austen", "validation")
    assert sum(encoder.document(novel.read(0), 16)[1]) == novel.sizes[0]
