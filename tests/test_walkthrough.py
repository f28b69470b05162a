"""The notebook of the docs, run cell by cell as a reader would."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "walkthrough.ipynb"


def run_notebook(path):
    spec = importlib.util.spec_from_file_location("run_notebook", ROOT / "scripts" / "run_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run_notebook(path)


def shown(notebook):
    """What kinds of things each code cell shows."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[(o["output_type"], sorted(o.get("data", {}))) for o in cell["outputs"]] for cell in cells]


def printed(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join(line for output in outputs for line in output.get("text", []))


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_the_file_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    on_file, ran = json.loads(NOTEBOOK.read_text(encoding="utf-8")), run_notebook(NOTEBOOK)
    assert shown(ran) == shown(on_file)
    effects = [[float(number) for number in re.findall(r"[+-]\d\.\d{3}", printed(one))] for one in (on_file, ran)]
    assert len(effects[0]) == 3
    assert effects[1] == pytest.approx(effects[0], abs=2e-3)


def test_a_cell_that_fails_is_named(tmp_path):
    cells = [{"cell_type": "code", "source": source, "outputs": []} for source in ("x = 1", "print(x)\n1 / 0")]
    (tmp_path / "broken.ipynb").write_text(json.dumps({"cells": cells}))
    with pytest.raises(ZeroDivisionError) as caught:
        run_notebook(tmp_path / "broken.ipynb")
    assert caught.value.__notes__ == [f"in cell 2 of {tmp_path / 'broken.ipynb'}"]
