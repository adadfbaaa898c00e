"""The benchmark of the server, at the least size."""

import json
import subprocess
import sys

import atom_jax
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM
from tests.reliability import rows as examples


def run(**flags):
    command = [sys.executable, "-m", "benchmarks.serve", *(f"--{name}={value}" for name, value in flags.items())]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_the_table(tmp_path):
    plain = examples.plain("llama", "plain")
    atom_jax.save_hf(LM(plain.config, plain.params, ByteTokenizer()), tmp_path / "tiny")
    sizes = dict(requests=3, prompt_tokens=16, new_tokens=4, rows=2, alone=1, checked=2, cache_memory="8M")
    where = dict(checkpoint=tmp_path / "tiny", out=tmp_path / "out.json")
    done = run(adapters="", memory="tova:budget=9", **where, **sizes)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["everything", "tova:budget=9"]
    found = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert all(line["at_once"] == 2 and line["equal"] == "2 of 2" and line["many"] > 0 for line in found)


def test_bad_flags():
    for name, value in {"cache_memory": "much", "alone": 0}.items():
        done = run(**{"checkpoint": "tests/golden/hf_tiny/llama", "adapters": "", name: value})
        assert done.returncode != 0 and name in done.stderr and "Traceback" not in done.stderr
