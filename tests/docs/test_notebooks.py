"""The notebooks run from the first cell to the last, one after the other in an empty folder."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_the_notebooks_are_valid_and_hold_no_output():
    assert len(NOTEBOOKS) == 5
    for path in NOTEBOOKS:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        cells = [cell for cell in book.cells if cell.cell_type == "code"]
        assert not [cell for cell in cells if cell.outputs or cell.execution_count], path.name
        assert path.stat().st_size < 20_000


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of jupyter's own packages
def test_the_notebooks_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # for %%bash
    for path in NOTEBOOKS:  # the first trains the run that the others use
        book = nbformat.read(path, as_version=4)
        NotebookClient(book, timeout=1_800, resources={"metadata": {"path": str(tmp_path)}}).execute()
        pictures = [o for c in book.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
        assert len(pictures) == {"1": 3, "2": 1, "5": 1}.get(path.name[0], 0), path.name
