"""Tokenizers of images from the command line: trained, used and judged."""

import json

import numpy as np
import pytest
from PIL import Image

import atom_jax
from atom_jax.__main__ import main
from atom_jax.data import images
from atom_jax.inference import image_tokens as lib
from atom_jax.training import loop, start
from atom_jax.training.objectives import Images
from atom_jax.training.record import read
from atom_jax.typing import AtomError

CONFIG = "configs/image.py:tiny"
TINY = ["train.steps=4", "train.log_every=1", "train.eval_every=4", "train.checkpoint_every=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, curves, one_device):
    """A run of four steps."""
    workdir = tmp_path_factory.mktemp("run")
    with curves():
        loop.fit(start.configure(CONFIG, TINY), workdir)
    return workdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pixels = images.arrays(images.parse("shapes:size=8"), "test", 2)
    for name, image in zip("ab", pixels):
        Image.fromarray(image[..., 0]).save(folder / f"{name}.png")
    return folder, pixels


@pytest.fixture
def run(capsys):
    def call(*args):
        code = main(["atom_jax", *map(str, args)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_what_a_run_writes_down(trained):
    lines = {(line["step"], line["kind"]): line for line in read(trained / "metrics.jsonl")}
    judged = lines[4, "validation"]
    assert judged["tokens"] == 4 and {"error_1", "error_2", "loss"} <= judged.keys()
    assert "bits_per_byte" not in judged and lines[4, "train"]["images_per_second"] > 0
    assert not {"bytes_per_second", "tokens_per_second"} & lines[4, "train"].keys()
    assert {p.name for p in (trained / "plots").iterdir()} == {"loss.png", "optimizer.png", "throughput.png"}


def test_tokens_of_images(trained, pictures, run, tmp_path):
    folder, pixels = pictures
    both = [f"--image={folder / name}.png" for name in "ab"]
    files = [f"--save={tmp_path / 'codes.npz'}", f"--out={tmp_path / 'tokens.png'}"]
    code, out, _ = run("tokens", f"--checkpoint={trained}", *both, "--tokens=3", *files)
    assert code == 0 and (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    lm = atom_jax.load(trained)
    found = lib.offers(lm, pixels)
    with np.load(tmp_path / "codes.npz") as saved:
        codes, names = saved["codes"], saved["names"]
    used = (codes >= 0).sum(axis=1)
    assert list(names) == [str(folder / f"{name}.png") for name in "ab"] and list(used) == [3, 3]
    image = np.clip(lib.decoded(lm, codes), 0, 1)
    np.testing.assert_allclose(image, found.images[used - 1, range(2)], atol=1e-5)
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [int(row[1]) for row in rows] == list(used) and int(rows[0][2]) == round(used[0] * np.log2(64_000))
    code, out, _ = run("tokens", f"--checkpoint={trained}", *both, "--tokens=2", "--allocate=gain")
    assert code == 0 and sum(int(line.split()[1]) for line in out.splitlines()[1:]) <= 4
    bound = float(found.errors.min(axis=0).max()) * 1.01
    code, out, _ = run("tokens", f"--checkpoint={trained}", *both, f"--error={bound}")
    fewest = lib.tokens_of(found, lib.within(found, bound))
    assert code == 0 and [int(line.split()[1]) for line in out.splitlines()[1:]] == list(fewest)


def test_images_are_judged_by_how_many_tokens_they_get(trained, run, tmp_path):
    out = tmp_path / "found.json"
    settings = ["--set", "images.limit=20", "images.tokens=2"]
    code, said, _ = run("eval", f"--checkpoint={trained}", "--tasks=images", f"--out={out}", *settings)
    assert code == 0 and "tokens by shapes" in said and (tmp_path / "found.png").is_file()
    found = json.loads(out.read_text())["tasks"]["images"]
    value = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert found["count"] == 20 and value["same_tokens"] == 2 and value["adaptive_tokens"] <= 2
    assert value["gain_mse"] <= value["same_mse"] <= value["same_worst_tenth"]
    lines = found["lengths"]
    assert [line["tokens"] for line in lines] == [1, 2, 3, 4]
    np.testing.assert_allclose([line["bits"] for line in lines], np.arange(1, 5) * np.log2(64_000))
    np.testing.assert_allclose(lines[1]["mse"], value["mse_2"])
    assert all(line["mae"] > 0 and -1 <= line["ssim"] <= 1 for line in lines)


def test_two_images_are_judged_too(trained, run, tmp_path):
    settings = ["--set", "images.limit=2", "images.tokens=1"]
    code, said, _ = run(
        "eval", f"--checkpoint={trained}", "--tasks=images", f"--out={tmp_path / 'a.json'}", *settings
    )
    found = json.loads((tmp_path / "a.json").read_text())["tasks"]["images"]
    # One token each: there is nothing to correlate.
    assert code == 0 and "rank_correlation" not in found["metrics"] and "rank correlation" not in said


def test_what_is_wrong_is_said_in_a_sentence(trained, pictures, run, tmp_path):
    folder, _ = pictures
    checkpoint, image = f"--checkpoint={trained}", f"--image={folder / 'a.png'}"
    best = lib.offers(atom_jax.load(trained), pictures[1][:1]).errors.min()
    for args, words in (
        ((checkpoint, "--tokens=3"), "--image is missing"),
        ((image, "--tokens=3"), "--checkpoint is missing"),
        ((checkpoint, image), "give --error or --tokens"),
        ((checkpoint, image, "--tokens=3", "--error=0.1"), "give --error or --tokens, not both"),
        ((checkpoint, image, "--error=0.1", "--allocate=gain"), "--allocate has no meaning without --tokens"),
        ((checkpoint, image, "--tokens=3", "--save=codes"), "--save=codes: the name must end in .npz"),
        ((checkpoint, image, "--tokens=3", "--out=a.gif"), "its name must end in .png"),
        ((checkpoint, image, "--tokens=0"), "tokens is 0: this tokenizer offers 1 to 4"),
        ((checkpoint, image, "--tokens=0", "--allocate=gain"), "tokens is 0: the fewest that these images can have"),
        ((checkpoint, image, "--error=1e-9"), f"--error=1e-09 is out of reach: the best for {folder / 'a.png'} is"),
        ((checkpoint, f"--image={folder / 'none.png'}", "--tokens=1"), "No such file"),
    ):
        code, _, err = run("tokens", *args)
        assert code == 1 and words in err and len(err.strip().splitlines()) == 1, err
    assert f"{best:.4g}" in run("tokens", checkpoint, image, "--error=1e-9")[2]
    code, _, err = run("generate", checkpoint, "--prompt=a")
    assert code == 1 and "the model is of the kind image_tokens, which reads images" in err
    code, _, err = run("plan", checkpoint)
    assert code == 1 and "plan: it takes a world model, and this one is of the family image_tokens" in err
    code, out, _ = run("info", trained)
    assert code == 0 and "8 x 8, gray, in 4 patches of 4 x 4" in out


def test_runs_that_do_not_fit_together_are_refused(tmp_path):
    for settings, words in (
        (["tokenizer=bytes"], "images: tokenizer must be pixels, not 'bytes'"),
        (["data.sources=austen"], r"images: data.sources must be images \(image:NAME\), not 'austen'"),
        (["data.sources=image:shapes:size=16"], "is 16 x 16 with 1 channels, the model's are 8 with 1"),
        (["data.seq_len=32"], "images: set data.whole, and data.seq_len to an image's 64 bytes"),
    ):
        with pytest.raises(AtomError, match=words):
            loop.fit(start.configure(CONFIG, [*TINY, *settings]), tmp_path / "run")
    with pytest.raises(AtomError, match="images: model must be an ImageTokensConfig, not a TransformerConfig"):
        Images().check(start.configure("configs/lm.py:tiny", []))
