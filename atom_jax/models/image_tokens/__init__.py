"""Tokenizers of images whose codes are a row, not a grid, and as many as an image needs.

A transformer reads the patches of an image and some learned registers; what it makes of the registers is quantised,
and a second transformer makes the image of the codes. `length` says how their number varies:

    Whole    all of them, always: the baseline
    Nested   any first k of them, the encoder doesn't know which (FlexTok)
    Told     any first k of them, and the encoder knows (ElasticTok)
    Rounds   some more in every round, until the image is good enough (ALIT)
    Halting  those that the encoder finds necessary for an error that is given (KARL)

Losses are squared errors of pixels, and the decoder is deterministic: perceptual losses, GANs and FlexTok's flow
decoder are not built.
"""

from atom_jax.models.image_tokens.config import ImageTokensConfig, spec
from atom_jax.models.image_tokens.family import FAMILY, operations
from atom_jax.models.image_tokens.forward import decode, encode, image, pictured, quantise
from atom_jax.models.image_tokens.halting import Halting
from atom_jax.models.image_tokens.lengths import Choices, Nested, Told, Trained, Whole
from atom_jax.models.image_tokens.quantise import FSQ, VQ, Continuous
from atom_jax.models.image_tokens.rounds import Rounds

__all__ = [
    "FAMILY", "FSQ", "VQ", "Choices", "Continuous", "Halting", "ImageTokensConfig", "Nested", "Rounds", "Told",
    "Trained", "Whole", "decode", "encode", "image", "operations", "pictured", "quantise", "spec",
]  # fmt: skip
