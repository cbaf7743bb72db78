"""examples/own_data.ipynb runs from its first cell to its last, and is what docs/own-data.md says."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT, environment
from nbclient import NotebookClient
from PIL import Image

NOTEBOOK = ROOT / "examples/own_data.ipynb"
pytestmark = pytest.mark.docs


def test_its_cells_are_the_pages_blocks():
    page = (ROOT / "docs/own-data.md").read_text()
    blocks = re.findall(r"^<!-- runs -->\n```(?:sh|python)\n(.*?)\n```", page, re.MULTILINE | re.DOTALL)
    cells = [c.source.removeprefix("%%bash\n") for c in nbformat.read(NOTEBOOK, as_version=4).cells]
    assert len(blocks) == 6 and [b for b in blocks if b not in cells] == []


def test_it_is_committed_without_outputs():
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    assert all(not c.outputs and c.execution_count is None for c in book.cells if c.cell_type == "code")


@pytest.mark.timeout(600)
def test_it_runs(tmp_path, monkeypatch):
    """In an empty folder: 30 pictures, a trained model, predictions."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(book, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [o for c in book.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(shown) == 3
    assert json.loads((tmp_path / "runs/mine/best.json").read_text())["miou"] > 0.2
    masks = [np.asarray(Image.open(f)) for f in (tmp_path / "found/masks").glob("*.png")]
    assert len(masks) == 30 and any(m.any() for m in masks)
