"""Builds the native core with CMake and ninja; everything else about the package is in pyproject.toml.

ACTCACHE_CUDA=0            build without CUDA even where nvcc is found
ACTCACHE_REQUIRE_NATIVE=1  fail where the toolchain is incomplete (otherwise torch and NumPy do its work)
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODULE_FILES = [f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_core", "_cuda")]


class CMakeBuild(build_ext):
    """One CMake build for both modules.

    An incomplete toolchain leaves the native core out, and says so; a toolchain that fails is an error.
    """

    def run(self) -> None:
        """Build, then copy the modules to where setuptools expects extensions.

        Raises:
            RuntimeError: something is missing and ACTCACHE_REQUIRE_NATIVE=1.
            subprocess.CalledProcessError: CMake or a compiler failed.
        """
        build = Path(self.build_temp).resolve() / "cmake"
        target = self._target()
        # A module of an earlier build must not pass for one of this build.
        shutil.rmtree(build, ignore_errors=True)
        for name in MODULE_FILES:
            (target / name).unlink(missing_ok=True)
        missing = _missing_tools()
        if missing:
            message = f"actcache: NO NATIVE CORE, for want of {', '.join(missing)}"
            if os.environ.get("ACTCACHE_REQUIRE_NATIVE") == "1":
                raise RuntimeError(f"{message}; install it, or unset ACTCACHE_REQUIRE_NATIVE to gather with torch")
            print(f"{message}: installing without; the torch engine will gather rows", file=sys.stderr)
            return
        import pybind11

        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure += [f"-DACTCACHE_CUDA={'OFF' if os.environ.get('ACTCACHE_CUDA') == '0' else 'ON'}"]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        target.mkdir(parents=True, exist_ok=True)
        for name in MODULE_FILES:
            if (build / name).exists():
                # By rename: a process that has the old module mapped keeps it.
                shutil.copy2(build / name, target / f"{name}.new")
                (target / f"{name}.new").replace(target / name)

    def get_outputs(self) -> list[str]:
        """The modules that were built."""
        return [str(path) for name in MODULE_FILES if (path := self._target() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing is linked back into the source tree: an editable install builds there."""
        return {}

    def _target(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "actcache"


def _missing_tools() -> list[str]:
    # CXX may carry a launcher and options: "ccache g++ -m64".
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    headers = Path(sysconfig.get_path("include"), "Python.h")
    found = {
        f"the C++ compiler named by CXX ({named[0]})" if named else "a C++ compiler (g++ or clang++, or set CXX)": any(
            shutil.which(name) for name in named or ("c++", "g++", "clang++")
        ),
        "cmake": shutil.which("cmake"),
        "ninja": shutil.which("ninja"),
        "pybind11": importlib.util.find_spec("pybind11"),
        f"the Python headers ({headers})": headers.exists(),
    }
    return [what for what, where in found.items() if not where]


# The files are named for the source distribution; CMakeLists.txt says what is built of them.
SOURCES = ["CMakeLists.txt", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir())]
setup(
    ext_modules=[Extension(f"actcache.{name}", [], depends=SOURCES) for name in ("_core", "_cuda")],
    cmdclass={"build_ext": CMakeBuild},
)
