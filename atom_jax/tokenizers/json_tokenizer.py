"""Published tokenizers: a tokenizer.json through the `tokenizers` package, with exact bytes and byte spans."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tokenizers import AddedToken, Encoding, models
from tokenizers import Tokenizer as _Tokenizer

from atom_jax.files import read_regular
from atom_jax.tokenizers import byte_level
from atom_jax.tokenizers.byte_level import MERGES, VOCABULARY, complaint
from atom_jax.typing import AtomError

MAIN = "tokenizer.json"
_SPECIAL = ("tokenizer_config.json", "special_tokens_map.json")
# What travels with a tokenizer. The two files of the model are only read, for ids of special tokens.
TOKENIZER_FILES = (MAIN, *_SPECIAL, "added_tokens.json", "chat_template.jinja")
_MODEL = ("config.json", "generation_config.json")
# Tokenizers of other kinds; vocab.json is read where it is known how texts are split first.
_UNREAD = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", VOCABULARY, "vocab.txt", "tekken.json")
_MOST_IDS = 1 << 24  # bounds the tables that are made of a vocabulary
# How SentencePiece vocabularies write a byte, and a space.
BYTE_TOKEN, SPACE = re.compile(r"<0x([0-9A-F]{2})>"), "\u2581"


class JsonTokenizer:
    """The tokenizer in `path`, a tokenizer.json or a directory that holds one, as a `tokenizers.base.Tokenizer`. A
    directory may hold vocab.json and merges.txt instead, where tokenizer_config.json names a class that is known.

    Special tokens come from tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json,
    where they exist. Names of special tokens inside a text ("<|im_end|>") are read as those tokens, as in
    transformers. `front` is what the template of tokenizer.json puts before a text, or what add_bos_token in
    tokenizer_config.json says; tokens that a template puts after it are left out, since a prompt goes on.
    Raises AtomError when tokenizer.json is missing or malformed.
    """

    def __init__(self, path: str | os.PathLike):
        path = Path(path)
        files = _files(path) if path.is_dir() else {MAIN: _read(path)}
        if MAIN not in files:
            raise AtomError(f"{path}: no {MAIN} there")
        self._setup(files, str(path))

    @classmethod
    def from_files(cls, files: dict[str, str], name: str) -> JsonTokenizer:
        """The tokenizer given by file name -> text, as a directory would hold them; `name` is for messages."""
        self = cls.__new__(cls)
        self._setup(files, name)
        return self

    def _setup(self, files: dict[str, str], name: str) -> None:
        self.name = name
        self._files = {key: text for key, text in files.items() if key in TOKENIZER_FILES}
        with complaint(f"{name}: {MAIN} is not a valid tokenizer"):
            self._tk, parsed = _Tokenizer.from_str(files[MAIN]), json.loads(files[MAIN])
            template = _template_front(self._tk, parsed)
            self._decoder = _decoder_kind(parsed)
        # Stored truncation, padding and templates would change or add tokens, or trim their offsets.
        self._tk.no_truncation()
        self._tk.no_padding()
        self._tk.post_processor = None
        self._vocab = self._tk.get_vocab(with_added_tokens=True)
        if not self._vocab:
            raise AtomError(f"{name}: {MAIN} has an empty vocabulary")
        self.vocab_size = max(self._vocab.values()) + 1
        if self.vocab_size > _MOST_IDS:
            raise AtomError(f"{name}: {MAIN} has id {self.vocab_size - 1}; ids must be below {_MOST_IDS}")
        tables = {key: _table(text, f"{name}: {key}") for key, text in files.items() if key in _SPECIAL + _MODEL}
        # Embedding tables are often padded; ids of padding rows can be sampled and stand for no text.
        padded = tables.get("config.json", {}).get("vocab_size")
        self._n_ids = max(self.vocab_size, padded) if type(padded) is int else self.vocab_size
        self.bos_id = next(iter(self._special(tables, "bos")), None)
        self.eos_ids = tuple(self._special(tables, "eos"))
        self.front = self._front(tables, template)
        self.own_pad_id = next(iter(self._special(tables, "pad")), None)
        self.pad_id = next((i for i in (self.own_pad_id, *self.eos_ids) if i is not None), 0)

    def _front(self, tables: dict[str, dict], template: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [i for i in template if not 0 <= i < self._n_ids]
        if wrong:
            raise AtomError(f"{self.name}: the template of {MAIN} has id {wrong[0]}, beyond the vocabulary")
        # As transformers does: what this file says has the last word, where there is a bos.
        explicit = tables.get("tokenizer_config.json", {}).get("add_bos_token")
        if type(explicit) is not bool or self.bos_id is None:
            return template
        return (self.bos_id,) if explicit else ()

    def _special(self, tables: dict[str, dict], kind: str) -> list[int]:
        found = []
        for key in _SPECIAL:
            token = tables.get(key, {}).get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in self._vocab:
                found.append(self._vocab[token])
        for key in reversed(_MODEL):
            ids = tables.get(key, {}).get(f"{kind}_token_id")
            found += [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and 0 <= i < self._n_ids]
        return list(dict.fromkeys(found))

    def padded(self, rows: int) -> JsonTokenizer:
        """See `tokenizers.padded`."""
        self._n_ids = max(self._n_ids, rows)
        return self

    @property
    def backend(self) -> _Tokenizer:
        """The tokenizer of the `tokenizers` package, without template, padding and truncation."""
        return self._tk

    @property
    def kind(self) -> str:
        """How tokens are spelled: "bytes" in GPT-2's alphabet, "spaces" as SentencePiece does, or "other"."""
        return self._decoder.partition(",")[0]

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns i32 [n], without bos or eos. Bytes are UTF-8; AtomError when they, or a lone surrogate, are not."""
        return np.asarray(self._encoding(_valid(text)).ids, np.int32)

    def _encoding(self, text: str) -> Encoding:
        with complaint(f"{self.name}: {MAIN} cannot encode this text"):
            return self._tk.encode(text, add_special_tokens=False)

    def decode(self, ids: Any) -> str:
        """Returns the text of `ids`, names of special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Any) -> bytes:
        """Returns exactly the bytes that `ids` stand for. AtomError for ids outside the vocabulary.

        Exact for byte-level and byte-fallback vocabularies; others (WordPiece) go through their own decoder.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        wrong = ids[(ids < 0) | (ids >= self._n_ids)]
        if wrong.size:
            raise AtomError(f"Token id {wrong[0]} is outside the vocabulary of {self._n_ids} ({self.name}).")
        if self._decoder == "other":
            with complaint(f"{self.name}: {MAIN} cannot decode these ids"):
                return self._tk.decode(ids.tolist(), skip_special_tokens=False).encode("utf-8")
        out = b"".join(self.pieces.get(i, b"") for i in ids.tolist())
        if self._decoder == "spaces, first dropped" and out.startswith(b" "):
            return out[1:]
        return out

    def spans(self, text: str | bytes) -> tuple[np.ndarray, np.ndarray]:
        """Returns (ids i32 [n], spans i32 [n, 2]): token i covers bytes spans[i, 0]:spans[i, 1] of the UTF-8 text.

        Byte-level vocabularies: the spans tile the text, and a token may hold a part of a character. Where such a
        tokenizer rewrites the text first (Unicode normalisation), and for all others, spans follow the characters
        that each token came from, so that several tokens of one character share its span.
        """
        text = _valid(text)
        encoding = self._encoding(text)
        ids = np.asarray(encoding.ids, np.int32)
        if self._decoder == "bytes":
            pieces = [self.pieces.get(i, b"") for i in encoding.ids]
            if b"".join(pieces) == text.encode("utf-8"):
                bounds = np.cumsum([0, *map(len, pieces)], dtype=np.int32)
                return ids, np.stack([bounds[:-1], bounds[1:]], axis=1)
        spans = _byte_bounds(text)[np.asarray(encoding.offsets, np.int64).reshape(-1, 2)]
        if self._decoder == "bytes" and len(spans):
            # Characters that normalisation merged into the one before (combining marks) belong to its token.
            spans[:-1, 1] = np.maximum(spans[:-1, 1], spans[1:, 0])
            spans[-1, 1] = len(text.encode("utf-8"))
        return ids, spans

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that the tokenizer came with into `directory`, byte for byte.

        Without a tokenizer_config.json, a small one is made, so that transformers finds the special tokens.
        """
        files = dict(self._files)
        if "tokenizer_config.json" not in files:
            config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
            for kind, i in (("bos", self.bos_id), ("eos", next(iter(self.eos_ids), None))):
                if i is not None and (token := self._tk.id_to_token(i)) is not None:
                    config[f"{kind}_token"] = token
            files["tokenizer_config.json"] = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        for name, text in files.items():
            (Path(directory) / name).write_text(text, "utf-8", newline="")

    def with_special(self, tokens: dict[str, str]) -> JsonTokenizer:
        """The same tokenizer with these names of special tokens ({"eos_token": "</s>"}) where its files say none."""
        config = tokens | json.loads(self._files.get("tokenizer_config.json", "{}"))
        files = self._files | {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
        return JsonTokenizer.from_files(files, self.name)

    @functools.cached_property
    def pieces(self) -> dict[int, bytes]:
        """Token id -> the bytes it stands for."""
        to_bytes = _byte_level_piece if self._decoder == "bytes" else _spaced_piece
        pieces = {i: to_bytes(token) for token, i in self._vocab.items()}
        # Added tokens are matched in the raw text, so they stand for their own name.
        added = self._tk.get_added_tokens_decoder()
        return pieces | {i: token.content.encode("utf-8") for i, token in added.items() if self._stands_out(token)}

    def _stands_out(self, token: AddedToken) -> bool:
        """Whether an added token is no entry of the model's own: SentencePiece vocabularies list runs of spaces among
        the added tokens again."""
        return token.special or self._decoder == "bytes" or self._tk.model.token_to_id(token.content) is None

    @property
    def digest(self) -> str:
        """SHA-256 of tokenizer.json."""
        return hashlib.sha256(self._files[MAIN].encode("utf-8")).hexdigest()

    @property
    def chat_template(self) -> str | None:
        """The template that came with the tokenizer, or None."""
        config = json.loads(self._files.get("tokenizer_config.json", "{}"))
        return self._files.get("chat_template.jinja", config.get("chat_template"))


def in_directory(path: Path) -> JsonTokenizer | None:
    """The tokenizer of a model's directory. None where there is none, with a warning that names its file where it is
    of a kind that is not read."""
    files = _files(path)
    if MAIN in files:
        return JsonTokenizer.from_files(files, str(path))
    unread = next((name for name in _UNREAD if (path / name).exists()), None)
    if unread is not None:
        way = "transformers writes a tokenizer.json: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        logging.warning("%s: %s is not read, so the model has no tokenizer; %s", path, unread, way)
    return None


def _files(path: Path) -> dict[str, str]:
    """What a directory says about its tokenizer, by file name; vocab.json and merges.txt as the tokenizer.json that
    they are equal to."""
    files = {name: _read(path / name) for name in TOKENIZER_FILES + _MODEL if (path / name).exists()}
    if MAIN not in files and (path / VOCABULARY).exists() and (path / MERGES).exists():
        tables = {name: _table(text, str(path / name)) for name, text in files.items() if name.endswith(".json")}
        vocab = _table(_read(path / VOCABULARY), str(path / VOCABULARY))
        main = byte_level.from_tables(vocab, _read(path / MERGES), tables, str(path))
        files |= {} if main is None else {MAIN: main}
    return files


def _template_front(tk: _Tokenizer, parsed: dict[str, Any]) -> tuple[int, ...]:
    """The ids that a tokenizer's template puts before a text; found with a text of one token, whatever its words.
    KeyError for a template whose tokens it does not list."""
    processor = parsed.get("post_processor") or {}
    for template in processor.get("processors", [processor]):
        named = {piece["SpecialToken"]["id"] for piece in template.get("single", ()) if "SpecialToken" in piece}
        if unknown := named - template.get("special_tokens", {}).keys():
            raise KeyError(*unknown)  # the package itself would panic
    probe = _Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    if tk.post_processor is not None:
        probe.post_processor = tk.post_processor
    encoding = probe.encode("a")
    return tuple(encoding.ids[: encoding.sequence_ids.index(0)])


def _decoder_kind(parsed: dict[str, Any]) -> str:
    decoder = parsed.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return "bytes"
    if "ByteFallback" in kinds or kinds == ["Metaspace"]:
        drops = any(step.get("type") == "Strip" and step.get("start") for step in steps)
        spaced = steps[0].get("prepend_scheme", "always" if steps[0].get("add_prefix_space") else "never") != "never"
        return "spaces, first dropped" if drops or (kinds == ["Metaspace"] and spaced) else "spaces"
    return "other"


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _byte_level_piece(token: str) -> bytes:
    alphabet = byte_of_character()
    if all(c in alphabet for c in token):
        return bytes(alphabet[c] for c in token)
    return token.encode("utf-8")


def _spaced_piece(token: str) -> bytes:
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(SPACE, " ").encode("utf-8")


def _byte_bounds(text: str) -> np.ndarray:
    """i32 [len(text) + 1]: where each character begins in the UTF-8 text."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes > 0x7F).astype(np.int32) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)


def _valid(text: str | bytes) -> str:
    try:
        if isinstance(text, bytes):
            return text.decode("utf-8")
        text.encode("utf-8")
        return text
    except UnicodeDecodeError as e:
        raise AtomError(f"The text is not valid UTF-8 at byte {e.start}.") from None
    except UnicodeEncodeError as e:
        raise AtomError(f"The text has a lone surrogate at character {e.start}, which UTF-8 cannot hold.") from None


def _read(path: Path) -> str:
    try:
        return read_regular(path).decode("utf-8")
    except OSError as e:
        raise AtomError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise AtomError(f"{path}: not UTF-8 text") from None


def _table(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise AtomError(f"{where} is not valid JSON") from None
    if not isinstance(value, dict):
        raise AtomError(f"{where} is not a JSON object")
    return value
