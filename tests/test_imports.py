"""Arrows between packages go one way (DESIGN: who may import whom)."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Lower numbers know nothing of higher ones; packages of one level may know each other.
LEVEL = {"typing": 0, "files": 0, "config": 0, "params": 1, "sharding": 1, "tokenizers": 1, "nn": 2, "kvcache": 3}
LEVEL |= {"chunking": 3, "models": 4, "transfer": 5, "data": 5, "checkpoint": 6, "data.fetch": 7, "training": 7}
LEVEL |= {"inference": 7, "evaluation": 8, "flax_bridge": 8, "aot": 9, "__init__": 9, "__main__": 9}
FILES = sorted((ROOT / "atom_jax").rglob("*.py")) + sorted((ROOT / "pallas_kernels").rglob("*.py"))


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


def level(module: str) -> int:
    """Of atom_jax.PACKAGE.NAME; a room inside a package may have its own."""
    parts = module.split(".")[1:]
    return LEVEL.get(".".join(parts[:2]), LEVEL.get(parts[0], 0))


def top_level(path: pathlib.Path) -> set[str]:
    """Modules imported when the file is imported, not inside a function."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    names = imported(path)
    if parts[0] == "pallas_kernels":
        assert not [n for n in names if n.startswith("atom_jax")]
        return
    for name in top_level(path):
        if name.startswith("atom_jax."):
            assert level(name) <= level(".".join(parts)), f"{path.name} imports {name}"
    roots = {n.split(".")[0] for n in names}
    if "orbax" in roots:
        assert parts[1:] == ("checkpoint", "store")
    if parts[1:] != ("flax_bridge",):
        assert not [n for n in names if n.startswith(("flax.linen", "flax.nnx"))]
    if parts[1] in ("data", "tokenizers"):
        assert not roots & {"jax", "flax", "optax"}


@pytest.mark.parametrize(
    "path", [*FILES, *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.py")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 400
