"""Cache policies in a model: generation, the command line, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import config, params
from atom_jax.__main__ import main
from atom_jax.kvcache import memory, policies
from atom_jax.kvcache.budget import Budget
from atom_jax.kvcache.dms import DMS
from atom_jax.kvcache.policies import parse
from atom_jax.kvcache.snapkv import SnapKV
from atom_jax.kvcache.tova import TOVA
from atom_jax.models import transformer
from atom_jax.models.registry import with_memory
from atom_jax.session.decode import decode
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError, Batch

ROWS = [list(range(3, 60)), list(range(60, 40, -1)), [7]]


def build(memory=None):
    cfg = transformer.TransformerConfig(
        d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=48, max_length=512, memory=memory
    )
    return LM(cfg, params.init(jax.random.key(3), transformer.spec(cfg)), ByteTokenizer())


@pytest.fixture(scope="module")
def lm():
    return build()


@pytest.mark.parametrize("text", ["tova:budget=16", "quest:budget=16"])
def test_generation_keeps_to_the_policy_and_compiles_once(lm, text):
    before = decode._cache_size()
    got = atom_jax.generate(with_memory(lm, parse(text)), ROWS, 24)
    assert decode._cache_size() == before + 1
    assert all(len(ids) == 24 for ids in got.ids)
    dense = sum(len(row) + i for row in ROWS for i in range(1, 24))
    assert got.stats["kv_reads"] < dense
    if text.startswith("tova"):
        # The shortest row holds 2, 3, ... entries at first.
        assert got.stats["kv_reads"] == 2 * 23 * 16 + sum(min(1 + i, 16) for i in range(1, 24))
        assert got.stats["kv_bytes"] < 3 * 2 * 2 * 16 * (2 * 16 * 4 + 8) + 200


def test_buffers_grow_while_text_is_made(lm):
    dense = atom_jax.generate(lm, ROWS, 220)
    got = atom_jax.generate(with_memory(lm, parse("knorm:budget=400")), ROWS, 220)
    assert got.ids == dense.ids


def test_the_whole_model_reads_a_prompt_a_token_and_a_turn(lm):
    """Stacked layers, with room for everything: what the dense cache computes."""
    outs = []
    apply = jax.jit(transformer.apply, static_argnames="cfg")
    for policy in (None, parse("pyramidkv:budget=1000,window=8")):
        cfg = dataclasses.replace(lm.config, memory=policy)
        cache, at, logits = transformer.init_cache(cfg, 1, 48), 0, []
        for t in (30, 1, 9):
            positions = jnp.arange(at, at + t)[None]
            batch = Batch(positions + 5, positions, jnp.ones((1, t), jnp.int32))
            cache = memory.grow(cache, 9) if t == 9 else cache
            out, cache = apply(lm.params, batch, cfg=cfg, cache=cache)
            logits.append(out.logits)
            at += t
        outs.append(jnp.concatenate(logits, 1))
        assert [float(x[0]) for x in memory.use(cache)] == [40, 40]
    np.testing.assert_allclose(outs[0], outs[1], atol=1e-5)


def test_policies_are_read_and_restored():
    assert parse("none") is None
    assert parse("tova:budget=512") == TOVA(budget=512)
    assert parse("snapkv:ratio=0.25,window=32,sinks=2") == SnapKV(ratio=0.25, window=32, sinks=2)
    for cls in policies.POLICIES.values():
        if issubclass(cls, Budget):
            p = cls(budget=32)
            cfg = dataclasses.replace(build().config, memory=p)
            assert config.from_json(transformer.TransformerConfig, config.to_json(cfg)) == cfg


@pytest.mark.parametrize(
    "text, says",
    [
        ("tofa:budget=3", "'tofa'"),
        ("tova", "neither"),
        ("tova:budget=4,ratio=0.5", "budget 4 and ratio 0.5"),
        ("tova:budget=-4", "budget -4"),
        ("tova:ratio=1.5", "ratio 1.5"),
        ("tova:window=4", "'window'"),
        ("tova:budget", "NAME=VALUE"),
        ("tova:budget=many", "not an integer"),
        ("snapkv:budget=4,pool=4", "odd pool"),
        ("adakv:budget=4,floor=2", "floor"),
        ("pyramidkv:budget=4,beta=0.5", "beta"),
        ("quest:budget=4,page=0", "page"),
        ("expected_attention:budget=4,future=0", "future"),
    ],
)
def test_unusable_texts_are_refused(text, says):
    with pytest.raises(AtomError, match=says):
        parse(text)


def test_learned_evictors_stay_only_under_their_policy(lm):
    learned = build(DMS())
    assert "dms" in learned.params["layers"]["attn"]
    for policy in (None, TOVA(budget=16)):
        got = with_memory(learned, policy)
        assert got.config == dataclasses.replace(lm.config, memory=policy)
        assert jax.tree.structure(got.params) == jax.tree.structure(lm.params)
    assert "dms" in with_memory(learned, DMS(window=8)).params["layers"]["attn"]
    with pytest.raises(AtomError, match="no trained parameters for dms"):
        with_memory(lm, DMS())


def test_the_command_line(lm, tmp_path, capsys):
    atom_jax.save_hf(lm, tmp_path / "model")
    flags = ["atom_jax", "generate", f"--checkpoint={tmp_path / 'model'}", "--prompt=abcdefghijklmnopqrst"]
    flags += ["--max_new_tokens=8", "--stats"]
    assert main([*flags, "--memory=h2o:budget=8"]) == 0
    # 7 later tokens, each of which reads 8 entries.
    assert "kv_reads            56.000" in " ".join(capsys.readouterr().err.split("\n"))
    assert main([*flags, "--memory=h2o"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: --memory h2o") and err.count("\n") == 1
    assert main(["atom_jax", "generate", "--help"]) == 0
    assert "--memory" in capsys.readouterr().out
