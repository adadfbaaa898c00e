"""From the name of a source to its documents."""

from __future__ import annotations

import glob
import os
import pathlib
from collections.abc import Callable
from functools import partial

import grain

from atom_jax.data import builtin, facts, formats, images, puzzles
from atom_jax.data.config import FACTS
from atom_jax.data.conversations import conversation
from atom_jax.data.corpus import Corpus, Files, Joined, Records, one_line, packing, record_text
from atom_jax.data.images import labelled
from atom_jax.data.splits import take_split
from atom_jax.typing import AtomError

# What directories and tfds splits call them.
_READERS = {
    "jsonl": formats.read_jsonl, "json": formats.read_json, "csv": formats.read_csv, "parquet": formats.read_parquet,
}  # fmt: skip
_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


def open_source(source: str, split: str, chat: bool = False) -> Corpus:
    """Returns the documents of one split of a source; DataConfig documents both. chat: its records are conversations
    (`conversations.conversation`).

    Raises AtomError when the source is missing, empty, damaged or not UTF-8.
    """
    if chat:
        corpus = _paths(source, split, chat)
    elif source == "austen":
        corpus = builtin.austen(split)
    elif source == "pystdlib":
        corpus = builtin.pystdlib(split)
    elif source.startswith("tfds:"):
        corpus = _tfds(source, split)
    elif source.startswith("reason:"):
        corpus = puzzles.Generated(puzzles.parse(source.removeprefix("reason:")), split)
    elif source.startswith(FACTS):
        running, how = facts.parse(source.removeprefix(FACTS))
        corpus = facts.Asking(how, open_source(running, split), split)
    elif source.startswith("image:"):
        corpus = images.corpus(images.parse(source.removeprefix("image:")), split)
    elif source.startswith("labelled:"):
        corpus = labelled.Labelled(labelled.parse(source.removeprefix("labelled:")), split)
    else:
        corpus = _paths(source, split)
    if not len(corpus):
        raise AtomError(f"{source} has no text in its {split} split.")
    return corpus


def _tfds(source: str, split: str) -> Corpus:
    directory, _, feature = source.removeprefix("tfds:").partition("#")
    if not pathlib.Path(directory).is_dir():
        raise AtomError(f"{source}: there is no directory {directory}.")
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise AtomError(f"{source} needs tensorflow-datasets: pip install 'atom-jax[tfds]'.") from None
    try:
        builder = tfds.builder_from_directory(directory)
        found = {name: builder.as_data_source(name) for name in builder.info.splits}
    except Exception as e:  # tfds raises many kinds, all of them about what is in the directory
        raise AtomError(f"{source} is not a prepared array_record dataset: {one_line(e)}.") from None
    parts = {k: partial(Records, f"{source}, split {k}", v, feature or "text") for k, v in found.items()}
    return _choose(source, split, parts)


def _choose(source: str, split: str, parts: dict[str, Callable[[], Corpus]], chat: bool = False) -> Corpus:
    """Opens the named split. A source whose only part is "train" is split further, by data/splits.py."""
    if set(parts) == {"train"}:
        return take_split(parts["train"](), split, chat)
    if split == "all" and parts:
        return Joined(source, [part() for part in parts.values()])
    for name in _NAMES.get(split, ()):
        if name in parts:
            return parts[name]()
    raise AtomError(f"{source} has no {split} split: it has {', '.join(sorted(parts)) or 'none'}.")


def _paths(source: str, split: str, chat: bool = False) -> Corpus:
    name, field = source, None
    if not os.path.exists(source) and "#" in source:
        name, _, field = source.rpartition("#")
    path = pathlib.Path(name)
    if path.is_dir():
        known = [n for names in _NAMES.values() for n in names]
        folders = [path / n for n in known if (path / n).is_dir()]
        if folders:
            return _choose(source, split, {p.name: partial(_directory, p, field, chat) for p in folders}, chat)
        return take_split(_directory(path, field, chat), split, chat)
    if os.path.exists(name):
        found = [path]
    else:
        found = [p for p in sorted(map(pathlib.Path, glob.glob(name, recursive=True))) if p.is_file()]
    if not found:
        raise AtomError(f"There is no source {source}: no built-in has this name and no file or directory matches.")
    return take_split(_files(name, found, field, chat), split, chat)


def _directory(path: pathlib.Path, field: str | None, chat: bool) -> Corpus:
    return _files(str(path), _listing(path), field, chat)


def _listing(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files under a directory, sorted by path, without hidden ones and Python's caches."""
    found = []
    for path in sorted(directory.rglob("*")):
        parts = path.relative_to(directory).parts
        if path.is_file() and not any(p.startswith(".") or p == "__pycache__" for p in parts):
            found.append(path)
    if not found:
        raise AtomError(f"{directory} holds no files.")
    if {"dataset_info.json", "features.json"} <= {p.name for p in found}:
        raise AtomError(f"{directory} is a tensorflow-datasets directory: write tfds:{directory}.")
    return found


def _files(what: str, paths: list[pathlib.Path], field: str | None, chat: bool) -> Corpus:
    kinds = sorted({formats.kind_of(p) for p in paths})
    if len(kinds) > 1:
        raise AtomError(
            f"{what} holds {' and '.join(kinds)} files: choose one kind with a pattern, such as DIR/*.jsonl."
        )
    if field and kinds[0] not in _READERS:
        raise AtomError(
            f"{what}#{field}: only .jsonl files and tfds directories have fields, and .json, .csv and .parquet."
        )
    if chat and kinds[0] not in _READERS:
        raise AtomError(f"{what} holds {kinds[0]} files: conversations are .jsonl, .json, .csv or .parquet.")
    if kinds == ["array_record"]:
        return Records(what, _array_record(what, paths))
    if kinds[0] in _READERS:
        take = conversation if chat else record_text
        take = partial(take, field=field) if field else take
        return Joined(what, [_READERS[kinds[0]](p, take) for p in paths])
    packed = [p for p in paths if packing(p) is not None]
    plain = [p for p in paths if packing(p) is None]
    return Joined(what, [Files(what, plain)] + [formats.read_packed_text(p) for p in packed])


def _array_record(what: str, paths: list[pathlib.Path]):
    try:
        return grain.sources.ArrayRecordDataSource([str(p) for p in paths])
    except Exception as e:  # a missing package and a damaged file come as many kinds
        raise AtomError(f"{what} cannot be opened as array_record: {one_line(e)}.") from None
