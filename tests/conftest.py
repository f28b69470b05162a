"""How tests are run: where their files lie, which come first, and what they start from."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from actcache.room import free_bytes

# How long one example takes is the machine's business: tests share it with others.
hypothesis.settings.register_profile("actcache", deadline=None)
hypothesis.settings.load_profile("actcache")

MAX_NEW = 24
BOUNDARY = 3  # round(0.6 * tiny.N_BLOCKS)
MEMORY = Path("/dev/shm")  # a file system there, on Linux
IN_MEMORY = "tests-of-actcache"
ROOM_BYTES = 8 * 2**30


def pytest_configure(config: pytest.Config) -> None:
    """Processes that run tests have the fixtures; the one that hands the tests out to others need not import torch."""
    hands_out = config.getoption("dist", "no") != "no" and config.getoption("tx", None)
    if hasattr(config, "workerinput") or not hands_out:
        gc.disable()  # until tests run: what is imported, and they, stay to the end
        config.pluginmanager.import_plugin("shared")
    put_temporary_files_in_memory(config)


def put_temporary_files_in_memory(config: pytest.Config) -> None:
    """Unless TMPDIR or --basetemp says where they lie, or there is no room: making and removing small files on a disk
    takes longer than most of the tests that do."""
    if "TMPDIR" in os.environ or config.option.basetemp or not MEMORY.is_dir():
        return
    for left in MEMORY.glob(f"{IN_MEMORY}-*"):  # by a process that was killed
        if not Path("/proc", left.name.rpartition("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    disk = os.statvfs(MEMORY)
    usable = os.access(MEMORY, os.W_OK) and not disk.f_flag & os.ST_NOEXEC
    if usable and min(disk.f_bavail * disk.f_frsize, free_bytes()) > ROOM_BYTES:
        place = MEMORY / f"{IN_MEMORY}-{os.getpid()}"
        place.mkdir(mode=0o700)
        config.add_cleanup(partial(shutil.rmtree, place, ignore_errors=True))
        os.environ["TMPDIR"] = str(place)  # processes that share out the tests have it, too
        tempfile.tempdir = None


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """Gone after the test where it lies in memory."""
    yield tmp_path
    if tmp_path.is_relative_to(MEMORY):
        shutil.rmtree(tmp_path, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: where processes share out the files, quick ones fill the time at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Collections of garbage begin, and look at what is there by now as little as they can."""
    gc.freeze()
    gc.enable()


def first_quick(values: Iterable[Any]) -> list[Any]:
    """Parameters of which all but the first are slow: ``make test-fast`` runs one of a kind."""
    first, *others = values
    return [first, *(pytest.param(one, marks=pytest.mark.slow) for one in others)]
