"""The shape of the package: imports point one way, and every verb is documented."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import pytest

import actcache
from actcache.cli import build_parser

PACKAGE = Path(actcache.__file__).parent
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
# A module imports only from modules to its left.
FLOW = [
    *(
        "errors",
        "finite",
        "files",
        "cpus",
        "progress",
        "sealed",
        "native",
        "planes",
        "zarr_codec",
        "carried",
        "prompts",
        "tokens",
        "checkpoint_files",
        "checkpoint",
        "lineup",
        "blocks",
        "probe",
        "packing",
        "linear",
        "readout",
        "regimes",
        "shape",
        "trunk",
    ),
    *("divergence", "gather", "store", "export", "rows", "feed"),
    *(
        "capture",
        "vectors",
        "edits",
        "moves",
        "workers",
        "replay",
        "sweep",
        "cells",
        "scores",
        "grid",
        "stability",
        "effects",
        "plan",
        "finished",
        "report",
        "run_folder",
        "cli",
    ),
]


def imported(path: Path) -> set[str]:
    """First names below ``actcache`` that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "actcache":
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("actcache.")}
    return names


def test_imports_point_one_way():
    modules = {path.stem: [path] for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    modules |= {folder: list((PACKAGE / folder).glob("*.py")) for folder in ("store", "report", "cli")}
    assert sorted(modules) == sorted(FLOW), "every module has a place in the flow"
    for name, paths in modules.items():
        for path in paths:
            for other in imported(path) - {name, "_core", "_cuda"}:
                assert FLOW.index(other) < FLOW.index(name), f"{path.name} imports {other}"


def test_importing_the_package_does_no_work():
    code = "import sys, actcache; print([m for m in ('torch', 'transformers', 'zarr', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_store_is_read_without_transformers():
    code = "import sys, actcache; actcache.open_store; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("name", verbs())
def test_every_verb_has_help_and_a_place_in_the_readme(name):
    parser = verbs()[name]
    assert parser.description
    for action in parser._actions:
        assert action.help, f"{name} {action.dest}"
    assert f"actcache {name}" in README


def test_the_tree_in_the_readme_names_every_module():
    for name in FLOW:
        assert f"{name}.py" in README or f"{name}/" in README, name
