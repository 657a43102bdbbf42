"""The walk-through of two views runs from its top to its bottom, as its readers run it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.commands import ROOT

NOTEBOOK = ROOT / "examples" / "fraud_from_two_views.ipynb"


@pytest.mark.timeout(900)  # two trainings: minutes, where others work on the machine
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Jupyter's own
def test_the_notebook_runs_and_serves_what_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("HOME", tmp_path), ("CUSTOMERS", 60), ("DAYS", 45), ("STEPS", 10)):
        monkeypatch.setenv(f"TWO_VIEWS_{name}", str(value))
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(
        notebook, timeout=800, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    printed = "".join(out.get("text", "") for out in outputs)
    plots = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(plots) == 3
    for features in ("the payment alone", "+ the customer's view", "+ both views"):
        assert f"{features} " in printed
    compared, difference = printed.partition("compared ")[2].split(" rows, largest difference ")
    assert int(compared) > 0
    assert float(difference) < 1e-6
