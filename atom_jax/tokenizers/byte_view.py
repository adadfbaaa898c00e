"""A vocabulary by the bytes that its tokens stand for, so that any two can be compared."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import tokenizers

from atom_jax.tokenizers.byte_level import complaint
from atom_jax.tokenizers.bytes import ByteTokenizer, HNetByteTokenizer
from atom_jax.tokenizers.json_tokenizer import BYTE_TOKEN, SPACE, JsonTokenizer, byte_of_character
from atom_jax.typing import AtomError

# What special tokens are for, the more important the later, and names that published models give them. Where files
# name a bos, eos or pad, these have the last word.
ROLES = {
    "pad": ("<|pad|>", "<pad>"),
    "start_header": ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start_of_role|>"),
    "end_header": ("<|end_header_id|>", "<|end_of_role|>"),
    "eot": ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"),
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"),
    "bos": ("<|begin_of_text|>", "<s>", "<bos>"),
}
# Normalisers that make other text of a text. NFC only composes characters, as most texts have them already.
_LOSSY = {"NFKC", "NFD", "NFKD", "Nmt", "Precompiled", "Lowercase", "StripAccents", "BertNormalizer"}
_NUMBERS = "a 1990 2000 2024 100 1000 10000 7312849650317284"


@dataclasses.dataclass(frozen=True)
class ByteView:
    """A tokenizer's vocabulary as bytes.

    name: of the tokenizer, for messages. size: ids are below it; some may stand for nothing.
    pieces: id -> bytes of ordinary tokens. ids: bytes -> all tokens that stand for them, the one that texts get
        first: an entry of SentencePiece vocabularies comes before the byte token (<0x61>) for the same byte.
    byte_ids: the byte tokens among them.
    special: id -> name of tokens that stand for no text; they take no part in comparisons of bytes.
    roles: keys of ROLES -> id. unk: id for what is unknown, or None.
    cut(piece): the tokens that the model itself makes of some bytes, whatever they are, without normalising or
        splitting them first; [] where it has none.
    adds_space: whether texts get a space in front. rewrites: normalisers that change what texts say; composes:
        whether one composes their characters (NFC), which most texts have so already.
    digits: most digits of a number in one token.
    """

    name: str
    size: int
    pieces: dict[int, bytes]
    ids: dict[bytes, tuple[int, ...]]
    byte_ids: frozenset[int]
    special: dict[int, str]
    roles: dict[str, int]
    unk: int | None
    cut: Callable[[bytes], list[int]] = dataclasses.field(repr=False)
    adds_space: bool = False
    rewrites: tuple[str, ...] = ()
    composes: bool = False
    digits: int = 1

    @functools.cached_property
    def longest(self) -> int:
        """Bytes of the longest ordinary token."""
        return max(map(len, self.pieces.values()), default=0)

    @functools.cached_property
    def boundaries(self) -> tuple[int, ...]:
        """Ids before which a word is known to end: of special tokens, and of those that begin with a space, a tab or
        the end of a line."""
        spaced = [i for i, piece in self.pieces.items() if piece[:1] in (b" ", b"\n", b"\t")]
        return tuple(sorted({*self.special, *spaced} - {self.unk}))


def byte_view(tokenizer: Any) -> ByteView:
    """The view of a tokenizer.json (byte-level, SentencePiece style or WordPiece, of any model), or of bytes.

    Raises AtomError for other tokenizers, in which tokens stand for no bytes of their own.
    """
    if type(tokenizer) in (ByteTokenizer, HNetByteTokenizer):
        return _plain(tokenizer)
    if isinstance(tokenizer, JsonTokenizer):
        return _of_json(tokenizer)
    raise AtomError(f"{getattr(tokenizer, 'name', tokenizer)}: its tokens have no bytes that could be compared")


def _plain(tokenizer: ByteTokenizer) -> ByteView:
    named = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_ids[0], "pad": tokenizer.pad_id}
    roles = {role: i for role, i in named.items() if i is not None}
    pieces = {b: bytes([b]) for b in range(256) if b not in roles.values()}
    special = {i: f"<{role}>" for role, i in roles.items()}
    return ByteView(
        tokenizer.name, tokenizer.vocab_size, pieces, _by_bytes(pieces, {}, frozenset()), frozenset(), special,
        _completed(roles), None, lambda piece: [b for b in piece if b in pieces],
    )  # fmt: skip


def _of_json(tokenizer: JsonTokenizer) -> ByteView:
    tk, kind = tokenizer.backend, tokenizer.kind
    pieces, name = dict(tokenizer.pieces), tokenizer.name
    model = tk.model
    if kind == "other":
        if not isinstance(model, tokenizers.models.WordPiece):
            raise AtomError(f"{name}: neither byte-level, nor SentencePiece style, nor WordPiece")
        prefix = model.continuing_subword_prefix
        words = {i: tk.id_to_token(i) for i in pieces}
        pieces = {i: _word_piece(word, prefix) for i, word in words.items()}
    added = tk.get_added_tokens_decoder()
    named = {"bos": tokenizer.bos_id, "eos": next(iter(tokenizer.eos_ids), None), "pad": tokenizer.own_pad_id}
    unk = getattr(model, "unk_token", None)
    unk = None if unk is None else tk.token_to_id(unk)
    special = {i: token.content for i, token in added.items() if token.special}
    for i in (*named.values(), *tokenizer.eos_ids, unk):
        if i is not None and i in pieces:
            special.setdefault(i, tk.id_to_token(i))
    roles = {role: i for role, names in ROLES.items() for i, word in special.items() if word in names}
    roles |= {role: i for role, i in named.items() if i in special}
    pieces = {i: piece for i, piece in pieces.items() if i not in special and piece}
    byte_ids = frozenset(i for i in pieces if kind == "spaces" and BYTE_TOKEN.fullmatch(tk.id_to_token(i)))
    ids = _by_bytes(pieces, added, byte_ids)
    cut = functools.partial(_CUTS[kind], model, ids, unk, name)
    normalisers = _normalisers(tk)
    sample = [pieces.get(i, b"") for i in tokenizer.encode(_NUMBERS).tolist()]
    digits = max((len(p.strip()) for p in sample if p.strip().isdigit()), default=1)
    return ByteView(
        name, tokenizer.vocab_size, pieces, ids, byte_ids, special, _completed(roles), unk, cut,
        bool(sample) and sample[0].startswith(b" "), tuple(x for x in normalisers if x in _LOSSY),
        "NFC" in normalisers, digits,
    )  # fmt: skip


def _completed(roles: dict[str, int]) -> dict[str, int]:
    """In the order of ROLES; where nothing ends a turn, what ends a text does."""
    if "eot" not in roles and "eos" in roles:
        roles = roles | {"eot": roles["eos"]}
    return {role: roles[role] for role in ROLES if role in roles}


def _by_bytes(pieces: dict[int, bytes], added: dict[int, Any], byte_ids: frozenset[int]) -> dict[bytes, tuple]:
    found: dict[bytes, list[int]] = {}
    for i in sorted(pieces, key=lambda i: (i in byte_ids, i not in added, i)):
        found.setdefault(pieces[i], []).append(i)
    return {piece: tuple(ids) for piece, ids in found.items()}


def _word_piece(word: str, prefix: str) -> bytes:
    return (word.removeprefix(prefix) if word.startswith(prefix) else f" {word}").encode("utf-8")


def _normalisers(tk: Any) -> list[str]:
    """Names of the normalisers that it has."""

    def types(state: Any) -> list[str]:
        return [state["type"], *(name for one in state.get("normalizers", ()) for name in types(one))]

    return [] if tk.normalizer is None else types(json.loads(tk.normalizer.__getstate__()))


def _tokens(model: Any, text: str, unk: int | None, name: str) -> list[int]:
    with complaint(f"{name}: tokenizer.json cannot cut {text[:40]!r}"):
        return [token.id for token in model.tokenize(text) if token.id != unk] if text else []


def _cut_bytes(model: Any, ids: dict[bytes, tuple], unk: int | None, name: str, piece: bytes) -> list[int]:
    return _tokens(model, "".join(_character_of_byte()[b] for b in piece), unk, name)


def _cut_spaced(model: Any, ids: dict[bytes, tuple], unk: int | None, name: str, piece: bytes) -> list[int]:
    """Parts of characters at either end are cut into bytes."""
    first = next((i for i, b in enumerate(piece[:3]) if b & 0xC0 != 0x80), min(len(piece), 3))
    middle = piece[first:].decode("utf-8", errors="ignore")
    end = first + len(middle.encode("utf-8"))
    if piece[first:end].decode("utf-8", errors="replace") != middle:  # bytes that are no UTF-8 at all
        return _single(ids, piece)
    whole = _tokens(model, middle.replace(" ", SPACE), unk, name)
    return _single(ids, piece[:first]) + whole + _single(ids, piece[end:])


def _cut_words(model: Any, ids: dict[bytes, tuple], unk: int | None, name: str, piece: bytes) -> list[int]:
    """The longest entry first, as WordPiece does; [] where a part has none."""
    out, at = [], 0
    while at < len(piece):
        end = next((end for end in range(len(piece), at, -1) if piece[at:end] in ids), None)
        if end is None:
            return []
        out.append(ids[piece[at:end]][0])
        at = end
    return out


_CUTS = {"bytes": _cut_bytes, "spaces": _cut_spaced, "other": _cut_words}


def _single(ids: dict[bytes, tuple], piece: bytes) -> list[int]:
    return [ids[bytes([b])][-1] for b in piece if bytes([b]) in ids]


@functools.cache
def _character_of_byte() -> dict[int, str]:
    return {b: c for c, b in byte_of_character().items()}
