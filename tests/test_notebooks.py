"""Every notebook runs from its first cell to its last."""

import os
import pathlib
import re

import pytest

from tests import quick

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
# Layers one after another in a loop, as in the fixture `scanned`.
SCANNED = "from atom_jax.session import laid_out\nlaid_out.unrolls = lambda lm: False"


def small(source: str) -> str:
    """A cell in which numbers with a name in capitals, how many steps or episodes there are, are a tenth."""
    return re.sub(r"^([A-Z]+) = (\d+)$", lambda found: f"{found[1]} = {int(found[2]) // 10}", source, flags=re.M)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra: pip install 'atom-jax[dev]'")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(path.parent.parent), os.environ.get("PYTHONPATH", "")]))
    if path.stem == "smaller_memory" and not (path.parent.parent / "models" / "smollm2-135m-instruct").is_dir():
        pytest.skip("needs SmolLM2: make smollm2")
    # One device, as where they are meant to run.
    monkeypatch.setenv("XLA_FLAGS", quick.FLAGS)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = small(cell.source)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SCANNED))
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
