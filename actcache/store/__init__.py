"""The store: states, events and what identifies them, in Zarr v3, as immutable checksummed segments (see FORMAT.md).

``storage`` and ``objects`` are where files lie, ``segment_data`` says what a segment holds, ``layout`` how it lies
there, ``shard`` encodes and decodes one array. ``writer`` makes and commits segments, ``background`` does so beside
other work, ``reader`` reads committed ones, ``verify`` re-reads everything, ``compact`` merges small ones. Knows files
and rows; knows no models.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actcache.store.background import BackgroundWriter as BackgroundWriter
    from actcache.store.compact import compact as compact
    from actcache.store.reader import Store as Store
    from actcache.store.reader import open_store as open_store
    from actcache.store.segment import Segment as Segment
    from actcache.store.segment_data import SegmentData as SegmentData
    from actcache.store.storage import Place as Place
    from actcache.store.verify import Problem as Problem
    from actcache.store.verify import repair as repair
    from actcache.store.verify import verify as verify
    from actcache.store.writer import StoreWriter as StoreWriter

# Resolved on first use: the codec, which Zarr imports, needs neither torch nor Arrow.
_HOME = {
    "BackgroundWriter": "background",
    "Place": "storage",
    "Problem": "verify",
    "Segment": "segment",
    "SegmentData": "segment_data",
    "Store": "reader",
    "StoreWriter": "writer",
    "compact": "compact",
    "open_store": "reader",
    "repair": "verify",
    "verify": "verify",
}
__all__ = [
    "BackgroundWriter",
    "Place",
    "Problem",
    "Segment",
    "SegmentData",
    "Store",
    "StoreWriter",
    "compact",
    "open_store",
    "repair",
    "verify",
]


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Python puts an imported module into its package: where a function has the module's name, the function stays.
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"actcache.store.{_HOME[name]}"), name)
    raise AttributeError(f"module 'actcache.store' has no attribute {name!r}")
