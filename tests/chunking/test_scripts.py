"""Scripts from the bytes: every sample is recognised at its first letters, everything else inherits."""

import jax
import numpy as np
import pytest

from atom_jax.chunking import scripts
from atom_jax.chunking.scripts import ScriptState
from atom_jax.nn.attention import Tokens

SAMPLES = {
    "latin": "Việt",
    "greek": "Ἑλλάς",
    "cyrillic": "Язык",
    "armenian": "Հայ",
    "hebrew": "שלום",
    "arabic": "سلام",
    "devanagari": "नमस्ते",
    "bengali": "বাংলা",
    "tamil": "தமிழ்",
    "telugu": "తెలుగు",
    "sinhala": "සිංහල",
    "thai": "ภาษา",
    "lao": "ລາວ",
    "tibetan": "བོད",
    "myanmar": "မြန်မာ",
    "georgian": "ქართული",
    "ethiopic": "አማርኛ",
    "khmer": "ខ្មែរ",
    "kana": "かなカナ",
    "han": "漢字",
    "hangul": "한국어",
}
NAMES = tuple(SAMPLES)


def read(text, names):
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)[None]
    tokens = Tokens(np.arange(ids.shape[1], dtype=np.int32)[None], np.ones_like(ids))
    found, _ = jax.jit(scripts.scripts_of, static_argnums=3)(ids, tokens, ScriptState.empty(1), names)
    return np.asarray(found)[0]


def test_every_script_but_the_joint_one_has_a_sample():
    assert set(SAMPLES) | {"indic"} == set(scripts.PREFIXES)


def test_samples():
    """Of a sample, at most the first letter's first byte still belongs to the script before."""
    text = " 12, ".join(SAMPLES.values())
    found = read(text, NAMES)
    at = 0
    for name, sample in SAMPLES.items():
        size = len(sample.encode())
        assert (found[at + 1 : at + size + 5] == NAMES.index(name))[: len(text.encode()) - at].all(), name
        at += size + 5


def test_joint_ranges_and_precedence():
    deva, tamil = SAMPLES["devanagari"], SAMPLES["tamil"]
    assert (read("a" + deva + tamil, ("latin", "indic"))[3:] == 1).all()
    both = read("a" + deva + tamil, ("latin", "devanagari", "indic"))
    size = 1 + len(deva.encode())
    assert (both[3:size] == 1).all() and (both[size + 2 :] == 2).all()


def test_unknown_scripts_are_the_first():
    assert (read("12 漢", ("latin", "greek")) == 0).all()
    assert read("α 漢 1", ("latin", "greek"))[-1] == 1


@pytest.mark.parametrize("special", [256, 259, 263])
def test_special_ids_inherit(special):
    ids = np.array([[0xD0, 0xBA, special, 0xA4, 0x20]], np.int32)
    tokens = Tokens(np.arange(5, dtype=np.int32)[None], np.ones_like(ids))
    found, _ = scripts.scripts_of(ids, tokens, ScriptState.empty(1), ("latin", "cyrillic", "devanagari"))
    assert np.asarray(found)[0].tolist() == [1, 1, 1, 1, 1]
