"""The configuration of a Bolmo, and the parameters that it describes."""

from __future__ import annotations

import dataclasses

from atom_jax import config, params
from atom_jax.chunking.config import Chunking
from atom_jax.chunking.rules import lookahead
from atom_jax.chunking.rules.lookahead import Lookahead
from atom_jax.models import transformer
from atom_jax.models.transformer import TransformerConfig
from atom_jax.nn.mlp import swiglu_spec
from atom_jax.nn.mlstm import mlstm_spec
from atom_jax.params import ParamSpec, Tree, normal, ones, zeros
from atom_jax.typing import AtomError

# Ids from here on are those before it at the end of a patch (`tokenizers.bolmo`).
FUSED = 260


@config.register
@dataclasses.dataclass(frozen=True)
class BolmoConfig:
    """The transformer over patches, and the layers around it that read and write bytes; both have its width."""

    family: str = "bolmo"
    # Layers over patches, of any family and with any memory policy; its embeddings and norm are not used.
    main: TransformerConfig = dataclasses.field(default_factory=lambda: TransformerConfig(family="olmo2"))
    vocab_size: int = 2 * FUSED
    # Rows of the table of suffix subwords; 0: bytes alone.
    subwords: int = 100278
    encoder_layers: int = 1
    decoder_layers: int = 4
    local_heads: int = 16
    local_d_ff: int = 2816
    # Of the norms after the encoder and before the decoder; the others have that of `main`.
    edge_eps: float = 1e-5
    rule: Lookahead = dataclasses.field(default_factory=Lookahead)
    # Patches per byte that there is room for; where there are more, calls are repeated with more room.
    capacity: float = 0.5
    # Positions per block of the mLSTM; changes speed and memory, not results.
    chunk: int = 64
    # Bytes of a text at most.
    max_length: int = 65536
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (1, 1 + FUSED)
    pad_id: int | None = 0
    # Where the subword tokenizer is published.
    subword_tokenizer: str = "allenai/dolma2-tokenizer"
    dtype: str = "float32"
    remat: bool = False
    tie_embeddings: bool = False

    def __post_init__(self):
        config.check(
            self, subwords=(0, 2**28), encoder_layers=(1, 10_000), decoder_layers=(1, 10_000), local_heads=(1, 2**16),
            local_d_ff=(1, 2**24), edge_eps=(0, 1), chunk=(1, 2**20), max_length=(1, 2**31 - 1),
            bos_id=(0, 2**28), eos_ids=(0, 2**28), pad_id=(0, 2**28),
        )  # fmt: skip
        if self.vocab_size != 2 * FUSED:
            raise AtomError(f"vocab_size: a Bolmo has {2 * FUSED} ids, got {self.vocab_size}")
        if self.tie_embeddings:
            raise AtomError("tie_embeddings: a Bolmo's output matrix is never that of its input")
        if min(self.encoder_layers, self.decoder_layers, self.local_d_ff, self.chunk) < 1 or self.subwords < 0:
            raise AtomError("encoder_layers, decoder_layers, local_d_ff and chunk must be at least 1, subwords 0")
        if not 0 < self.capacity <= 1:
            raise AtomError(f"capacity: expected patches per byte in (0, 1], got {self.capacity}")
        if self.dtype not in ("float32", "bfloat16"):
            raise AtomError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        mlstm_spec(self.main.d_model, self.local_heads)

    @property
    def chunking(self) -> tuple[Chunking]:
        """How patches are found, pooled and spread."""
        return (Chunking(self.rule, pool="last", capacity=self.capacity),)

    @property
    def blocks(self) -> TransformerConfig:
        """The layers over patches as they are computed here."""
        return dataclasses.replace(self.main, dtype=self.dtype, remat=self.remat)

    @property
    def local(self) -> tuple[tuple[None, ...], tuple[None, ...]]:
        """The kinds (see `models.layers`) of the layers of encoder and decoder: all are alike."""
        return (None,) * self.encoder_layers, (None,) * self.decoder_layers


def spec(cfg: BolmoConfig) -> Tree:
    """ParamSpec tree; "encoder", "main" and "decoder" are stacked over their layers."""
    d, main = cfg.main.d_model, transformer.spec(cfg.main)["layers"]

    def local(n: int) -> Tree:
        out_scale = (2 * n) ** -0.5
        layer = {
            "norm1": ParamSpec((d,), (None,), ones),
            "mixer": mlstm_spec(d, cfg.local_heads, out_scale),
            "norm2": ParamSpec((d,), (None,), ones),
            "mlp": swiglu_spec(d, cfg.local_d_ff, out_scale),
        }
        return params.stack(layer, n)

    def linear() -> Tree:
        return {"w": ParamSpec((d, d), ("embed", None), normal(d**-0.5)), "b": ParamSpec((d,), (None,), zeros)}

    tree = {
        "embed": ParamSpec((cfg.vocab_size, d), ("vocab", "embed"), normal(0.02)),
        "encoder": local(cfg.encoder_layers),
        "encoder_norm": ParamSpec((d,), (None,), ones),
        "rule": lookahead.spec(cfg.rule, d),
        "pool": linear(),
        "main": main,
        "patch_norm": ParamSpec((d,), (None,), ones),
        "residual": linear(),
        "decoder": local(cfg.decoder_layers),
        "norm": ParamSpec((d,), (None,), ones),
        "unembed": ParamSpec((d, cfg.vocab_size), ("embed", "vocab"), normal(d**-0.5)),
    }
    if cfg.subwords:
        tree["subwords"] = ParamSpec((cfg.subwords, d), ("vocab", "embed"), normal(0.02))
    return tree


def roomier(cfg: BolmoConfig) -> BolmoConfig | None:
    """The same model with room for more patches, or None where every byte has one."""
    return None if cfg.capacity == 1 else dataclasses.replace(cfg, capacity=min(1.0, 2 * cfg.capacity))
