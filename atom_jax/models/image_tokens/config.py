"""The configuration of a tokenizer of images, and the parameters that it describes."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from atom_jax import config
from atom_jax.models.image_tokens.lengths import Length, Nested, vectors
from atom_jax.models.image_tokens.quantise import FSQ, QUANTISERS
from atom_jax.nn import vit
from atom_jax.params import Tree, stack
from atom_jax.typing import AtomError


@config.register
@dataclasses.dataclass(frozen=True)
class ImageTokensConfig:
    """Square images, the transformers that make tokens of them and images of tokens, and how many there are."""

    family: str = "image_tokens"
    # Pixels along a side of an image and of a patch.
    size: int = 16
    patch: int = 4
    # 1 for gray, 3 for colours.
    channels: int = 1
    # Tokens of an image, at most.
    registers: int = 16
    d_model: int = 48
    d_ff: int = 192
    n_heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    # Who sees whom in the encoder: "full", or "causal_registers": patches see patches, and registers also those
    # before them.
    mask: str = "causal_registers"
    # FSQ, VQ or Continuous.
    quantiser: Any = dataclasses.field(default_factory=FSQ)
    # How the number of tokens varies: Whole, Nested, Told, Rounds or Halting.
    length: Any = dataclasses.field(default_factory=Nested)
    norm_eps: float = 1e-5
    # Compute dtype; norms, softmax, quantisation and outputs are float32 in any case.
    dtype: str = "float32"

    # An image is read as a row of bytes.
    vocab_size: ClassVar[int] = 256

    def __post_init__(self):
        many = (1, 2**16)
        config.check(
            self, size=many, patch=many, registers=many, d_model=many, d_ff=(1, 2**20), n_heads=many,
            encoder_layers=many, decoder_layers=many, channels=(1, 3), norm_eps=(0, 1),
        )  # fmt: skip
        if self.channels == 2:
            raise AtomError("channels: expected 1 (gray) or 3 (colours), got 2")
        if self.size % self.patch:
            raise AtomError(f"patch: {self.patch} does not divide size {self.size}")
        if self.d_model % self.n_heads:
            raise AtomError(f"n_heads: {self.n_heads} do not divide d_model {self.d_model}")
        if self.mask not in ("full", "causal_registers"):
            raise AtomError(f"mask: expected full or causal_registers, got {self.mask!r}")
        if self.dtype not in ("float32", "bfloat16"):
            raise AtomError(f"dtype: expected float32 or bfloat16, got {self.dtype!r}")
        if not isinstance(self.quantiser, QUANTISERS):
            known = ", ".join(cls.__name__ for cls in QUANTISERS)
            raise AtomError(f"quantiser: expected one of {known}, got {self.quantiser!r}")
        if not isinstance(self.length, Length):
            raise AtomError(f"length: expected Whole, Nested, Told, Rounds or Halting, got {self.length!r}")
        self.length.check(self)

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.size // self.patch) ** 2

    @property
    def numbers(self) -> int:
        """Numbers of a patch."""
        return self.patch**2 * self.channels

    @property
    def max_length(self) -> int:
        """Bytes of an image."""
        return self.size**2 * self.channels


def spec(cfg: ImageTokensConfig) -> Tree:
    """ParamSpec tree: encoder, decoder, and quantiser where it learns."""
    d, p, r, more = cfg.d_model, cfg.patches, cfg.registers, cfg.length.spec(cfg)

    def layers(n: int) -> Tree:
        return stack(vit.block_spec(d, cfg.d_ff, cfg.n_heads, (2 * n) ** -0.5), n)

    encoder = {
        "patch": vit.affine_spec(cfg.numbers, d), "positions": vectors(p, d), "registers": vectors(r, d),
        "first_norm": vit.norm_spec(d), "blocks": layers(cfg.encoder_layers), "last_norm": vit.norm_spec(d),
        "outlet": vit.affine_spec(d, cfg.quantiser.width),
    }  # fmt: skip
    decoder = {
        "inlet": vit.affine_spec(cfg.quantiser.width, d), "registers": vectors(r, d), "mask": vectors(d),
        "positions": vectors(p, d), "first_norm": vit.norm_spec(d), "blocks": layers(cfg.decoder_layers),
        "last_norm": vit.norm_spec(d), "up": vit.affine_spec(d, 2 * d), "down": vit.affine_spec(2 * d, cfg.numbers),
    }  # fmt: skip
    tree = {"encoder": encoder | more.get("encoder", {}), "decoder": decoder | more.get("decoder", {})}
    return tree | ({"quantiser": learned} if (learned := cfg.quantiser.spec()) else {})
