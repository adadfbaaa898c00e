"""The wheel: every package, one copy of the configurations, what they need beside code."""

import pathlib
import zipfile

import pytest

import atom_jax
from atom_jax import config

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(wheel_file):
    """Names of the files in the wheel, and what METADATA and entry_points.txt say."""
    with zipfile.ZipFile(wheel_file) as archive:
        names = set(archive.namelist())
        info = {
            n.rpartition("/")[2]: archive.read(n).decode() for n in names if ".dist-info/" in n and "RECORD" not in n
        }
    return names, info


def test_everything_is_in_the_wheel_once(wheel):
    names, _ = wheel
    for top in ("atom_jax", "pallas_kernels"):
        assert {str(p.relative_to(ROOT)) for p in (ROOT / top).rglob("*.py")} <= names
    assert {f"atom_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")} <= names
    files = ("data/austen.txt.xz", "adapters/smollm2-135m-dms-4x/adapter.safetensors",
             "pretrained/reason-subset/model.safetensors")  # fmt: skip
    assert {f"atom_jax/{name}" for name in files} <= names
    assert not [n for n in names if n.startswith(("tests/", "configs/", "benchmarks/", "build/"))]


def test_it_says_its_version_and_its_program(wheel):
    _, info = wheel
    assert f"Version: {atom_jax.__version__}\n" in info["METADATA"]
    assert "atom-jax = atom_jax.__main__:entry" in info["entry_points.txt"]


def test_configurations_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load_file("configs/lm.py:tiny") == config.load_file(f"{ROOT}/configs/lm.py:tiny")
    # One of one's own comes first.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lm.py").write_text("VARIANTS = {'tiny': lambda: 3}")
    assert config.load_file("configs/lm.py:tiny") == 3
