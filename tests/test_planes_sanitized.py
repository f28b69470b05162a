"""The core's CPU sources under the address, undefined-behaviour and thread sanitizers, by a driver without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if not path.name.endswith("_module.cpp")]
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]


@pytest.mark.parametrize(("sanitizers", "parts"), [("address,undefined", []), ("thread", ["rows"])])
def test_the_core_under_sanitizers(tmp_path: Path, sanitizers: str, parts: list[str]) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++") or os.environ.get("CXX")
    if compiler is None:
        pytest.skip("no C++ compiler")
    options = ["-std=c++17", "-O1", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    tried = subprocess.run([*compiler.split(), *options, empty, "-o", tmp_path / "empty"], capture_output=True)
    if tried.returncode or subprocess.run([tmp_path / "empty"], capture_output=True).returncode:
        pytest.skip(f"{compiler} builds nothing that runs with -fsanitize={sanitizers}")
    driver = tmp_path / "driver"
    files = [ROOT / "tests" / "sanitize_core.cpp", *SOURCES]
    built = subprocess.run(
        [*compiler.split(), *options, *WARNINGS, "-I", ROOT / "csrc", *files, "-o", driver],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([driver, *parts], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert int(ran.stdout.split()[0]) > 100_000, "every part ran"
