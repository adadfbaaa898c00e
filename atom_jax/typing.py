"""Types that every part of the package shares.

Dimension letters used in tensor names everywhere: b batch, t query (or token) length, s key length,
l layers, d model width, f MLP width, v vocabulary, h key/value heads, g query heads per key/value head,
n query heads (h * g), k head size.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
from flax import struct

_LONGEST = 299  # characters of a message


class AtomError(ValueError):
    """Bad input. The message is one sentence that names the file, the tensor or the flag at fault.

    It stays under 300 characters whatever was put in: of long words, then of the message, the middle is left out.
    """

    def __init__(self, message: object):
        text = " ".join(str(message).splitlines())
        if len(text) > _LONGEST:
            text = re.sub(r"\S{81,}", lambda word: f"{word[0][:50]}...{word[0][-25:]}", text)
        if len(text) > _LONGEST:
            text = f"{text[:200]} ... {text[-90:]}"
        super().__init__(text)


@struct.dataclass
class Suffix:
    """The subwords that end at each position (Bolmo): ids i32 [b, t] of the longest ones, and state i32 [b] of the
    automaton that finds them (`tokenizers.suffix`) after the last real position of every row."""

    ids: jax.Array
    state: jax.Array


@struct.dataclass
class Batch:
    """A batch of token sequences, possibly several packed documents per row.

    ids:       i32 [b, t] token ids.
    positions: i32 [b, t] position of each token inside its own document.
    segments:  i32 [b, t] document number within the row, from 1; 0 marks padding.
    targets:   i32 [b, t] next-token ids, or None outside training.
    loss_mask: bool [b, t] True where the target counts, or None.
    marks:     bool [b, t] unit ends that the data supplies (DataConfig.marks), or None.
    suffix:    Suffix, or None for models that don't look at subwords.
    loss_weights: f32 [b, t] how many times a target counts, where it does, or None: once each.
    """

    ids: jax.Array
    positions: jax.Array
    segments: jax.Array
    targets: jax.Array | None = None
    loss_mask: jax.Array | None = None
    marks: jax.Array | None = None
    suffix: Suffix | None = None
    loss_weights: jax.Array | None = None


# What a kind of model is about.
TEXTS, FRAMES, IMAGES = "texts", "frames", "images"


@struct.dataclass
class Frames:
    """A batch of streams of frames. Position t carries frame o_t and action a_t, which leads to o_{t+1}; the targets
    of a model of the world are o_{t+1}, and the reward and the end of the step between them.

    obs:       u8 [b, t, *grid] classes, or f32 [b, t, height, width, channels] in [0, 1]; inside of a model what its
               port reads of them (`models.hnet.ports`).
    action:    i32 [b, t], or f32 [b, t, a].
    reward:    f32 [b, t] of the step that begins at the position.
    done:      bool [b, t] True where that step ends the episode; the frames after it stand still.
    positions: i32 [b, t] position of each frame inside its own episode.
    segments:  i32 [b, t] episode number within the row, from 1; 0 marks padding.
    marks:     bool [b, t] frames with something that the ones before don't tell, as the data knows; or None.
    """

    obs: jax.Array
    action: jax.Array
    reward: jax.Array
    done: jax.Array
    positions: jax.Array
    segments: jax.Array
    marks: jax.Array | None = None


@struct.dataclass
class Output:
    """What a model returns: logits f32 [b, t, v], and `aux`, the named quantities that it learned or measured."""

    logits: jax.Array
    aux: dict[str, Any] = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, repr=False)
class LM:
    """A model ready to use: its configuration, its parameters (a pytree) and its tokenizer."""

    config: Any
    params: Any
    tokenizer: Any
    # What is made of it once and serves for long (`session.laid_out`). Copies with other fields begin without it.
    kept: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        dtypes = ", ".join(dict.fromkeys(str(getattr(x, "dtype", "?")) for x in leaves)) or "none"
        count = sum(getattr(x, "size", 0) for x in leaves)
        ids = "none" if self.tokenizer is None else f"{self.tokenizer.vocab_size:,} ids"
        return f"LM({getattr(self.config, 'family', '?')}: {count:,} parameters ({dtypes}), tokenizer: {ids})"

    @property
    def family(self) -> str:
        """Name of the model family, for example "llama"."""
        return self.config.family
