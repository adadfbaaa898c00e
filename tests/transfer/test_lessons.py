"""Lessons for byteification, the model that it starts from, and what tuning changed put on a Bolmo."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import atom_jax
from atom_jax import params
from atom_jax.__main__ import main
from atom_jax.models import transformer
from atom_jax.models.bolmo import BolmoConfig
from atom_jax.models.transformer import TransformerConfig
from atom_jax.tokenizers import BolmoTokenizer
from atom_jax.transfer import byteify, lessons
from atom_jax.transfer.byteify import Stage1, Weights
from atom_jax.typing import LM, AtomError
from tests.models.tiny_bolmo import model

MAIN = TransformerConfig(
    family="olmo3", vocab_size=435, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=48,
    tie_embeddings=False, max_length=128,
)  # fmt: skip
CFG = BolmoConfig(
    main=MAIN, subwords=435, decoder_layers=1, local_heads=2, local_d_ff=48, capacity=1.0, max_length=128
)
TEXTS = ("Language modeling is a fundamental task in natural language.", "Hello_World! def f(x, y):\n    return x")


def source(seed):
    return LM(MAIN, params.init(jax.random.key(seed), transformer.spec(MAIN)), None)


def tokens(n=24):
    subwords = model().tokenizer.subwords
    rows = [np.tile(np.concatenate([subwords.encode(t), [432]]), 4)[:n] for t in TEXTS]
    return np.stack(rows)


def lesson(tokenizer, rows, length):
    """Rows of subwords [b, k] with the bytes that they stand for."""
    made = tokenizer.spell([row[:-1] for row in rows], rows.shape[1], length)
    return jax.tree.map(jnp.asarray, lessons.assemble(made | {"tokens": rows.astype(np.int32)}))


def test_bytes_and_subwords_say_the_same():
    tokenizer, rows = model().tokenizer, tokens()
    made = lesson(tokenizer, rows, 160)
    ids, lengths = np.asarray(made.bytes.ids), np.asarray(made.lengths)
    for row, tok, size in zip(ids, rows, lengths):
        total = size.sum()
        assert total < 160 and size[0] == 1 and (size > 0).all() and (row[total:] == 0).all()
        text = b"".join(b"" if t == 432 else tokenizer.subwords.pieces[t] for t in tok[:-1].tolist())
        assert tokenizer.decode_bytes(row[:total]) == text
    marks = np.asarray(made.marks)
    expected = np.zeros_like(marks)
    for row, e, size in zip(ids, expected, lengths):
        e[np.cumsum(size) - 1] = True
        e[:-1] &= row[1:] != 1
        e[0] = True
    np.testing.assert_array_equal(marks, expected)
    assert (ids == 1).sum() > 2
    np.testing.assert_array_equal(made.bytes.suffix.ids, tokenizer.suffix_ids(ids))
    counts = np.asarray(made.bytes.loss_mask)
    np.testing.assert_array_equal(counts.sum(1), lengths.sum(1) - 1)
    np.testing.assert_array_equal(np.asarray(made.bytes.targets)[:, :-1][counts[:, :-1]], ids[:, 1:][counts[:, :-1]])
    # Patches for which there is no room are left out whole.
    short = lesson(tokenizer, rows, 20)
    assert (np.asarray(short.lengths).sum(1) <= 20).all()
    np.testing.assert_array_equal(np.asarray(short.lengths)[:, :3], lengths[:, :3])


def test_a_new_bolmo_has_what_its_source_had_and_learns():
    start = source(0)
    p = lessons.begin(jax.random.key(1), start, CFG)
    np.testing.assert_array_equal(p["main"]["attn"]["q"], start.params["layers"]["attn"]["q"])
    np.testing.assert_array_equal(p["subwords"], start.params["embed"])
    table = np.asarray(start.params["embed"])
    np.testing.assert_allclose(p["embed"].std(), table.std(), rtol=0.05)
    # Patches of single bytes look like its embeddings, for bytes other than those that were fitted.
    fitted = lessons._fitted_pool(jax.random.key(9), p, table.mean(0), table.std(0), CFG)
    np.testing.assert_allclose(fitted["w"], p["pool"]["w"], rtol=0.1, atol=0.02)
    inner = start.params | {"layers": None}
    made = lesson(model().tokenizer, tokens(), 160)

    def loss(p):
        return byteify.stage1(p, inner, made, Weights(), cfg=CFG, how=Stage1(depth=1), eos=432)

    inner.pop("layers")
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (before, parts), grads = step(p)
    assert all(bool(jnp.isfinite(x)) for x in parts.values())
    for _ in range(4):
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        p = jax.tree.map(lambda x, g, n=norm: x - 0.1 * g / n, p, grads)
        (after, _), grads = step(p)
    assert after < before - 0.1


def test_what_tuning_changed_is_added(tmp_path, capsys):
    base, tuned = source(0), source(1)
    lm = LM(CFG, lessons.begin(jax.random.key(2), base, CFG), BolmoTokenizer(model().tokenizer.subwords))
    for name, one in (("bolmo", lm), ("base", base), ("tuned", tuned)):
        atom_jax.save_hf(one, tmp_path / name)
    paths = [str(tmp_path / name) for name in ("bolmo", "tuned", "base", "new")]
    assert main(["atom_jax", "instructify", *paths]) == 0
    new = atom_jax.load(paths[-1])
    for ours, theirs in (("main", "layers"), ("norm", "norm")):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.params[ours], tuned.params[theirs])
    np.testing.assert_array_equal(new.params["decoder"]["mlp"]["up"], lm.params["decoder"]["mlp"]["up"])
    half = lessons.add_tuning(lm, tuned, base, 0.5).params["main"]["mlp"]["up"]
    middle = (base.params["layers"]["mlp"]["up"] + tuned.params["layers"]["mlp"]["up"]) / 2
    np.testing.assert_allclose(half, middle, atol=1e-6)
    assert main(["atom_jax", "info", paths[0]]) == 0
    assert "bolmo" in capsys.readouterr().out


def test_models_that_do_not_fit_are_refused():
    other = dataclasses.replace(MAIN, d_ff=64)
    wrong = LM(other, params.init(jax.random.key(0), transformer.spec(other)), None)
    with pytest.raises(AtomError, match="do not have the sizes"):
        lessons.begin(jax.random.key(0), wrong, CFG)
    with pytest.raises(AtomError, match="expected a Bolmo or a transformer, and two transformers"):
        lessons.add_tuning(wrong, wrong, model())
    with pytest.raises(AtomError, match="a model has no tokenizer"):
        lessons.add_tuning(wrong, wrong, wrong)
    with pytest.raises(AtomError, match="has no subwords to spell"):
        lesson(BolmoTokenizer(), tokens(), 64)
    with pytest.raises(AtomError, match="embeds 435 tokens, not 500"):
        lessons.begin(jax.random.key(0), source(0), dataclasses.replace(CFG, subwords=500))
