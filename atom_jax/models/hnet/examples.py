"""Small models that cover every boundary rule, pool, mixing, upsampling and residual."""

from __future__ import annotations

from typing import Any

from atom_jax.chunking.bytemodel import ByteModel
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules.cosine import Cosine
from atom_jax.chunking.rules.entropy import Entropy
from atom_jax.chunking.rules.fixed import Fixed
from atom_jax.chunking.rules.predictor import Predictor
from atom_jax.chunking.rules.spaces import Spaces
from atom_jax.chunking.rules.symbol import Symbol
from atom_jax.models.hnet.config import HNetConfig
from atom_jax.nn.ssd import Mamba2Config

_BYTES = ByteModel(d_model=16, n_layers=1, n_heads=2, d_ff=16, window=4)
_SCRIPTS = Predictor(scripts=("latin", "cyrillic"), priors=(0.3, 0.2))
_HNET = {"rule": Cosine(target=2.0), "mix": "ema", "confidence": True}


def small(
    *chunking: dict[str, Any],
    layout: tuple[str, ...] = ("m1", "T1", "m1"),
    d: tuple[int, ...] = (16, 16),
    window: tuple[int, ...] = (5, -1),
) -> HNetConfig:
    """A model of these widths whose stages find their units so."""
    n = len(d)
    return HNetConfig(
        vocab_size=264, layout=layout, d_model=d, d_intermediate=(24,) * n, n_heads=(2,) * n, rotary_dim=(4,) * n,
        window=window, ssm=Mamba2Config(d_state=8, head_dim=16, chunk=4), bos_id=256, eos_ids=(), init_std=0.3,
        chunking=tuple(Chunking(**{"capacity": 1.0} | c) for c in chunking), max_length=512,
    )  # fmt: skip


_TWO = {"d": (16, 16, 24), "window": (5, 3, -1)}


def examples() -> dict[str, HNetConfig]:
    """See `Family`."""
    return {
        "hnet": small(_HNET | {"pack": True}),
        "hnet-2": small(_HNET, _HNET, layout=("m1", "T1m1", "T2", "m1T1", "m1"), **_TWO),
        "gumbel": small(
            {"rule": Predictor(), "pool": "mean", "residual": "identity", "norm": True, "pack": True},
            layout=("x1", "x2", "x1"),
        ),
        "magnet": small({"rule": _SCRIPTS, "pool": "max", "mix": "ema"}, layout=("t1", "M1", "t1")),
        "unigram": small(
            {"rule": Predictor(supervision="marks"), "pool": "last", "residual": "none", "confidence": True}
        ),
        "spikes": small({"rule": Predictor(supervision="entropy"), "pool": "mean"}, layout=("T1", "M2", "T1")),
        "words": small(
            {"rule": Spaces(), "pool": "attention", "slots": 2, "heads": 2, "upsample": "cross_attention"},
            layout=("t1", "T1", "t1"), d=(16, 24),
        ),
        "spacebyte": small(
            {"rule": Spaces(style="spacebyte"), "pool": "attention", "heads": 2, "residual": "identity"}
        ),
        "blt": small(
            {"rule": Entropy(threshold=1.0, model=_BYTES), "pool": "max", "upsample": "cross_attention", "heads": 2},
            layout=("t1", "T1", "t1"),
        ),
        "blt-both": small(
            {"rule": Entropy(mode="both", threshold=0.7, max_length=3, model=_BYTES),
             "pool": "concat", "max_positions": 2}
        ),
        "megabyte": small(
            {"rule": Fixed(3), "pool": "concat", "max_positions": 3, "upsample": "slots", "pack": True}, d=(16, 24)
        ),
        "fixed-gumbel": small(
            {"rule": Fixed(2, phase="dynpool"), "pool": "mean"}, {"rule": Predictor(), "pool": "max", "mix": "ema"},
            layout=("m1", "t1", "T1", "m1", "t1"), **_TWO,
        ),
        "hat": small({"rule": Symbol(id=259), "pool": "attention", "heads": 2, "upsample": "slots"}),
        "words-hnet": small(
            {"rule": Spaces(), "pool": "mean", "pack": True}, _HNET | {"pack": True},
            layout=("m1", "m1", "T1", "m1", "t1"), **_TWO,
        ),
    }  # fmt: skip
