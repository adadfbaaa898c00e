"""Planted facts of a seed stay what they are: figures of different versions are about the same questions."""

import hashlib

import numpy as np

from atom_jax.data.builtin import novels
from atom_jax.evaluation.encode import Encoder
from atom_jax.evaluation.tasks import needle, planted
from atom_jax.tokenizers import ByteTokenizer

BYTES = Encoder(ByteTokenizer(), 1 << 20, False)


def test_streams_and_needles_of_a_seed():
    hay = needle.Haystack.of(novels()["emma"], BYTES)
    later = needle.Haystack(hay.ids[5000:], hay.ends[5000:])
    found = hashlib.sha256(hay.ids.tobytes() + hay.ends.tobytes())
    for seed in range(8):
        every = planted.facts((), 33, np.random.default_rng((seed, 3)))
        some = planted.facts(("update", "code", "number"), 12, np.random.default_rng((seed, 4)))
        for stream in (planted.plant(hay, every, 9000, BYTES), planted.plant(later, some, 4000, BYTES)):
            said = repr([tuple(fact) for fact in stream.facts])
            arrays = (stream.ids, stream.wanted, stream.at)
            found.update(said.encode() + b"".join(x.tobytes() for x in arrays))
        one = needle.build(hay, BYTES, 1024, 0.3, (seed, 1))
        found.update(one.ids.tobytes() + one.answer.tobytes())
    assert found.hexdigest() == "8f552edae0781671b51220d57cc1b1f40a3aa2ee61b2dfcdc30f405f2e4897cb"
