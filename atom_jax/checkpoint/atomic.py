"""All-or-nothing writing of directories: a full disk or a kill leaves what was there before."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from atom_jax.files import check_output
from atom_jax.typing import AtomError


@contextlib.contextmanager
def staged(directory: str | Path, stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Yields an empty directory to write into; what is there moves to `directory` only when the block succeeds.

    A new directory appears by one rename. Into an existing one files and folders move by renames, each file
    replacing its namesake whole, and files for which `stale(name)` holds and that were not written anew are
    removed; all others stay. OSError in the block becomes an AtomError that names the directory, as does an AtomError
    about what is being written there.
    """
    check_target(directory)
    target, staging = Path(directory), None
    try:
        # Inside an existing target, so that it is on the same filesystem even where target is a mount point.
        parent = target if target.is_dir() else target.parent
        parent.mkdir(parents=True, exist_ok=True)
        staging = parent / f".saving-{uuid.uuid4().hex}"
        staging.mkdir()
        yield staging
        _flush(staging)
        if target.is_dir():
            _move_into(staging, target, stale)
        else:
            os.rename(staging, target)
    except OSError as e:
        raise AtomError(f"{target}: could not be saved ({e.strerror or e}); what was there is unchanged") from None
    except AtomError as e:
        if staging is None or str(staging) not in str(e):
            raise
        raise AtomError(str(e).replace(str(staging), str(target))) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def check_target(directory: str | Path) -> None:
    """Raises AtomError where something else than a directory is in the way of one, or none can be made, as far as it
    can be told before there is anything to write."""
    target = Path(directory)
    try:
        if target.exists() and not target.is_dir():
            raise AtomError(f"{target}: cannot save there, it is a file")
        check_output(target / "any", parents=True)
    except (OSError, ValueError) as e:
        raise AtomError(f"{target}: cannot save there ({getattr(e, 'strerror', None) or e})") from None


def check_new(directory: str | Path, flag: str = "") -> None:
    """Raises AtomError, which begins with `flag`, where something is in the way of a new directory, or none can be
    made: before the work whose result is to go there."""
    target = Path(directory)
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise AtomError(f"{flag}{directory}: already exists; name a new directory")
    try:
        check_target(target)
    except AtomError as e:
        raise AtomError(f"{flag}{e}") from None


def _flush(staging: Path) -> None:
    mode = staging.stat().st_mode & 0o666  # what the umask allows; some writers make files private
    for path in staging.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            # A rename may reach the disk before the data does: a power cut would then leave empty files in place.
            with open(path, "rb+") as f:
                os.fsync(f.fileno())


def _move_into(staging: Path, target: Path, stale: Callable[[str], bool]) -> None:
    written = {path.name for path in staging.iterdir()}
    for name in sorted(written):
        os.replace(staging / name, target / name)
    for path in target.iterdir():
        if path.name not in written and path.is_file() and stale(path.name):
            path.unlink()
