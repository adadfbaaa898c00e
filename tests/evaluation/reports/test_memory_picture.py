import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

import atom_jax
from atom_jax import params
from atom_jax.__main__ import main
from atom_jax.evaluation.reports import memory_picture
from atom_jax.evaluation.tasks import planted
from atom_jax.kvcache.dms import DMS
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM, AtomError
from tests.evaluation.conftest import CONFIG

TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife."


@pytest.fixture(scope="module")
def evictor():
    """Three layers of two heads, which evict about half of all keys after a window of 6."""
    cfg = dataclasses.replace(
        CONFIG, n_layers=3, n_kv_heads=2, max_length=128, memory=DMS(window=6, scale=1.0, offset=0.0, sinks=2)
    )
    tree = params.init(jax.random.key(0), transformer.spec(cfg))
    alpha = tree["layers"]["attn"]["dms"]["alpha"]
    tree["layers"]["attn"]["dms"]["alpha"] = jax.random.normal(jax.random.key(1), alpha.shape)
    tree["embed"] = tree["embed"] * 20
    return LM(cfg, tree, ByteTokenizer())


@pytest.fixture(scope="module")
def memory(evictor):
    return memory_picture.read(evictor, TEXT)


def test_agrees_with_what_the_model_reports(evictor, memory):
    ids = [[evictor.tokenizer.bos_id, *TEXT.encode()]]
    aux = atom_jax.apply(evictor, ids).aux
    np.testing.assert_array_equal(memory.evict, aux["evict"][:, 0])
    np.testing.assert_array_equal(memory.held, aux["occupancy"][:, 0])
    assert 0.2 < memory.evict.mean() < 0.8 and memory.evict.shape == (3, 2, len(TEXT) + 1)
    assert memory.labels[:4] == ("<front>", "I", "t", " ")
    # Entries over time are those of the text that ends there.
    over_time = memory.over_time()
    np.testing.assert_array_equal(over_time[:, :, -1], memory.held)
    for t in (1, 7, 8, 30):
        mask = np.arange(len(ids[0]))[None] < t
        np.testing.assert_array_equal(
            over_time[:, :, t - 1], atom_jax.apply(evictor, ids, mask).aux["occupancy"][:, 0]
        )


def test_summary(memory):
    lines = memory_picture.summary(memory).splitlines()
    held = memory.held
    assert lines[0] == "85 tokens read"
    assert lines[1].startswith(f"entries per head: min {held.min()}, mean {held.mean():.1f}, max {held.max()} (")
    layer, head = np.unravel_index(held.argmin(), held.shape)
    assert lines[3].split(": ")[1] == f"layer {layer} head {head}" and lines[3].startswith("least retentive")
    counts = [int(line.split()[0]) for line in lines[5:]]
    assert len(counts) == 20 and counts == sorted(counts, reverse=True) and counts[0] == 6
    # The sinks are kept by all.
    assert lines[5].split() == ["6", "position", "0", "<front>"]


def test_short_and_long_texts(evictor, tmp_path):
    short = memory_picture.read(evictor, "It is")
    assert (short.held == 6).all()
    assert "every token is still within the window of 6 tokens" in memory_picture.summary(short)
    long = memory_picture.read(evictor, TEXT * 3)
    assert long.evict.shape[2] == 128
    assert memory_picture.summary(long).startswith(f"128 tokens read, the first of {3 * len(TEXT) + 1}")
    memory_picture.draw(short, tmp_path / "short.png")


def test_planted_facts(evictor, tmp_path):
    found = memory_picture.read(evictor, TEXT * 4, facts=1)
    (fact,) = planted.facts((), 1, np.random.default_rng(0))
    assert len(found.labels) == 128 and "".join(found.labels).count(fact.answer) == 1
    assert "".join(label for label, said in zip(found.labels, found.answers) if said) == fact.answer
    line = next(x for x in memory_picture.summary(found).splitlines() if x.startswith("what planted facts say"))
    old = found.answers.copy()
    old[128 - 1 - found.window :] = False
    share = 100 * (~found.evict)[:, :, old].mean()
    assert f"{old.sum()} tokens beyond the window: kept by {share:.0f}% of" in line
    memory_picture.draw(found, tmp_path / "facts.png")
    with Image.open(tmp_path / "facts.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (pixels == [0xD5, 0x5E, 0x00]).all(1).sum() > 10
    with pytest.raises(AtomError, match="9 facts in 84 tokens"):
        memory_picture.read(evictor, TEXT, facts=9)


def test_picture(memory, tmp_path):
    memory_picture.draw(memory, tmp_path / "memory.png")
    with Image.open(tmp_path / "memory.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for color in ([0x00, 0x72, 0xB2], [0xB9, 0xD6, 0xEA]):
        assert (pixels == color).all(1).sum() > 1000
    with pytest.raises(AtomError, match="cannot be written"):
        memory_picture.draw(memory, tmp_path / "no" / "memory.png")


def test_command(evictor, lm, tmp_path, capsys, monkeypatch):
    models = {"dms": evictor, "plain": lm, "bare": dataclasses.replace(evictor, tokenizer=None)}
    monkeypatch.setattr("atom_jax.checkpoint.load", lambda path, adapter=None: models[path])
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "memory.png"

    def call(*arguments):
        code = main(["atom_jax", "memory", *arguments])
        return code, *capsys.readouterr()

    code, text, _ = call("--checkpoint=dms", f"--file={tmp_path}/text.txt", f"--out={out}", "--tokens=50")
    assert code == 0 and text.startswith("50 tokens read") and out.stat().st_size > 1000
    for arguments, message in (
        (("--checkpoint=plain", f"--text={TEXT}"), "the model has no learned evictors"),
        (("--checkpoint=bare", f"--text={TEXT}"), "no tokenizer"),
        (("--checkpoint=dms", "--text="), "the text is empty"),
        (("--checkpoint=dms",), "--text or --file is missing"),
        (("--text=a",), "--checkpoint is missing"),
        (("--checkpoint=dms", "--text=a", "--out=a.jpg"), "must end in .png"),
        (("--checkpoint=dms", "--text=a", "--tokens=-1"), "--tokens=-1"),
        (("--checkpoint=dms", "--text=a", "--facts=-1"), "--facts=-1"),
        (("--checkpoint=dms", "--text=a", "--facts=1"), "1 facts in 1 tokens"),
    ):
        code, text, error = call(*arguments)
        assert code == 1 and text == "" and message in error and error.count("\n") == 1
