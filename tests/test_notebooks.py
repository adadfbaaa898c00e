"""Every notebook runs from its first cell to its last."""

import os
import pathlib

import pytest

from tests import quick

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


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
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
