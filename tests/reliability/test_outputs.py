"""Files that commands write: what is no regular file is left alone, and nothing is left half-written."""

import errno
import os
import stat

import jax
import pytest

import atom_jax
from atom_jax import files, params, picture
from atom_jax.__main__ import main
from atom_jax.models import transformer
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.transfer.lessons import add_tuning
from atom_jax.typing import LM, AtomError
from tests.reliability.test_commands import judge, limited

OTHERS = ("pipe", "loop", "folder")


@pytest.fixture
def home(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("It was a truth universally acknowledged. " * 20)
    for end in ("png", "npz"):
        os.mkfifo(tmp_path / f"pipe.{end}")
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    cfg = transformer.TransformerConfig(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24, max_length=512, eos_ids=(257,)
    )
    path = tmp_path_factory.mktemp("model") / "hf"
    atom_jax.save_hf(LM(cfg, params.init(jax.random.key(3), transformer.spec(cfg)), ByteTokenizer()), path)
    return path


def kinds(home):
    return {path.name: stat.S_IFMT(os.lstat(path).st_mode) for path in home.iterdir()}


def test_only_regular_files_are_replaced(home):
    before = kinds(home)
    for name in (*OTHERS, "pipe.png", "text/inside", "x" * 300, "a\0b", "nowhere/inside"):
        with pytest.raises(OSError), limited(), files.replaced(home / name) as part:
            part.write_text("x")
    assert kinds(home) == before
    (home / "link").symlink_to(home / "text")
    for name in ("link", "new.txt"):
        with files.replaced(home / name) as part:
            part.write_text("whole")
        assert (home / name).read_text() == "whole"
    assert (home / "link").is_symlink() and (home / "text").read_text() == "whole"
    files.write_text(home / "nowhere" / "deep" / "x", "ä\n", parents=True)
    assert (home / "nowhere" / "deep" / "x").read_text("utf-8") == "ä\n"


def test_what_fails_half_way_leaves_what_was_there(home, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    before = kinds(home)
    with pytest.raises(OSError), files.replaced(home / "text") as part:
        part.write_text("half")
        raise full
    assert (home / "text").read_text().startswith("It was") and kinds(home) == before

    def half(self, path, **_):
        with open(path, "wb") as file:
            file.write(b"half")
        raise full

    with pytest.raises(AtomError, match="No space left"), picture.drawn(home / "x.png") as (figure, _):
        monkeypatch.setattr(type(figure), "savefig", half)
    assert kinds(home) == before


def test_commands_leave_pipes_and_directories_alone(home, model, capsys):
    good, before = f"--checkpoint={model}", kinds(home)
    fit = ["fit_memory", good, str(home / "text"), "--tokens=200", "--facts=2", "--part=32"]
    cases = [[*fit, f"--out={home / name}"] for name in (*OTHERS, "text/inside")]
    cases += [["plan", good, f"--out={home / name}"] for name in OTHERS]
    cases += [["fairness", good, f"--out={home / name}"] for name in OTHERS]
    cases += [["units", good, "--text=x", f"--out={home}/pipe.png"]]
    cases += [["memory", good, "--text=x", f"--out={home}/pipe.png"]]
    cases += [["imagine", good, "--actions=1", f"--out={home}/pipe.png"]]
    cases += [["tokens", good, f"--image={home}/text", "--error=1", f"--save={home}/pipe.npz"]]
    cases += [["eval", good, "--tasks=bpb", f"--out={home}/pipe"]]
    cases += [[*fit, f"--out={home}/new", f"--policy_out={home}/{name}"] for name in ("pipe", "text")]
    for args in cases:
        with limited():
            code = main(["atom_jax", *args])
        err = capsys.readouterr().err
        assert code == 1 and judge(args, code, err) is None, (args, err)
        assert str(home) in err, (args, err)
    assert kinds(home) == before


@pytest.mark.parametrize("alpha", ["nan", "inf", "1e400", "-1e39"])
def test_a_factor_that_makes_no_numbers_writes_nothing(model, tmp_path, capsys, alpha):
    args = ["instructify", *[str(model)] * 3, str(tmp_path / "new"), f"--alpha={alpha}"]
    code = main(["atom_jax", *args])
    err = capsys.readouterr().err
    assert code == 1 and judge(args, code, err) is None and "--alpha" in err, err
    assert not list(tmp_path.iterdir())


def test_sums_that_are_not_finite_are_refused():
    cfg = transformer.TransformerConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=24)
    one, other = (LM(cfg, params.init(jax.random.key(i), transformer.spec(cfg)), ByteTokenizer()) for i in range(2))
    with pytest.raises(AtomError, match="not finite"):
        add_tuning(one, other, one, 1e39)
