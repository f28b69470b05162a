"""The store: states, events and what identifies them, in Zarr v3, as immutable checksummed segments (see FORMAT.md).

``storage`` and ``objects`` are where files lie, ``layout`` says what a segment holds and how, ``shard`` encodes and
decodes one array; ``writer`` makes and commits segments, ``background`` does so beside other work, ``reader`` reads
committed ones, ``verify`` re-reads everything, ``compact`` merges small ones. Knows files and rows; knows no models.
"""

from actcache.store.background import BackgroundWriter
from actcache.store.compact import compact
from actcache.store.layout import SegmentData
from actcache.store.reader import Store, open_store
from actcache.store.segment import Segment
from actcache.store.storage import Place
from actcache.store.verify import Problem, repair, verify
from actcache.store.writer import StoreWriter

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
