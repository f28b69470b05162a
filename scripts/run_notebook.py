"""Run a notebook's cells as Jupyter would, without Jupyter, and keep what they show.

    python scripts/run_notebook.py docs/walkthrough.ipynb            run it in the folder where you are
    python scripts/run_notebook.py docs/walkthrough.ipynb --write    and put the outputs into the file

What a cell prints, the value of its last line and its figures become its outputs.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run the notebook; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="put the outputs into the file")
    args = parser.parse_args(argv)
    notebook = run_notebook(args.notebook)
    if args.write:
        args.notebook.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def run_notebook(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of all its cells. What a cell raises is raised, with a note that names the cell."""
    import matplotlib as mpl

    mpl.use("agg")
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(code, 1):
        try:
            outputs = _run("".join(cell["source"]), f"{path.name}, cell {number}", names)
        except Exception as error:
            error.add_note(f"in cell {number} of {path}")
            raise
        for output in outputs:
            if output["output_type"] == "execute_result":
                output["execution_count"] = number
        cell |= {"execution_count": number, "outputs": outputs}
    return notebook


def _run(source: str, where: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one cell; its outputs."""
    from matplotlib import pyplot as plt

    body = ast.parse(source, where).body
    last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    value: Any = None
    outputs: list[dict[str, Any]] = []
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), where, "exec"), names)
        if last is not None:
            value = eval(compile(last, where, "eval"), names)
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    figures = [plt.figure(number) for number in plt.get_fignums()]
    for figure in figures:
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=80, metadata={"Software": None})
        shown = {"image/png": base64.b64encode(data.getvalue()).decode() + "\n", "text/plain": [repr(figure)]}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": shown})
    plt.close("all")
    if value is not None and not figures:
        data_of: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if html := getattr(value, "_repr_html_", lambda: None)():
            data_of["text/html"] = html.splitlines(keepends=True)
        outputs.append({"output_type": "execute_result", "metadata": {}, "data": data_of})
    return outputs


if __name__ == "__main__":
    sys.exit(main())
