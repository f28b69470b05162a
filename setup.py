"""Builds the native core with CMake and ninja; everything else about the package is in pyproject.toml.

ACTCACHE_CUDA=0            build without CUDA even where nvcc is found
ACTCACHE_REQUIRE_NATIVE=1  fail where there is no C++ compiler (otherwise the package installs and gathers with torch)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULES = ("_core", "_cuda")


class CMakeBuild(build_ext):
    """One CMake build for all modules.

    Only a missing compiler leaves the native core out, and says so; a compiler that fails is an error.
    """

    def run(self) -> None:
        """Build, then copy the modules to where setuptools expects extensions."""
        if not _has_compiler():
            if os.environ.get("ACTCACHE_REQUIRE_NATIVE") == "1":
                raise RuntimeError(
                    "no C++ compiler found and ACTCACHE_REQUIRE_NATIVE=1; install g++ or clang++, or set CXX"
                )
            print(
                "actcache: NO C++ COMPILER FOUND: installing without the native core; torch will gather",
                file=sys.stderr,
            )
            self.extensions = []
            return
        import pybind11

        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "--fresh",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DACTCACHE_CUDA={'OFF' if os.environ.get('ACTCACHE_CUDA') == '0' else 'ON'}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        target = ROOT / "actcache" if self.inplace else Path(self.build_lib).resolve() / "actcache"
        target.mkdir(parents=True, exist_ok=True)
        for name in MODULES:
            for stale in target.glob(f"{name}.*.so"):
                stale.unlink()
            for built in build.glob(f"{name}.*.so"):
                shutil.copy2(built, target / built.name)

    def get_outputs(self) -> list[str]:
        """The modules that were built."""
        target = Path(self.build_lib) / "actcache"
        return [str(path) for name in MODULES for path in target.glob(f"{name}.*.so")]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is linked back into the source tree."""
        return {}


def _has_compiler() -> bool:
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ([named] if named else ["c++", "g++", "clang++"]))


setup(ext_modules=[Extension(f"actcache.{name}", []) for name in MODULES], cmdclass={"build_ext": CMakeBuild})
