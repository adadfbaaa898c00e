"""Bacterial genomes from the example data of Debian packages, split by genus.

corpora/dna/SPLIT/GENUS/FILE-N.txt is record N of a FASTA file: one line of upper-case letters. The files hold several
strains of each species, some of them twice (as a finished genome and as the fragments it was assembled from), so a
random split would test what was trained on.
"""

from __future__ import annotations

import hashlib
import pathlib
import re
from collections.abc import Iterator

from atom_jax.data.config import SPLITS
from atom_jax.data.corpus import packing, read_packed
from atom_jax.data.fetch import debian
from atom_jax.data.fetch.files import whole
from atom_jax.typing import AtomError

PACKAGES = ("ragout-examples", "kleborate-examples", "sibelia-examples", "bowtie-examples")
# Escherichia and Klebsiella are of one family, so they stay together.
SPLIT_OF = {
    "Escherichia coli": "train",
    "Klebsiella pneumoniae": "train",
    "Staphylococcus aureus": "train",
    "Helicobacter pylori": "validation",
    "Vibrio cholerae": "test",
}
_FASTA = re.compile(r".+\.(fa|fna|fasta)(\.gz|\.xz)?")
_SEQUENCE = re.compile(rb"[A-Z*-]+")


def fetch(target: pathlib.Path, cache: pathlib.Path) -> str:
    """Makes `target` from the packages, and returns what is in it, as a table. Raises AtomError when one of them
    cannot be had."""
    return build([path / "usr/share/doc" for path in debian.unpack(PACKAGES, cache)], target)


def build(folders: list[pathlib.Path], target: pathlib.Path) -> str:
    """Writes `target` whole from the FASTA files below the folders, and returns its table of contents.

    Records that occur twice are written once. Raises AtomError for a malformed file or an unknown species.
    """
    files = sorted(p for folder in folders for p in folder.rglob("*") if _FASTA.fullmatch(p.name) and p.is_file())
    if not files:
        raise AtomError(f"{', '.join(map(str, folders))}: no FASTA file there")
    seen: set[bytes] = set()
    counts = {name: [0, 0] for name in SPLIT_OF}
    records = ((path, number, *record) for path in files for number, record in enumerate(read_fasta(path), 1))
    with whole(target) as part:
        for path, number, header, sequence in records:
            digest = hashlib.sha256(sequence).digest()
            if digest in seen:
                continue
            seen.add(digest)
            species = species_of(header, path)
            folder = part / SPLIT_OF[species] / species.split()[0]
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{path.name.partition('.')[0]}-{number}.txt", "xb") as f:
                f.write(sequence)
            counts[species][0] += 1
            counts[species][1] += len(sequence)
    lines = [f"{'split':<12}{'species':<24}{'records':>8}{'bases':>14}"]
    for species, (records, bases) in sorted(counts.items(), key=lambda item: SPLITS.index(SPLIT_OF[item[0]])):
        lines.append(f"{SPLIT_OF[species]:<12}{species:<24}{records:>8}{bases:>14,}")
    return "\n".join(lines)


def read_fasta(path: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """Yields (description, upper-case sequence) of every record of a FASTA file, plain, .gz or .xz, that has a
    sequence. Raises AtomError when it is damaged or not FASTA."""
    content = read_packed(path) if packing(path) else path.read_bytes()
    before, *records = re.split(rb"^>", content, flags=re.M)
    if before.strip() or not records:
        raise AtomError(f"{path} is not FASTA: it does not begin with >")
    for record in records:
        header, _, rest = record.partition(b"\n")
        sequence = b"".join(rest.split()).upper()
        if sequence and not _SEQUENCE.fullmatch(sequence):
            raise AtomError(f"{path} is not FASTA: the sequence of {header[:60]!r} has other characters than letters")
        if sequence:
            yield header.decode("utf-8", "replace").strip(), sequence


def species_of(header: str, path: pathlib.Path) -> str:
    """Returns the key of SPLIT_OF that the description of a record, or else a folder above its file, names: in full
    or as in "E.Coli". Raises AtomError when none does."""
    folders = [part.replace("_", " ").lower() for part in path.parts]
    for species in SPLIT_OF:
        if species.lower() in header.lower():
            return species
    for species in SPLIT_OF:
        genus, _, name = species.lower().partition(" ")
        if species.lower() in folders or f"{genus[0]}.{name}" in folders:
            return species
    raise AtomError(f"{path}: neither its folders nor the description {header[:60]!r} name a known species")
