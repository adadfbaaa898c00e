"""Every notebook runs from its first cell to its last, with the package as its wheel installs it."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests import quick

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODELS = ROOT / "models"
# Layers one after another in a loop, as in the fixture `scanned`.
SCANNED = "from atom_jax.session import laid_out\nlaid_out.unrolls = lambda lm: False"


def small(source: str) -> str:
    """A cell in which numbers with a name in capitals, how many steps or episodes there are, are a tenth."""
    return re.sub(r"^([A-Z]+) = (\d+)$", lambda found: f"{found[1]} = {int(found[2]) // 10}", source, flags=re.M)


@pytest.fixture(scope="module")
def place(wheel_file, tmp_path_factory):
    """A directory with the notebooks, and beside it the wheel's packages, away from the repository."""
    place = tmp_path_factory.mktemp("notebooks")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place / "site", wheel_file]
    subprocess.run(command, check=True)
    shutil.copytree(ROOT / "notebooks", place / "notebooks")
    if MODELS.is_dir():
        (place / "models").symlink_to(MODELS)
    return place


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, place, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra: pip install 'atom-jax[dev]'")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(place / "site"))
    if "smollm2.fetch" in path.read_text() and not (MODELS / "smollm2-135m-instruct").is_dir():
        pytest.skip("needs SmolLM2: make smollm2")
    # One device, as where they are meant to run.
    monkeypatch.setenv("XLA_FLAGS", quick.FLAGS)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = small(cell.source)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SCANNED))
    notebook.cells.append(nbformat.v4.new_code_cell("print(atom_jax.__file__)"))
    where = {"metadata": {"path": str(place / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=900, resources=where).execute()
    assert notebook.cells[-1].outputs[0].text.startswith(str(place / "site"))
