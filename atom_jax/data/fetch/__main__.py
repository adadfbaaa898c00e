"""Fetches texts for experiments from Debian packages, which are unpacked and never installed.

    python -m atom_jax.data.fetch parallel|dna|english|heldout [DIR]    # or: make parallel and so on

parallel: DIR/parallel, the pages of LibreOffice's help in seven languages (parallel.py).
dna:      DIR/dna, genomes of five species of bacteria (genomes.py).
english:  DIR/english, long English documents to train on (english.py).
heldout:  DIR/heldout, English texts to evaluate on (heldout.py).
DIR is `corpora` by default. Packages stay in .cache/debian, so an interrupted run goes on with what is missing.
"""

from __future__ import annotations

import pathlib
import sys

from atom_jax.data.fetch import english, genomes, heldout, parallel
from atom_jax.typing import AtomError

CACHE = pathlib.Path(".cache/debian")
_MAKERS = {"parallel": parallel.fetch, "dna": genomes.fetch, "english": english.fetch, "heldout": heldout.fetch}


def main(arguments: list[str]) -> int:
    """Fetches one corpus; returns the exit status."""
    if not 1 <= len(arguments) <= 2 or arguments[0] not in _MAKERS or arguments[-1].startswith("-"):
        print(f"usage: python -m atom_jax.data.fetch {'|'.join(_MAKERS)} [DIR]", file=sys.stderr)
        return 1
    target = pathlib.Path(*arguments[1:] or ["corpora"]) / arguments[0]
    try:
        if target.exists():
            print(f"{target} is there already; delete it to make it again")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            print(_MAKERS[arguments[0]](target, CACHE))
            print(target)
    except (AtomError, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
