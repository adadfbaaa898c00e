"""The form of DMS that keeps what separates parts of a text (SepLLM), against its mask written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.kvcache.dms import DMS
from atom_jax.kvcache.policies import parse
from atom_jax.kvcache.separators import separators
from atom_jax.models import transformer
from atom_jax.models.registry import with_memory
from atom_jax.nn.attention import NEGATIVE
from atom_jax.params import init
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError
from tests.kvcache.dms.test_serve import batch_of, held, read_in, whole

MEMORY = DMS("separators", window=5, sinks=2, separators=(1, 2, 3), page=4)


def build(memory=MEMORY, vocab_size=12):
    cfg = transformer.TransformerConfig(
        vocab_size=vocab_size, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=48, memory=memory
    )
    return cfg, init(jax.random.key(0), transformer.spec(cfg))


def test_the_mask_is_the_papers():
    """Query q sees key i where i is one of the first, separates, or is less than n = 6 tokens back."""
    cfg, params = build()
    ids = np.random.default_rng(0).integers(0, 12, (2, 40))
    assert "dms" not in params["layers"]["attn"]
    _, aux = whole(params, batch_of(ids), cfg=cfg)
    at = np.arange(40)
    stays = np.isin(ids, (1, 2, 3)) | (at < 2)
    np.testing.assert_array_equal(aux["evict"], np.broadcast_to(~stays[None, :, None], (2, 2, 2, 40)))

    def probe(p, heads, call):
        seen = cfg.memory.train(call)
        far = at[:, None] - at[None] > seen.keep_window
        return jnp.where(far[None, None], seen.keep[:, :, None], 0.0) > NEGATIVE / 2

    run = jax.jit(lambda params: transformer.hidden(params, batch_of(ids), cfg=cfg, probe=probe)[2]["probe"])
    expected = stays[:, None] | (at[:, None] - at[None] < 6)[None]
    np.testing.assert_array_equal(run(params), np.broadcast_to(expected[None, :, None], (2, 2, 2, 40, 40)))


@pytest.mark.parametrize("size", [40, 7])
def test_what_is_held_and_read(size):
    cfg, params = build()
    ids = np.random.default_rng(1).integers(0, 12, (2, 40))
    expected, _ = whole(params, batch_of(ids), cfg=cfg)
    out, cache = read_in(params, ids, size, cfg=cfg)
    np.testing.assert_allclose(out, expected, atol=1e-4)
    early = np.isin(ids[:, 2:34], (1, 2, 3)).sum(1)
    np.testing.assert_array_equal(held(cache, cfg), np.broadcast_to((2 + early + 6)[None, :, None], (2, 2, 2)))


def test_separators_are_found_in_the_tokenizer():
    found = separators(ByteTokenizer())
    assert found == tuple(sorted(b"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f !,.:;?"))
    cfg, params = build(None, ByteTokenizer.vocab_size)
    lm = LM(cfg, params, ByteTokenizer())
    assert with_memory(lm, parse("dms:form=separators,window=5")).config.memory.separators == found
    got = with_memory(lm, parse("none;1=sepllm:budget=40")).config.memory
    assert got.at[0][1].separators == found
    cfg, params = build(DMS("separators"))
    with pytest.raises(AtomError, match="separators are missing"):
        whole(params, batch_of(np.zeros((1, 4))), cfg=cfg)
