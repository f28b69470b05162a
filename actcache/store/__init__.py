"""The store: states, events and what identifies them, in Zarr v3, as immutable checksummed segments (see FORMAT.md).

``layout`` says what a segment holds and how it lies on disk, ``writer`` makes and commits segments, ``reader`` reads
committed ones, ``verify`` re-reads everything. Knows files and rows; knows no models.
"""

from actcache.store.layout import SegmentData
from actcache.store.reader import Segment, Store, open_store
from actcache.store.verify import Problem, verify
from actcache.store.writer import StoreWriter

__all__ = ["Problem", "Segment", "SegmentData", "Store", "StoreWriter", "open_store", "verify"]
