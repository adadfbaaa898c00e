"""Retrofits with learned evictors: the recipes are complete, and the smallest one runs from fit to adapter."""

import json

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params, tokenizers
from atom_jax.models import registry, transformer
from atom_jax.training import loop, optim, start
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


@pytest.mark.parametrize("variant", ["tiny", "tiny_merged"])
def test_a_retrofit_from_fit_to_adapter(tmp_path, variant):
    cfg = transformer.TransformerConfig(
        vocab_size=264,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        d_ff=48,
        bos_id=256,
        eos_ids=(257,),
    )
    base = LM(cfg, params.init(jax.random.key(0), transformer.spec(cfg)), tokenizers.from_name("bytes"))
    atom_jax.save_hf(base, tmp_path / "base")
    exp = start.configure(f"configs/dms.py:{variant}", [f"init_from={tmp_path / 'base'}"])
    result = loop.fit(exp, tmp_path / "run")
    assert result.step == exp.train.steps and {"kl", "agreement", "held"} <= set(result.validation)
    lm = atom_jax.load(tmp_path / "run")
    for name, x in params.flatten(base.params).items():
        np.testing.assert_array_equal(params.flatten(lm.params)[name], x)
    atom_jax.save_adapter(lm, tmp_path / "adapter")
    again = atom_jax.load(tmp_path / "base", adapter=str(tmp_path / "adapter"))
    assert again.config.memory == exp.memory
    text = [list(np.random.default_rng(0).integers(0, 256, 200))]
    got = [atom_jax.generate(one, text, max_new_tokens=4) for one in (lm, again)]
    assert got[0].ids == got[1].ids
    assert got[0].stats["kv_entries_peak"] < 200
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("kl" in line for line in lines)


def test_evictors_need_a_model_that_has_learned_something():
    with pytest.raises(atom_jax.AtomError, match="init_from"):
        dms.tiny().fit.begin(None, None, None, iter([]))
