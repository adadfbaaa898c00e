"""Fine-tuning: any published directory, on conversations whose answers are learned, with LoRA and learned memory."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import checkpoint, config, params
from atom_jax.__main__ import main
from atom_jax.checkpoint import store
from atom_jax.data.pipeline import make_iterator
from atom_jax.kvcache.dms import DMS
from atom_jax.models import transformer
from atom_jax.models.lora import LoRA
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.training import loop, losses, start
from atom_jax.training.objectives import Fit
from atom_jax.training.record import read
from atom_jax.typing import LM, AtomError, Batch
from configs import sft

SETTINGS = ["mesh.data=8", "optim.learning_rate=0.02", "optim.schedule=constant", "optim.warmup_steps=0"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(a model as a directory, sums as conversations, an adapter with evictors)."""
    folder = tmp_path_factory.mktemp("sft")
    cfg = transformer.TransformerConfig(
        d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=48, max_length=512, bos_id=256,
        eos_ids=(257,),
    )  # fmt: skip
    atom_jax.save_hf(
        LM(cfg, params.init(jax.random.key(3), transformer.spec(cfg)), ByteTokenizer()), folder / "model"
    )
    records = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(8) for b in range(8)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    evicting = dataclasses.replace(cfg, memory=DMS(form="adapter", window=4, scale=1.0, offset=-1.0))
    spec = params.map_specs(lambda s: dataclasses.replace(s, init=params.normal(0.5)), transformer.spec(evicting))
    atom_jax.save_adapter(LM(evicting, params.init(jax.random.key(1), spec), None), folder / "evictors")
    return folder


def experiment(source, *settings):
    names = [f"init_from={source / 'model'}", f"data.sources={source / 'sums.jsonl'}"]
    return start.configure("configs/sft.py:tiny", [*names, *SETTINGS, *settings])


@pytest.mark.parametrize("name", sft.VARIANTS)
def test_variants_survive_json(name):
    exp = config.load_file(f"configs/sft.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp and exp.data.chat and exp.train.eval_first


def test_packed_rows_have_the_losses_of_their_conversations(source):
    exp = experiment(source)
    data = make_iterator(dataclasses.replace(exp.data, batch_size=2), ByteTokenizer())
    rows = next(data)
    data.close()
    assert rows["segments"].max() > 4
    cfg, p = exp.model, params.init(jax.random.key(7), transformer.spec(exp.model))
    lengths = losses.byte_lengths(ByteTokenizer(), 264)
    for memory in (None, DMS(form="borrowed", window=3, scale=4.0, offset=0.0)):
        of = functools.partial(losses.next_token, p, cfg=dataclasses.replace(cfg, memory=memory), lengths=lengths)
        score = jax.jit(lambda batch, of=of: of(batch))
        whole = score(Batch(**rows))
        alone = []
        for row in range(2):
            for segment in range(1, rows["segments"][row].max() + 1):
                here = rows["segments"][row] == segment
                one = {k: np.zeros((1, 24), x.dtype) for k, x in rows.items()}
                for name, x in rows.items():
                    one[name][0, : here.sum()] = x[row][here]
                one["segments"] = np.minimum(one["segments"], 1)
                alone.append(score(Batch(**one)))
        total = jax.tree.map(lambda *x: sum(x), *alone)
        assert int(whole.tokens) == int(total.tokens) == sum(int(a.tokens) for a in alone)
        assert int(whole.bytes) == int(total.bytes)
        np.testing.assert_allclose(float(whole.nats), float(total.nats), rtol=1e-5)


@pytest.fixture(scope="module")
def tuned(source, tmp_path_factory):
    """A run of LoRA with learned memory on."""
    workdir = tmp_path_factory.mktemp("run")
    exp = experiment(source, f"adapter={source / 'evictors'}", "train.steps=6")
    loop.fit(exp, workdir)
    return exp, workdir


def test_answers_get_likelier_and_only_corrections_change(source, tuned):
    exp, workdir = tuned
    assert exp.model.memory.form == "adapter" and exp.model.lora == LoRA()
    judged = [line["loss"] for line in read(workdir / "metrics.jsonl") if line["kind"] == "validation"]
    assert len(judged) == 3  # before the first step, after the fourth, and at the end
    assert judged[-1] < judged[0] - 0.2
    base = params.flatten(atom_jax.load(source / "model", adapter=source / "evictors", dtype="float32").params)
    after = params.flatten(checkpoint.load(workdir, merge=False).params)
    for name, x in after.items():
        if "lora/" in name:
            assert jnp.abs(x).max() > 0
        else:
            np.testing.assert_array_equal(x, base[name])


def test_what_a_run_gives(source, tuned, tmp_path):
    _, workdir = tuned
    atom_jax.save_adapter(checkpoint.load(workdir, merge=False), tmp_path / "lora")
    both = f"{source / 'evictors'},{tmp_path / 'lora'}"
    ids = [list(b"3 + 4 =")]
    found = atom_jax.generate(atom_jax.load(source / "model", adapter=both), ids, 4)
    assert found.ids == atom_jax.generate(checkpoint.load(workdir), ids, 4).ids


def test_an_adapter_is_all_that_a_run_trained_or_refused(tuned, tmp_path, capsys):
    _, workdir = tuned
    assert main(["atom_jax", "adapter", str(workdir), str(tmp_path / "lora")]) == 0
    # The same run, had it trained its table or the evictors too, and with no word about that.
    also = lambda name: {"groups": [{"pattern": f"(?!layers/lora/|{name}).*", "factor": 0.0}]}  # noqa: E731
    for i, (optim, words) in enumerate((
        (also("embed"), "embed too, which an adapter leaves out"), (also("layers/attn/dms/"), "layers/attn/dms/"),
        ({}, "no groups of parameters are named there"),
    )):  # fmt: skip
        shutil.copytree(workdir, other := tmp_path / str(i))
        for note in other.glob("checkpoints/*/config/metadata"):
            note.write_text(json.dumps(json.loads(note.read_text()) | {"optim": optim}))
        assert main(["atom_jax", "adapter", str(other), str(tmp_path / "lost")]) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "lost").exists()


