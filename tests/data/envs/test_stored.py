"""Episodes as files: what the command writes is what is read, and what is no such file is refused in one sentence."""

import jax
import numpy as np
import pytest

from atom_jax.data.envs import Watch, stored
from atom_jax.data.envs.__main__ import main
from atom_jax.typing import AtomError

NAME = "watch:least=4,most=6"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("episodes") / "watch.npz"
    assert main(["envs", NAME, "--episodes=3", "--frames=9", "--seed=5", f"--out={path}"]) == 0
    return path


def test_what_is_written_is_read(written):
    world, frames = stored.load(written)
    assert world == NAME
    jax.tree.map(np.testing.assert_array_equal, frames, stored.made(Watch(least=4, most=6), 5, 3, 9))
    shorter = stored.load(written, 4)[1]
    assert shorter.obs.shape == (3, 4, 5, 5) and shorter.reward.shape == (3, 4)
    assert [p.name for p in written.parent.iterdir()] == ["watch.npz"]
    with pytest.raises(AtomError, match="have 9 frames, fewer than the 10 asked for"):
        stored.load(written, 10)


def changed(written, path, **arrays):
    with np.load(written) as file:
        found = {name: file[name] for name in file.files} | arrays
    np.savez(path, **{name: x for name, x in found.items() if x is not None})
    return path


WRONG = {
    "missing": ({"reward": None}, "reward is missing"),
    "no frames": ({"obs": None}, "env or obs is missing"),
    "short": ({"action": np.zeros((3, 8), np.int32)}, r"action is int32 \[3, 8\]; obs has 3 episodes of 9"),
    "kind": ({"done": np.zeros((3, 9), np.int32)}, "done is int32"),
    "more": ({"more": np.zeros(3)}, "more does not belong"),
    "objects": ({"obs": np.array([[{}]])}, "no .npz file of episodes"),
    "nan": ({"reward": np.full((3, 9), np.nan, np.float32)}, "reward holds numbers that are not finite"),
    "text": ({"obs": np.full((3, 9, 1), "a")}, "obs is <U1"),
}


@pytest.mark.parametrize("arrays, message", WRONG.values(), ids=WRONG)
def test_wrong_arrays(written, tmp_path, arrays, message):
    with pytest.raises(AtomError, match=message):
        stored.load(changed(written, tmp_path / "a.npz", **arrays))
    # Marks need not be there.
    assert stored.load(changed(written, tmp_path / "a.npz", marks=None))[1].marks is None


def test_files_that_are_none(written, tmp_path):
    path, whole = tmp_path / "a.npz", written.read_bytes()
    for data in (
        b"",
        b"text",
        whole[: len(whole) // 2],
        whole[:200] + b"\0" * 50 + whole[250:],
        b"\x93NUMPY\x01\x00",
    ):
        path.write_bytes(data)
        with pytest.raises(AtomError, match=f"{path}: "):
            stored.load(path)
    np.save(tmp_path / "b.npy", np.zeros(3))
    for name in ("b.npy", "none.npz", "."):
        with pytest.raises(AtomError):
            stored.load(tmp_path / name)


def test_the_command_refuses(capsys, tmp_path):
    out = f"--out={tmp_path}/a.npz"
    wrong = {
        ("watch",): "usage:", (out,): "usage:", ("chess", out): "expected watch", ("watch:size=4", out): "size",
        ("watch", "--episodes=0", out): "--episodes is 0", ("watch", "--frames=-1", out): "--frames is -1",
        ("watch", "--frame=1", out): "frame", ("watch", f"--out={tmp_path}/x/a.npz"): "there is no folder",
    }  # fmt: skip
    for arguments, message in wrong.items():
        assert main(["envs", *arguments]) == 1
        said = capsys.readouterr()
        assert said.err.startswith("envs: ") and message in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())
