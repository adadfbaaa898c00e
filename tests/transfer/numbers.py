"""Reference numbers of the peers' own functions, and the three small tokenizers that they were made with."""

import functools
import json
import pathlib

import numpy as np

from atom_jax.tokenizers.byte_view import byte_view
from atom_jax.tokenizers.json_tokenizer import JsonTokenizer, byte_of_character

DIRECTORY = pathlib.Path(__file__).resolve().parent.parent / "golden" / "transfer"
# What files beside their tokenizer.json would say.
ENDS = {
    "gpt2like": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "qwenlike": {"eos_token": "<|endoftext|>"},
}


@functools.cache
def numbers(name):
    return json.loads((DIRECTORY / f"{name}.json").read_text())


@functools.cache
def tokenizer(name):
    files = {"tokenizer.json": (DIRECTORY / f"tokenizer_{name}.json").read_text()}
    if name in ENDS:
        files["tokenizer_config.json"] = json.dumps(ENDS[name])
    return JsonTokenizer.from_files(files, name)


@functools.cache
def view(name):
    return byte_view(tokenizer(name))


def array(values, dtype=np.float64):
    return np.array(values, dtype)


def spelled(token):
    """The bytes of a token in GPT-2's alphabet."""
    return bytes(byte_of_character()[c] for c in token)
