"""Retrofits with learned evictors: the recipes are complete, and the smallest one runs from fit to adapter."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params, tokenizers
from atom_jax.data import facts, pipeline
from atom_jax.models import registry, transformer
from atom_jax.sharding import make_mesh
from atom_jax.training import loop, optim, start
from atom_jax.training.program import Program
from atom_jax.typing import LM
from configs import dms


@pytest.mark.parametrize("name", dms.VARIANTS)
def test_variant_is_complete(name):
    exp = config.load_file(f"configs/dms.py:{name}")
    assert config.from_json(object, config.to_json(exp)) == exp


def test_published_recipes_train_only_evictors_of_the_published_sizes():
    for exp, count in ((dms.qwen3_1b7(), 1_720_574_976), (dms.qwen3_8b(), 8_190_735_360)):
        spec = registry.of(exp.model).spec(exp.model)
        made = optim.make(exp.optim, spec, exp.train.steps)
        learn = [k for k, factor in made.factors.items() if factor]
        assert sorted(learn) == ["layers/attn/dms/alpha", "layers/attn/dms/norm"]
        sizes = params.flatten(spec)
        added = sum(int(np.prod(sizes[k].shape)) for k in learn)
        assert params.count(spec) - added == count


@pytest.mark.parametrize("name", [name for name in dms.VARIANTS if "asks" in name])
def test_half_of_the_text_asks(name):
    data, plain = dms.VARIANTS[name]().data, dms.VARIANTS[name.replace("_asks", "")]().data
    n = len(data.sources) // 2
    assert all(b.startswith(f"facts:{a}:") for a, b in zip(data.sources[:n], data.sources[n:]))
    assert data.weighs and sum(data.weights[:n]) == sum(data.weights[n:])
    assert name == "tiny_asks" or (data.sources[:n], data.seq_len) == (plain.sources, plain.seq_len)
    for source in data.sources[n:]:
        how = facts.parse(source.removeprefix("facts:"))[1]
        # In tokens of three bytes, or of one.
        assert how.size <= data.seq_len * (1 if name == "tiny_asks" else 3)


def test_a_retrofit_that_asks_learns():
    """The divergence falls by evictors that keep more, since no share is demanded."""
    exp = dms.tiny_asks()
    cfg = transformer.TransformerConfig(
        vocab_size=264, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, bos_id=256,
        eos_ids=(257,), memory=exp.memory,
    )  # fmt: skip
    exp = dataclasses.replace(exp, model=cfg, memory=None, fit=None)
    settings = ["init_from=", "mesh.data=1", "optim.learning_rate=0.1", "optim.warmup_steps=1", "distill.weight=0"]
    exp = config.override(exp, settings)
    data = pipeline.make_iterator(exp.data, tokenizers.from_name("bytes"))
    rows = next(data)
    data.close()
    assert (rows["loss_weights"] == 20).any()
    made = Program(exp, make_mesh(exp.mesh, jax.devices()[:1]), tokenizers.from_name("bytes"))
    flat = params.flatten(params.init(jax.random.key(0), transformer.spec(cfg)))
    # Attention that matters.
    flat = {k: 3 * x if k.startswith("layers/attn/") and k[-2] == "/" else x for k, x in flat.items()}
    state, found = made.initial(params.unflatten(flat)), []
    for _ in range(8):
        state, metrics = made.step(state, made.put(rows))
        found.append(float(metrics["weighted_kl"]))
    assert found[-1] < 0.7 * found[0]


@pytest.fixture
def base(tmp_path):
    """A model on the disk, and in memory."""
    cfg = transformer.TransformerConfig(
        vocab_size=264, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, bos_id=256,
        eos_ids=(257,),
    )  # fmt: skip
    lm = LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), tokenizers.from_name("bytes"))
    atom_jax.save_hf(lm, tmp_path / "base")
    return tmp_path / "base", lm


def test_thresholds_of_short_and_of_long_rows_alone(tmp_path, base, one_device):
    exp = start.configure("configs/dms.py:tiny_far", [f"init_from={base[0]}"])
    loop.fit(exp, tmp_path / "run")
    learned = atom_jax.load(tmp_path / "run").params["layers"]["attn"]["dms"]
    slope = np.asarray(learned["slope"])
    assert slope.all() and np.ptp(slope) < 1e-5 and learned["alpha"].any()


@pytest.mark.parametrize("variant", ["tiny", "tiny_merged", "tiny_asks"])
def test_a_retrofit_from_fit_to_adapter(tmp_path, variant, base, one_device):
    there, base = base
    exp = start.configure(f"configs/dms.py:{variant}", [f"init_from={there}"])
    result = loop.fit(exp, tmp_path / "run")
    assert result.step == exp.train.steps and {"kl", "agreement", "held"} <= set(result.validation)
    lm = atom_jax.load(tmp_path / "run")
    for name, x in params.flatten(base.params).items():
        np.testing.assert_array_equal(params.flatten(lm.params)[name], x)
    atom_jax.save_adapter(lm, tmp_path / "adapter")
    again = atom_jax.load(there, adapter=str(tmp_path / "adapter"))
    assert again.config.memory == exp.memory
    text = [list(np.random.default_rng(0).integers(0, 256, 200))]
    got = [atom_jax.generate(one, text, max_new_tokens=4) for one in (lm, again)]
    assert got[0].ids == got[1].ids
    assert got[0].stats["kv_entries_peak"] < 200
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("kl" in line for line in lines)
    assert any("weighted_kl" in line for line in lines) == (variant == "tiny_asks")


def test_models_without_a_layer_for_evictors_are_refused(tmp_path):
    cfg = transformer.TransformerConfig(
        family="qwen3", d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=48, eos_ids=(257,),
        layer_types=("sliding", "sliding"), sliding_window=16,
    )  # fmt: skip
    tree = params.init(jax.random.key(0), transformer.spec(cfg))
    atom_jax.save_hf(LM(cfg, tree, tokenizers.ByteTokenizer()), tmp_path / "base")
    with pytest.raises(atom_jax.AtomError, match="dms is for layers that see everything before them; there is none"):
        start.configure("configs/dms.py:tiny", [f"init_from={tmp_path / 'base'}"])


def test_evictors_need_a_model_that_has_learned_something():
    with pytest.raises(atom_jax.AtomError, match="init_from"):
        dms.tiny().fit.begin(None, None, None, iter([]))
