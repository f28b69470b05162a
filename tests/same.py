"""Runs whose results must be the same wherever their jobs ran: one before its grid, and all that one holds."""

from __future__ import annotations

import shutil
from pathlib import Path

from shared import TinyRun

SEGMENTS = ("--shard-prompts", "2", "--limit", "6", "--boundary", "2,3", "--stability", "0", "--strict")


def fresh(captured: TinyRun, folder: Path) -> Path:
    """The same run before its grid."""
    shutil.copytree(captured.out, folder, ignore=shutil.ignore_patterns("cells*", "effects*", "report*", "timings*"))
    return folder


def results(folder: Path) -> dict[str, bytes]:
    """Every table and number of a run, and what its jobs left."""
    kinds = (".parquet", ".safetensors", ".json")
    every = (path for path in sorted(folder.rglob("*")) if path.suffix in kinds and "store" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in every if path.name != "timings.json"}
