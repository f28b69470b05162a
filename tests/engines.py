"""The engines that do the native work, one or the other, for tests of both."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest

from actcache.native import native

each_engine = pytest.mark.parametrize("name", ["cpu", "torch"])


def native_core() -> ModuleType:
    """actcache._core, without which a test of it skips, or fails under ACTCACHE_REQUIRE_NATIVE=1."""
    try:
        return importlib.import_module("actcache._core")
    except ImportError as error:
        reason = f"actcache._core is not built: {error}"
        if os.environ.get("ACTCACHE_REQUIRE_NATIVE") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Gather with the torch engine, or with the native ones (``cpu``, ``cuda``)."""
    if name == "cpu":
        native_core()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACTCACHE_ENGINE", raising=False)
        if name == "torch":
            patch.setenv("ACTCACHE_ENGINE", "torch")
        native.cache_clear()
        yield
    native.cache_clear()


# The launcher's own shapes, from rows of thousands of bytes down to single elements, and two that it never takes.
BLOCKS = [(128, 1), (32, 4), (4, 32), (1, 128), (7, 3), (64, 1)]


def native_cuda() -> ModuleType:
    """actcache._cuda, or a skip where it was not built."""
    return pytest.importorskip("actcache._cuda", reason="actcache._cuda is not built", exc_type=ImportError)
