"""What text to read, and in what shape."""

from __future__ import annotations

import dataclasses

from atom_jax import config
from atom_jax.tokenizers import is_trained
from atom_jax.typing import AtomError

SPLITS = ("train", "validation", "test", "all")
FACTS = "facts:"
# Order of what a text becomes whose middle is to be filled in: p, s, m for prefix, suffix and middle, P, S, M for the
# token that stands before each.
LAYOUTS = {"psm": "PpSsMm", "spm": "PSsMpm", "spm_bare": "SsMpm"}
LEAST_PIECE = 64  # bytes; in less, the search for a place to cut could take in the whole piece


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text sources and the batches made of them.

    sources: one or more of
        "austen"      six novels that come with the package (data/builtin.py has the split)
        "pystdlib"    the source files of the running Python's standard library
        a file, a directory or a pattern of files, all of one kind:
            UTF-8 text (also .gz, .xz): one document per file;
            .jsonl, .ndjson, .json, .csv, .tsv (also .gz, .xz) and .parquet: one document per line, object or row, in
            its field "text"; "FILE.jsonl#name" reads another; *.array_record*: one document per record, in UTF-8
        "reason:subset"  problems with reasoning that a program makes up, a million of them (data/puzzles);
                      "reason:subset:letters=6:high=20" sets how hard they are
        "facts:SOURCE"  running text of another source, with facts planted in it and questions about them at its end,
                      a million documents (data/facts). Tokens of answers count more in the loss, of objectives that
                      know it. "facts:SOURCE:size=6000:facts=8:gap=1000:weight=20": bytes at most, facts, the least
                      bytes between one and its question, and what an answer counts. Such a document is never cut,
                      and left out where it is longer than a row
        "image:shapes", "image:sprites", "image:glyphs", "image:digits", "image:FILE.npz"  images, each of which is a
                      document of the bytes of its pixels (data/images), for tokenizers of images;
                      "image:shapes:size=32:most=9"
        "labelled:digits", "labelled:numerals"  images with their classes (data/images/labelled.py)
        "env:watch"   episodes of a world (data/envs), made as they are needed; "env:watch:least=4,most=6" changes it;
                      seq_len is in frames
        "tfds:DIR"    a prepared tensorflow-datasets directory in array_record format, its feature "text";
                      "tfds:DIR#name" reads another
    weights: the share of the text (in bytes) that each source contributes; they need not sum to 1.
        (): the sources are joined, so that every document is seen once per epoch.
    split: "train", "validation", "test", or "all" for the whole source. A directory with such subdirectories
        and a tfds directory with such splits say themselves what is in which; data/splits.py has the rule for
        others.
    seq_len: tokens per row.
    batch_size: rows per batch, over all processes.
    seed: order of the pieces; a different one in every epoch.
    shuffle: False reads the sources in order, epoch after epoch.
    piece_bytes: long documents are cut into pieces of about this many bytes and the pieces are shuffled, so
        that a document doesn't fill one row for many steps. 0: about eight rows' worth. Records of
        array_record and tfds sources stay whole, for their lengths are unknown until they are read.
    whole: no document is cut: those that fit follow each other in a row, and longer ones than a row are left out.
    prompt_end: a text, such as ";": what a document begins with, up to and with the first of these, is read but not
        learned from: the loss leaves out its tokens. "": everything is learned from.
    chat: the records of the sources are conversations, which are never cut (set `whole`): a list of messages under
        "messages", each {"role": ..., "content": ...}, or under the name after #; or "prompt" and "completion". They
        are written by the tokenizer's chat template, and the answers alone are learned from (data/conversations.py).
    marks: "unigram:SIZE" adds where units end (`tokenizers.units.unit_ends`), those of a unigram model of so many
        entries that is trained on the train split (its first 4 MiB); "" adds nothing.
    tokens: rows for byteification (`tokenizers.bolmo`, "spell"): seq_len bytes of one document, and the at most so
        many subwords that they are, a bos included; what does not fit begins the next row. For the objective "alm",
        tokens of the teacher per row. 0: rows of the tokenizer.
    stochastok: about this share of the tokens is tried to be cut into two that are the same text, drawn anew in every
        epoch (`tokenizers.stochastok`; 0.1 in the paper). Validation, here and with fim, reads texts as they are.
    fim: the share of the pieces (of documents, where those are not cut) that is told with the middle last, to be
        filled in; the tokenizer must name the tokens for it.
    fim_layouts: of LAYOUTS, each as often; (): psm and spm.
    fim_cut: where the middle begins and ends: between any two characters (""), or between "line"s or "token"s.
    fim_middle: in such pieces the middle alone, and what ends it, is learned from.
    """

    sources: tuple[str, ...] = ("austen",)
    weights: tuple[float, ...] = ()
    split: str = "train"
    seq_len: int = 256
    batch_size: int = 16
    seed: int = 0
    shuffle: bool = True
    piece_bytes: int = 0
    whole: bool = False
    prompt_end: str = ""
    chat: bool = False
    marks: str = ""
    tokens: int = 0
    stochastok: float = 0.0
    fim: float = 0.0
    fim_layouts: tuple[str, ...] = ()
    fim_cut: str = ""
    fim_middle: bool = False

    def __post_init__(self):
        if not self.sources or isinstance(self.sources, str):
            raise AtomError("data.sources must be a tuple that names at least one source.")
        config.check(self, seq_len=(None, 2**26), batch_size=(None, 2**24), stochastok=(0, 4), fim=(0, 1))
        if self.weights and len(self.weights) != len(self.sources):
            raise AtomError(f"data.weights has {len(self.weights)} numbers for {len(self.sources)} sources.")
        if any(not 0 < w < float("inf") for w in self.weights):
            raise AtomError(f"data.weights must be positive and finite, not {self.weights}.")
        if self.split not in SPLITS:
            raise AtomError(f"data.split is {self.split!r}: it must be one of {', '.join(SPLITS)}.")
        for field, least in (("seq_len", 1), ("batch_size", 1), ("seed", 0), ("piece_bytes", 0), ("tokens", 0)):
            if getattr(self, field) < least:
                raise AtomError(f"data.{field} is {getattr(self, field)}: it must be at least {least}.")
        if self.marks and not (self.marks.startswith("unigram:") and is_trained(self.marks)):
            raise AtomError(f"data.marks is {self.marks!r}: it must be empty or unigram:SIZE.")
        if self.tokens == 1 or (self.tokens and self.marks):
            raise AtomError(f"data.tokens is {self.tokens}: it must be 0, or 2 or more without data.marks.")
        if self.tokens and (self.whole or self.prompt_end):
            raise AtomError("data.tokens: rows of subwords know neither data.whole nor data.prompt_end.")
        if self.chat and (not self.whole or self.prompt_end or self.marks):
            raise AtomError("data.chat: set data.whole; data.prompt_end and data.marks are for texts.")
        if self.whole and self.piece_bytes:
            raise AtomError(f"data.piece_bytes is {self.piece_bytes}, but data.whole cuts no document.")
        if 0 < self.piece_bytes < LEAST_PIECE:
            raise AtomError(f"data.piece_bytes is {self.piece_bytes}: set 0, or {LEAST_PIECE} or more.")
        self._check_changes()

    @property
    def weighs(self) -> bool:
        """Whether a source says that some targets count more than others."""
        return any(source.startswith(FACTS) for source in self.sources)

    def _check_changes(self) -> None:
        """Raises AtomError for changes of texts that do not go with the other fields."""
        for name in ("tokens", "chat", "fim"):
            if self.weighs and getattr(self, name):
                raise AtomError(
                    f"data.sources: {FACTS} has documents with questions, which data.{name} does not know."
                )
        for name in ("marks", "tokens"):
            if self.stochastok and getattr(self, name):
                raise AtomError(f"data.stochastok cuts tokens in two, which data.{name} does not know.")
        for name in ("marks", "tokens", "prompt_end", "chat"):
            if self.fim and getattr(self, name):
                raise AtomError(f"data.fim puts the middle of texts last, which does not go with data.{name}.")
        for name in ("fim_layouts", "fim_cut", "fim_middle"):
            if getattr(self, name) and not self.fim:
                raise AtomError(f"data.{name} says how data.fim is done: set that first.")
        if unknown := [layout for layout in self.fim_layouts if layout not in LAYOUTS]:
            raise AtomError(f"data.fim_layouts has {unknown[0]!r}: they must be of {', '.join(LAYOUTS)}.")
        if self.fim_cut not in ("", "line", "token"):
            raise AtomError(f"data.fim_cut is {self.fim_cut!r}: it must be empty, line or token.")

    def held_out(self, split: str, batch_size: int) -> DataConfig:
        """The same text of another split, as it is, whatever training makes of it, and in the same order for all
        seeds: runs on other parts of the text are judged alike."""
        plain = {"stochastok": 0.0, "fim": 0.0, "fim_layouts": (), "fim_cut": "", "fim_middle": False}
        return dataclasses.replace(self, split=split, batch_size=batch_size, seed=0, **plain)
