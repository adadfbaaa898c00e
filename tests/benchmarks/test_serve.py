"""The benchmark of the server, at the least size."""

import json

import pytest
from absl.testing import flagsaver

import atom_jax
from atom_jax.tokenizers import ByteTokenizer
from atom_jax.typing import LM
from benchmarks import serve
from tests.reliability import rows as examples


def test_the_table(tmp_path, capsys):
    plain = examples.plain("llama", "plain")
    atom_jax.save_hf(LM(plain.config, plain.params, ByteTokenizer()), tmp_path / "tiny")
    sizes = dict(requests=3, prompt_tokens=16, new_tokens=4, rows=2, alone=1, checked=2, cache_memory="8M")
    with flagsaver.flagsaver(
        checkpoint=str(tmp_path / "tiny"),
        adapters=[],
        memory=["tova:budget=9"],
        out=str(tmp_path / "out.json"),
        **sizes,
    ):
        serve.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["everything", "tova:budget=9"]
    found = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert all(line["at_once"] == 2 and line["equal"] == "2 of 2" and line["many"] > 0 for line in found)
    with flagsaver.flagsaver(cache_memory="much"), pytest.raises(SystemExit):
        serve.main([])
    assert "benchmarks.serve: --cache_memory=much: expected" in capsys.readouterr().err
