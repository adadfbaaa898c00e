"""Sources of images: what they hold, in which split, and bad files."""

import pathlib
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image

from atom_jax.data import images
from atom_jax.data.config import DataConfig
from atom_jax.data.envs import video
from atom_jax.data.fetch import emoji
from atom_jax.data.images import Drawn, Shapes, Sprites
from atom_jax.data.pipeline import make_iterator
from atom_jax.data.sources import open_source
from atom_jax.tokenizers import PixelTokenizer, from_name
from atom_jax.typing import AtomError

FONTS = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf")


def test_shapes_are_the_same_wherever_they_are_read_and_differ_between_splits():
    a, b = (Drawn(Shapes(), split) for split in ("train", "test"))
    assert a.read(7) == Drawn(Shapes(), "train").read(7) != b.read(7)
    drawn = [a.drawn(i) for i in range(300)]
    counts = np.bincount([count for _, count in drawn], minlength=7)
    assert counts.min() > 20 and len(counts) == 7
    assert all(image.shape == (16, 16, 1) and len(np.unique(image)) <= count + 1 for image, count in drawn)
    assert a.crc != Drawn(Shapes(most=5), "train").crc


def test_sprites_are_frames_of_the_video():
    sprites = np.rint(video.sprites("17") * 255)
    for i in range(20):
        image, count = Drawn(Sprites(12, most=1, glyphs="17"), "train").drawn(i)
        rows, columns = (np.arange(5)[:, None] + np.arange(8) for _ in range(2))
        parts = image[rows[:, None, :, None], columns[None, :, None, :], 0].reshape(-1, 1, 8, 8)
        whole = parts.sum((1, 2, 3)) == image.sum()
        assert count == 1 and (parts[whole] == sprites).all((2, 3)).any()
    assert {Drawn(Sprites(), "train").drawn(i)[1] for i in range(30)} == {1, 2, 3}
    with pytest.raises(AtomError, match="size"):
        Sprites(4)


def test_rows_of_the_pipeline_are_images():
    cfg = DataConfig(sources=("image:shapes:size=8",), seq_len=64, batch_size=3, whole=True, shuffle=False)
    rows = make_iterator(cfg, PixelTokenizer())
    batch = next(rows)
    rows.close()
    assert (batch["segments"] == 1).all() and from_name("pixels").vocab_size == 256
    wanted = images.arrays(Shapes(8), "train", 3).reshape(3, 64)
    np.testing.assert_array_equal(batch["ids"], wanted)


def test_a_glyph_is_in_one_split_and_there_once():
    source = "image:glyphs:size=12:fonts=STIXSizFourSymReg,STIXSizThreeSymReg"
    found = {s: open_source(source, s) for s in ("train", "validation", "test", "all")}
    parts = [{found[s].read(i) for i in range(len(found[s]))} for s in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len(found["all"]) > 40
    simple, noisy = np.zeros((12, 12, 1), np.uint8), np.random.default_rng(0).integers(0, 256, (12, 12, 1), np.uint8)
    assert images.png_bytes(simple) < images.png_bytes(noisy)


def test_a_file_of_images_of_ones_own(tmp_path):
    path = tmp_path / "mine.npz"
    rows = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez(path, images=rows)
    found = images.parse(str(path))
    assert (found.size, found.channels) == (8, 3) and len(open_source(f"image:{path}", "train")) == 36
    np.testing.assert_array_equal(images.arrays(found, "all", 5), rows[:5])
    for name, content, words in (
        ("none", {"rows": rows}, "there is no array 'images' in it"),
        ("floats", {"images": rows / 255}, r"images is float64\[40, 8, 8, 3\]; expected uint8"),
        ("long", {"images": rows[:, :4]}, "images are 4 x 8; expected square ones"),
        ("pickled", {"images": np.array([{}, 1], object)}, "not an .npz file that can be read"),
    ):
        np.savez(tmp_path / f"{name}.npz", **content)
        with pytest.raises(AtomError, match=words):
            open_source(f"image:{tmp_path / name}.npz", "train")
    (tmp_path / "text.npz").write_text("hello")
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, rows)
    np.savez(tmp_path / "few.npz", images=rows[:5])
    for name, words in (
        ("text", "not an .npz file"), ("absent", "no such file"), ("array", "not an .npz file"),
        ("few", r"few.npz holds 5 images: from 20 on some are kept from training"),
    ):  # fmt: skip
        with pytest.raises(AtomError, match=words):
            open_source(f"image:{tmp_path / name}.npz", "train")


def test_bad_names_of_sources(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for source, words in (
        ("image:faces", "image:faces: expected one of shapes, sprites, glyphs, digits, or a file that ends in .npz"),
        ("image:shapes:sides=3", "no field 'sides'"),
        ("image:shapes:size=7", "size: expected an even number, got 7"),
        ("image:glyphs:fonts=Helvetica", "fonts: matplotlib has no Helvetica"),
        ("image:digits", r"needs scikit-learn: pip install 'atom-jax\[vision\]'"),
    ):
        with pytest.raises(AtomError, match=words):
            open_source(source, "train")


def test_images_are_read_in_the_size_that_is_asked_for(tmp_path):
    image = np.kron(np.array([[0, 255], [128, 64]], np.uint8), np.ones((8, 8), np.uint8))
    Image.fromarray(image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read(tmp_path / "a.png", 2, 1)[..., 0], [[0, 255], [128, 64]])
    assert images.read(tmp_path / "a.png", 32, 3).shape == (32, 32, 3)
    Image.new("L", (4, 6)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no image")
    for name, words in (
        ("b.png", "4 x 6 pixels; expected a square image"),
        ("c.png", "not an image that can be read"),
        ("d.png", "No such file"),
    ):
        with pytest.raises(AtomError, match=words):
            images.read(tmp_path / name, 8, 1)


def test_deep_and_transparent_images_are_read_as_they_look(tmp_path):
    gray = np.array([[0, 255], [128, 64]], np.uint8)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(images.read(tmp_path / "deep.png", 2, 1)[..., 0], gray)
    red = np.zeros((2, 2, 4), np.uint8)
    red[0, 0] = 255, 0, 0, 255
    Image.fromarray(red).save(tmp_path / "clear.png")
    Image.fromarray(red[..., :3]).quantize(2).save(tmp_path / "table.png", transparency=0)
    np.testing.assert_array_equal(images.read(tmp_path / "clear.png", 2, 3)[0], [[255, 0, 0], [255] * 3])
    assert images.read(tmp_path / "clear.png", 2, 1)[1, 1] == 255 in images.read(tmp_path / "table.png", 2, 1)
    Image.fromarray(gray / np.float32(255)).save(tmp_path / "floats.tif")
    with pytest.raises(AtomError, match="its pixels have more than 16 bits"):
        images.read(tmp_path / "floats.tif", 2, 1)


def test_emoji_are_drawn_from_a_font(tmp_path):
    """Of another one here, whose signs have no colours."""
    said = emoji.build(FONTS / "STIXSizFourSymReg.ttf", tmp_path / "emoji")
    found = images.parse(str(tmp_path / "emoji" / "emoji.npz"))
    count = len(found.images())
    assert (found.size, found.channels) == (32, 3) and said == f"{count:,} emoji of 32 x 32 pixels" and count > 20
    with pytest.raises(AtomError, match="not a font that can be read"):
        emoji.build(pathlib.Path(__file__), tmp_path / "other")
