"""Files of Debian packages, without installing them."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

from atom_jax.data.fetch.files import whole
from atom_jax.typing import AtomError

TOOLS = ("apt-get", "dpkg-deb")


class Unavailable(AtomError):
    """A package that apt-get does not find or cannot download."""


def unpack(packages: Sequence[str], cache: pathlib.Path) -> list[pathlib.Path]:
    """Returns the directory of each package's files, below `cache`; what is there already is not fetched again.

    Package lists are updated first; where that is not allowed, those on the machine have to do. Raises AtomError when
    apt-get or dpkg-deb is missing or a package cannot be unpacked, Unavailable when one cannot be downloaded.
    """
    found = [cache / name for name in packages]
    if all(path.is_dir() for path in found):
        return found
    for tool in TOOLS:
        if shutil.which(tool) is None:
            raise AtomError(
                f"{tool} is missing: these texts come from Debian packages, so a Debian or Ubuntu is needed"
            )
    if subprocess.run(["apt-get", "update", "-qq"], check=False).returncode:
        print(
            "apt-get update failed (it needs root): going on with the package lists of this machine", file=sys.stderr
        )
    for number, path in enumerate(found, 1):
        if not path.is_dir():
            print(f"{path.name} ({number} of {len(found)})", file=sys.stderr)
            _fetch(path)
    return found


def _fetch(path: pathlib.Path) -> None:
    # Root would otherwise be warned that apt's own user cannot write here.
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", path.name]
    with whole(path) as part:
        if subprocess.run(command, cwd=part, check=False).returncode:
            raise Unavailable(f"the Debian package {path.name} could not be downloaded: apt-get's message is above")
        archive = next(part.glob("*.deb"), None)
        if archive is None or subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=part, check=False).returncode:
            raise AtomError(f"the Debian package {path.name} could not be unpacked: dpkg-deb's message is above")
        archive.unlink()
