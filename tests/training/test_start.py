"""Starting from a checkpoint whose model lacks the learned evictors that are to be trained."""

import dataclasses

import chex
import jax
import pytest

import atom_jax
from atom_jax import checkpoint, config, params, sharding
from atom_jax.checkpoint import store
from atom_jax.kvcache.dms import DMS
from atom_jax.models import hnet, transformer
from atom_jax.models.hnet import chunking
from atom_jax.sharding import MeshConfig
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.training import loop, start
from atom_jax.typing import LM, AtomError

SMALL = transformer.TransformerConfig(
    d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=24, max_length=64
)
EVICTORS = "DMS(form='observed', window=8, bias=True)"


def experiment(folder, *settings, source="tests/golden/hf_tiny/{family}", family="qwen3", more="", memory=EVICTORS):
    """The experiment of a file that takes its model from a checkpoint."""
    file = folder / "retrofit.py"
    source = source.format(family=family)
    file.write_text(
        "from atom_jax.kvcache.dms import DMS\nfrom atom_jax.models.transformer import TransformerConfig\n"
        "from atom_jax.training.config import Experiment\n"
        f"VARIANTS = {{'a': lambda: Experiment(init_from={source!r}, memory={memory}, seed=5{more})}}\n"
    )
    return start.configure(str(file), settings)


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_evictors_start_from_initial_values(tmp_path, family):
    exp = experiment(tmp_path, "memory.sinks=2", "model.memory.window=16", "model.remat=true", family=family)
    assert exp.model.memory == DMS(form="observed", window=16, bias=True, sinks=2) and exp.model.remat
    spec = transformer.spec(exp.model)
    places = sharding.shardings(spec, sharding.make_mesh(MeshConfig(1, 4, 2)))
    values, notes = start.parameters(exp, places)
    jax.tree.map(lambda x, place: chex.assert_equal(x.sharding, place), values, places)
    fresh = params.init(jax.random.key(5), spec)["layers"]["attn"]["dms"]
    chex.assert_trees_all_equal(values["layers"]["attn"]["dms"], fresh)
    base = atom_jax.load(exp.init_from, dtype="float32").params
    chex.assert_trees_all_equal(values["embed"], base["embed"])
    chex.assert_trees_all_equal(values["layers"]["attn"]["q"], base["layers"]["attn"]["q"])
    assert any("layers/attn/dms/alpha" in note and "initial values" in note for note in notes)
    chex.assert_trees_all_equal(start.parameters(exp, None)[0], values)


def test_a_run_that_starts_from_a_plain_checkpoint(tmp_path):
    settings = ["train.steps=1", "data.batch_size=8", "data.seq_len=24", "train.eval_every=0", "mesh.data=8"]
    store.save_model(
        tmp_path / "base", LM(SMALL, params.init(jax.random.key(0), transformer.spec(SMALL)), ByteTokenizer())
    )
    exp = experiment(tmp_path, *settings, source=str(tmp_path / "base"))
    assert loop.fit(exp, tmp_path / "run").step == 1
    lm = checkpoint.load(tmp_path / "run")
    assert lm.config == exp.model and lm.config.memory == DMS(form="observed", window=8, bias=True)
    assert lm.params["layers"]["attn"]["dms"]["observed"].shape == (2, 3, 2)
    atom_jax.save_adapter(lm, tmp_path / "adapter")
    base = atom_jax.load(tmp_path / "base", adapter=tmp_path / "adapter")
    chex.assert_trees_all_equal(base.params["layers"]["attn"]["dms"], lm.params["layers"]["attn"]["dms"])
    # The same command goes on with the run instead of starting anew.
    assert loop.fit(config.override(exp, ["train.steps=2"]), tmp_path / "run").step == 2


def test_a_tokenizer_with_other_ids_is_refused(tmp_path):
    cfg = dataclasses.replace(SMALL, vocab_size=264)
    lm = LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), ByteTokenizer())
    store.save_model(tmp_path / "base", lm)
    exp = experiment(tmp_path, source=str(tmp_path / "base"), memory="None")
    assert start.tokenizer(exp).vocab_size == 264
    assert start.tokenizer(dataclasses.replace(exp, tokenizer="")).vocab_size == 264
    data = dataclasses.replace(exp.data, sources=("reason:subset",))
    with pytest.raises(AtomError, match="tokenizer 'words:256' has other ids than that of init_from"):
        start.tokenizer(dataclasses.replace(exp, tokenizer="words:256", data=data))


def test_all_other_absences_are_refused(tmp_path):
    exp = experiment(tmp_path, family="llama")
    wider = dataclasses.replace(exp, model=dataclasses.replace(exp.model, family="qwen3"))
    with pytest.raises(AtomError, match=r"layers/attn/k_norm is absent there"):
        start.parameters(wider, None)
    trained = experiment(tmp_path, source="tests/golden/dms/separate_alpha", memory=None)
    assert trained.model.memory == checkpoint.load(trained.init_from).config.memory
    without = dataclasses.replace(trained, model=dataclasses.replace(trained.model, memory=None))
    with pytest.raises(AtomError, match=r"layers/attn/dms/alpha is \[2, 64, 2\] there and absent in this model"):
        start.parameters(without, None)


def test_evictors_that_are_there_are_kept(tmp_path):
    exp = experiment(tmp_path, source="tests/golden/dms/separate_alpha")
    values, _ = start.parameters(exp, None)
    there = checkpoint.load(exp.init_from).params["layers"]["attn"]["dms"]
    ours = values["layers"]["attn"]["dms"]
    chex.assert_trees_all_equal({k: ours[k] for k in there}, there)
    assert set(ours) - set(there) == {"bias", "observed"}


def test_memory_of_the_experiment(tmp_path):
    with pytest.raises(AtomError, match=r"where `model` is given, set model\.memory"):
        experiment(tmp_path, more=", model=TransformerConfig()")
    with pytest.raises(AtomError, match="memory: expected none or one of"):
        experiment(tmp_path, memory="'dms'")
    cfg = hnet.HNetConfig(
        vocab_size=264, layout=("T1", "T1", "T1"), d_model=(16, 16), d_intermediate=(16, 16), n_heads=(2, 2),
        rotary_dim=(8, 8), window=(15, -1), chunking=(chunking(4.0, 0.5),), bos_id=256, eos_ids=(257,), pad_id=258,
    )  # fmt: skip
    lm = LM(cfg, params.init(jax.random.key(3), hnet.spec(cfg)), ByteTokenizer())
    atom_jax.save_hf(lm, tmp_path / "hnet")
    exp = experiment(tmp_path, source=str(tmp_path / "hnet"))
    assert exp.model == dataclasses.replace(atom_jax.load(tmp_path / "hnet").config, memory=exp.memory)
