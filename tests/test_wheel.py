"""The package as people install it: a wheel built from the sdist, with a compiler and without, in a new environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pyarrow.parquet as pq
import pytest

import actcache

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCES = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "runs", "pairs")
KINDS = ("native core", "no compiler")


def build(what: str, source: Path, out: Path, **environment: str) -> Path:
    """``build_sdist`` or ``build_wheel`` of the project's backend, with what is installed here."""
    command = "import sys, setuptools.build_meta as backend; backend.{}(sys.argv[1])"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACTCACHE_")}
    ran = subprocess.run(
        [sys.executable, "-c", command.format(what), out],
        cwd=source,
        capture_output=True,
        text=True,
        env=clean | environment,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """Each of KINDS: the wheel, built from nothing but the sdist."""
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("packages")
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCES)
    for name in ("sdist", "nothing", *KINDS):
        (folder / name).mkdir()
    with tarfile.open(build("build_sdist", source, folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    without = {"PATH": str(folder / "nothing"), "CXX": ""}
    return {
        "no compiler": build("build_wheel", unpacked, folder / "no compiler", **without),
        "native core": build(
            "build_wheel", unpacked, folder / "native core", ACTCACHE_CUDA="0", ACTCACHE_REQUIRE_NATIVE="1"
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_wheel_holds_the_package_and_nothing_else(wheels, kind):
    held = {name for name in ZipFile(wheels[kind]).namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "actcache").rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so")]
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    expected |= {f"actcache/benches/{path.name}" for path in (ROOT / "benches").glob("*.[pj]*")}
    native = {name for name in held if name.endswith(".so")}
    assert held - native == expected
    assert len(native) == (kind == "native core")


def elsewhere() -> dict[str, str]:
    """The environment of a process that shall find nothing of this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "ACTCACHE_ENGINE")}


def installed(wheel: Path, folder: Path) -> Path:
    """A new environment with this wheel, which finds all else where this one has it; its folder of programs."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet"]
    subprocess.run([*map(str, pip), "--no-deps", "--no-index", "--no-compile", str(wheel)], check=True, env=elsewhere())
    places = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(places) + "\n")
    return folder / "bin"


def test_what_is_installed_runs(wheels, tmp_path):
    """The shipped pair, on a few prompts: with the native core and without, cells are equal to rounding."""
    margins = {}
    for kind, wheel in wheels.items():
        folder = tmp_path / kind
        programs = installed(wheel, folder)

        def ran(*command, folder=folder):
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=elsewhere(), cwd=folder)
            assert done.returncode == 0, done.stderr
            return done.stdout

        assert ran(programs / "actcache", "--version").strip() == actcache.__version__
        code = "import json, actcache.native as n; print(json.dumps([n.__file__, n.native('cpu')[1]]))"
        where, core = json.loads(ran(programs / "python", "-c", code))
        assert Path(where).is_relative_to(folder)
        assert core.startswith("actcache._core 0." if kind == "native core" else "actcache._core is not built")
        demo = Path(where).parent / "demo"
        words = ["--pt", demo / "pt", "--it", demo / "it", "--prompts", demo / "prompts.jsonl", "--out", "run"]
        ran(programs / "actcache", "run", *words, "--limit", 6, "--max-new", 24, "--stability", 0)
        assert (folder / "run" / "report.html").stat().st_size > 10_000
        cells = pq.read_table(folder / "run" / "cells.parquet").to_pylist()
        keys = ("event_id", "upstream", "late", "readout", "scope")
        margins[kind] = {tuple(cell[key] for key in keys): cell["margin"] for cell in cells}
    assert margins["no compiler"] == pytest.approx(margins["native core"], abs=1e-3)
    assert len(margins["no compiler"]) >= 12
