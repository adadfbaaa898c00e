"""Episodes as .npz files."""

from __future__ import annotations

import io
import os
import zipfile
import zlib

import jax
import numpy as np

from atom_jax.data.envs.environment import Environment, episodes
from atom_jax.files import read_regular, replaced
from atom_jax.typing import AtomError, Frames

# Axes of the arrays of a file, and the kinds of numbers in them.
_ARRAYS = {
    "action": ((2, 3), "if"), "reward": ((2,), "f"), "done": ((2,), "b"), "positions": ((2,), "i"),
    "segments": ((2,), "i"), "marks": ((2,), "b"),
}  # fmt: skip
_AT_ONCE = 256


def made(env: Environment, seed: int, n: int, frames: int) -> Frames:
    """n episodes as numpy arrays; the first of them are the same for every n."""
    key = jax.random.key(seed)
    program = jax.jit(lambda i: episodes(env, jax.random.fold_in(key, i), min(n, _AT_ONCE), frames)[0])
    parts = [jax.device_get(program(i)) for i in range(-(-n // _AT_ONCE))]
    return jax.tree.map(lambda *x: np.concatenate(x)[:n], *parts)


def save(path: str | os.PathLike, world: str, frames: Frames) -> None:
    """Writes episodes of the environment that `world` names, whole or not at all. OSError where that fails."""
    arrays = {name: x for name, x in vars(frames).items() if x is not None}
    with replaced(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, env=np.array(world), **arrays)


def load(path: str | os.PathLike, frames: int | None = None) -> tuple[str, Frames]:
    """The name of the environment, and episodes of it as numpy arrays; of each the first `frames` frames.

    Raises AtomError for a file that holds none, and for episodes that are shorter than asked.
    """
    try:
        with np.load(io.BytesIO(read_regular(path)), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except OSError as e:
        raise AtomError(f"{path}: {e.strerror or e}") from None
    except (ValueError, EOFError, TypeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as e:
        raise AtomError(f"{path}: this is no .npz file of episodes ({e})") from None
    world = found.pop("env", np.array(0))
    if world.dtype.kind != "U" or world.ndim or found.get("obs", world).ndim < 3:
        raise AtomError(f"{path}: this is no .npz file of episodes (env or obs is missing)")
    _check(path, found)
    n = found["obs"].shape[1]
    if frames is not None and frames > n:
        raise AtomError(f"{path}: its episodes have {n} frames, fewer than the {frames} asked for")
    return str(world), Frames(**{name: x[:, :frames] for name, x in found.items()})


def _check(path: str | os.PathLike, found: dict[str, np.ndarray]) -> None:
    rows, obs = found["obs"].shape[:2], found["obs"]
    if unknown := sorted(set(found) - {"obs", *_ARRAYS}):
        raise AtomError(f"{path}: {unknown[0]} does not belong to episodes")
    if obs.dtype not in (np.uint8, np.float32) or 0 in obs.shape:
        raise AtomError(f"{path}: obs is {obs.dtype} {list(obs.shape)}; expected frames, u8 or f32")
    for name, (axes, kinds) in _ARRAYS.items():
        x = found.get(name)
        if x is None and name == "marks":
            continue
        if x is None or x.ndim not in axes or x.shape[:2] != rows or x.dtype.kind not in kinds:
            what = "missing" if x is None else f"{x.dtype} {list(x.shape)}"
            raise AtomError(f"{path}: {name} is {what}; obs has {rows[0]} episodes of {rows[1]} frames")
    for name, x in found.items():
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise AtomError(f"{path}: {name} holds numbers that are not finite")
