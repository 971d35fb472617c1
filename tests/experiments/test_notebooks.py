"""The notebooks run from top to bottom."""

import re

import nbclient
import nbformat

from tests.helpers import ROOT

NOTEBOOKS = ROOT / "experiments" / "notebooks"


def execute(name):
    """The outputs of all cells, and what was printed."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return outputs, "".join(output.get("text", "") for output in outputs)


def pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_quickstart(optimised, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    outputs, printed = execute("quickstart.ipynb")
    assert pictures(outputs) == 3  # accuracy, angles, a path
    imp, reinit = (
        float(x) for x in re.search(r"density 1\.0%: imp ([\d.]+)%, reinit ([\d.]+)%", printed).groups()
    )
    assert imp > reinit  # 0.6⁹ of the weights
    assert 0 < float(re.search(r"angle between rounds 5 and 6: ([\d.]+)", printed)[1]) < 0.5