def test_an_interrupted_run_goes_on_exactly(tuned, tmp_path):
    exp, workdir = tuned
    shutil.copytree(workdir / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    loop.fit(exp, tmp_path)
    wanted, found = (
        {x["step"]: x["loss"] for x in read(w / "metrics.jsonl") if x["kind"] == "train"} for w in (workdir, tmp_path)
    )
    assert list(wanted) == [1, 2, 3, 4, 5, 6] and found == {step: wanted[step] for step in (5, 6)}
    again, first = (params.flatten(checkpoint.load(w, merge=False).params) for w in (tmp_path, workdir))
    assert all(np.array_equal(again[name], x) for name, x in first.items())


def test_what_does_not_go_together_is_refused(source, tmp_path):
    exp = experiment(source)
    with pytest.raises(AtomError, match="fit and lora"):
        dataclasses.replace(exp, fit=Fit())
    with pytest.raises(AtomError, match="there is no init_from to put it on"):
        dataclasses.replace(exp, init_from="", adapter="smollm2-135m-dms-4x")
    with pytest.raises(AtomError, match="adapter 'nowhere' is neither"):
        experiment(source, "adapter=nowhere")
    file = tmp_path / "given.py"
    file.write_text(
        "from atom_jax.models.lora import LoRA\nfrom atom_jax.models.transformer import TransformerConfig\n"
        "from atom_jax.training.config import Experiment\n"
        "VARIANTS = {'a': lambda: Experiment(model=TransformerConfig(), lora=LoRA())}\n"
    )
    with pytest.raises(AtomError, match="lora is for the model of init_from"):
        start.configure(str(file), [])
    store.save_model(tmp_path / "orbax", atom_jax.load(source / "model"))
    assert start.configure("configs/sft.py:lora", [f"init_from={tmp_path / 'orbax'}"]).model.lora == LoRA()
