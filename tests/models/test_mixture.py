"""Two models as one: what it says is the mixture of what they say."""

import dataclasses

import jax
import numpy as np
import pytest

import atom_jax
from atom_jax import params, tokenizers
from atom_jax.__main__ import main
from atom_jax.checkpoint import store
from atom_jax.inference.score import logprobs
from atom_jax.kvcache import policies
from atom_jax.models import mixture, transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.typing import LM, AtomError

TINY = TransformerConfig(
    d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_length=64, bos_id=256
)
OTHER = dataclasses.replace(TINY, family="qwen3", d_model=24, n_layers=1, tie_embeddings=False)


def drawn(cfg, seed):
    tree = params.init(jax.random.key(seed), transformer.spec(cfg))
    return LM(cfg, jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, tree), tokenizers.from_name("bytes"))


@pytest.fixture(scope="module")
def both():
    return drawn(TINY, 0), drawn(OTHER, 1)


def said(lm, ids):
    return np.asarray(jax.nn.softmax(atom_jax.apply(lm, ids).logits, axis=-1))


@pytest.mark.parametrize(("weight", "temperature"), [(0.25, 1.0), (0.7, 2.5), (0.0, 1.0), (1.0, 0.5)])
def test_a_token_is_drawn_from_either_with_its_share(both, weight, temperature):
    ids = np.random.default_rng(0).integers(0, 256, (2, 12))
    found = atom_jax.apply(mixture.of(*both, weight, temperature), ids).logits
    own, logits = said(both[0], ids), atom_jax.apply(both[1], ids).logits
    other = np.asarray(jax.nn.softmax(logits / temperature, axis=-1))
    np.testing.assert_allclose(np.exp(found), (1 - weight) * own + weight * other, atol=1e-5)
    assert np.abs(own - other).max() > 0.1


def test_what_is_written_and_scored_is_the_mixtures(both):
    lm = mixture.of(*both, 0.5)
    prompt = [256, 73, 116]
    made = atom_jax.generate(lm, [prompt], 8, stop_ids=()).ids[0]
    whole = np.array([prompt + made])
    assert atom_jax.apply(lm, whole).logits[0, 2:-1].argmax(-1).tolist() == made
    assert made != atom_jax.generate(both[0], [prompt], 8, stop_ids=()).ids[0]
    found = logprobs(lm, whole)
    expected = np.log(0.5 * said(both[0], whole) + 0.5 * said(both[1], whole))
    np.testing.assert_allclose(
        np.asarray(found)[0], np.take_along_axis(expected[0, :-1], whole[0, 1:, None], -1)[:, 0], atol=1e-4
    )


def test_mix_writes_a_model_that_is_read_as_any_other(both, tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("model", "decoder", "both")]
    for path, lm in zip(paths, both):
        store.save_model(path, lm)
    assert main(["", "mix", *paths, "--weight=0.4", "--temperature=2"]) == 0
    lm = atom_jax.load(paths[2])
    assert lm.config == mixture.of(*both, 0.4, 2.0).config
    assert main(["", "info", paths[2]]) == 0
    assert "0.4 of the mixture at temperature 2" in capsys.readouterr().out
    assert main(["", "mix", *paths]) == 1
    assert "both" in capsys.readouterr().err
    assert main(["", "mix", *paths[:2], str(tmp_path / "new"), "--weight=2"]) == 1
    assert "weight" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_what_does_not_go_together_is_refused(both):
    lm, decoder = both
    with pytest.raises(AtomError, match="decoder: it has 300 ids, the model that it is mixed with 264"):
        mixture.of(lm, dataclasses.replace(decoder, config=dataclasses.replace(OTHER, vocab_size=300)))
    words = tokenizers.from_name("bolmo")
    with pytest.raises(AtomError, match="stand for other texts"):
        mixture.of(lm, dataclasses.replace(decoder, tokenizer=words))
    kept = dataclasses.replace(TINY, memory=policies.POLICIES["tova"](budget=8))
    with pytest.raises(AtomError, match="without a cache policy"):
        mixture.of(dataclasses.replace(lm, config=kept), decoder)
    with pytest.raises(AtomError, match="of two transformers, and this is a mixture"):
        mixture.of(mixture.of(*both), decoder)
