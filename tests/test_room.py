"""Room that is given back: what was loaded is freed, and nothing older is looked at."""

from __future__ import annotations

import gc
import weakref

from actcache.room import Loads


class Knot:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.own = self


def test_what_was_loaded_is_freed_and_what_is_older_waits():
    gc.collect()
    older, loads = Knot(), Loads()
    seen = weakref.ref(older)
    loads.begin()
    loaded = Knot()
    left = weakref.ref(loaded)
    del older, loaded
    loads.give_back()
    assert left() is None
    assert seen() is not None
    gc.collect()
    assert seen() is None


def test_nothing_stays_frozen_after_the_loads():
    loads = Loads()
    loads.begin()
    assert gc.get_freeze_count()
    del loads
    assert not gc.get_freeze_count()
