"""The benchmark of a lasting memory, at the least size."""

import json
import subprocess
import sys

import atom_jax
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM
from tests.reliability import rows as examples


def run(**flags):
    command = [sys.executable, "-m", "benchmarks.lasting", *(f"--{name}={value}" for name, value in flags.items())]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_the_table(tmp_path):
    plain = examples.plain("llama", "plain")
    atom_jax.save_hf(LM(plain.config, plain.params, ByteTokenizer()), tmp_path / "tiny")
    sizes = dict(tokens=40, prompt_tokens=24, asked_tokens=3, new_tokens=2, far_tokens=60, part=8, repeats=2)
    out = tmp_path / "out.json"
    done = run(checkpoint=tmp_path / "tiny", out=out, choice="whole=16,pages=2,page=4,stride=2", **sizes)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    names = ["read", "read, next to states only", "decode", "choice, 52 entries resident"]
    assert [row["name"] for row in rows] == names
    assert all(len(row["memory"]) == len(row["without"]) == 2 and row["ratio"] > 0 for row in rows)
    assert all(name in done.stdout for name in names)


def test_bad_flags():
    for name, value in {"choice": "pages=0", "tokens": 5}.items():
        done = run(**{"checkpoint": "tests/golden/hf_tiny/llama", "part": 8, "far_tokens": 0, name: value})
        assert done.returncode == 1 and name in done.stderr and "Traceback" not in done.stderr
