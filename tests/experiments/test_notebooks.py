"""The quickstart notebook; tests/analysis/test_analysis.py executes explore_run.ipynb."""

import re

import nbclient
import nbformat

from tests.helpers import ROOT

NOTEBOOKS = ROOT / "experiments" / "notebooks"


def execute(name, replacements):
    """Execute a notebook after replacing texts; return the outputs of all cells and the printed text."""
    source = (NOTEBOOKS / name).read_text()
    for text, replacement in replacements.items():
        assert text in source
        source = source.replace(text, replacement)
    notebook = nbformat.reads(source, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=900, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return outputs, "".join(output.get("text", "") for output in outputs)


def count_pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_the_quickstart_notebook_shows_that_imp_beats_reinit(optimised, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    outputs, printed = execute(
        "quickstart.ipynb", {"settings.epochs = 5": "settings.epochs = 3", "replicates = 2": "replicates = 1"}
    )
    assert count_pictures(outputs) == 3  # accuracy, angles, a path
    imp, reinit = (
        float(x) for x in re.search(r"density 1\.0%: imp ([\d.]+)%, reinit ([\d.]+)%", printed).groups()
    )
    assert imp > reinit  # at a density of 0.6⁹
    assert 0 < float(re.search(r"angle between rounds 5 and 6: ([\d.]+)", printed)[1]) < 0.5
