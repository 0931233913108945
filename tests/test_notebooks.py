"""Every notebook runs from top to bottom; one of them in a kernel of its own."""
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbdev.test import test_nb as run_notebook

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_runs(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    passed, _ = run_notebook(path)
    torch.set_num_threads(1)
    assert passed, f"{path.relative_to(ROOT)} failed; the error is printed above"


def test_runs_in_a_kernel_of_its_own():
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "nbs")}}).execute()
    assert not any(o.output_type == "error" for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
