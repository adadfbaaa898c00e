"""Tokenizers made from a run's own text: byte-level BPE, unigram, and words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from atom_jax.tokenizers import is_trained
from atom_jax.tokenizers.json_tokenizer import MAIN, JsonTokenizer
from atom_jax.typing import AtomError

SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")
UNKNOWN = "<|unk|>"


def train(name: str, texts: Iterable[bytes]) -> JsonTokenizer:
    """Returns the tokenizer "bpe:SIZE", "unigram:SIZE" (Kudo 2018) or "words:SIZE" of some text.

    texts: UTF-8, in parts small enough (some KB) that one without spaces is no trouble. For the first two, texts are
    bytes in GPT-2's alphabet, first split into words, numbers, signs and spaces as GPT-2 does; every byte is an
    entry, so any text goes there and back. Words are what lies between blanks, the most frequent ones; others are one
    unknown token, with id 3. Ids 0 to 2 are bos, eos and pad; no text contains them, whatever it says. The same text
    gives the same tokenizer. A text too small for SIZE entries gets fewer. Raises AtomError for another name.
    """
    if not is_trained(name):
        raise AtomError(f"{name}: expected bpe:SIZE, unigram:SIZE or words:SIZE")
    kind, size = name.split(":")
    options = {"vocab_size": int(size), "special_tokens": list(SPECIALS), "show_progress": False}
    if kind == "words":
        options["special_tokens"].append(UNKNOWN)
        tk, trainer = _Tokenizer(models.WordLevel(unk_token=UNKNOWN)), trainers.WordLevelTrainer(**options)
        tk.pre_tokenizer, tk.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe = kind == "bpe"
        tk = _Tokenizer(models.BPE() if bpe else models.Unigram())
        trainer = (trainers.BpeTrainer if bpe else trainers.UnigramTrainer)(**options)
        tk.pre_tokenizer, tk.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tk.post_processor = processors.TemplateProcessing(f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], 0)])
    tk.train_from_iterator((text.decode("utf-8") for text in texts), trainer)
    parsed = json.loads(tk.to_str())
    # As mere entries of the vocabulary, the special tokens are not looked for in texts.
    parsed["added_tokens"] = []
    if kind == "unigram":
        parsed["model"]["vocab"] = _settled(parsed["model"]["vocab"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= zip(("bos_token", "eos_token", "pad_token"), SPECIALS)
    files = {
        MAIN: json.dumps(parsed, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    return JsonTokenizer.from_files(files, name)


def _settled(vocab: list[list[Any]]) -> list[list[Any]]:
    """A unigram vocabulary [[piece, score]] without what differs between two trainings on one text.

    The trainer adds scores in a random order, which changes their last digits, and gives bytes that its model does
    without the lowest score plus up to 0.026, in a random order.
    """
    specials, pieces = vocab[: len(SPECIALS)], vocab[len(SPECIALS) :]
    low = min(score for _, score in pieces)
    scores = {p: round(low if len(p) == 1 and s < low + 0.03 else s, 3) for p, s in pieces}
    return specials + [[p, s] for p, s in sorted(scores.items(), key=lambda item: (-item[1], item[0]))]
