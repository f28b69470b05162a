"""For tests of what stands on an object store: one that misbehaves, and processes that are killed between its calls.

``memory`` is an object store, ``faults`` says what may go wrong with its calls, and ``objects`` is both together.
``schedule`` steps several processes call by call, by a seed; ``views`` is what they see. ``store_schedule`` does all of
that with a store of this package, on a place of ``places``; ``invariants`` says what must hold then, of ``content``.
``python -m actcache.testing SEED`` plays one schedule. The package itself imports none of this.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actcache.testing.clock import Clock as Clock
    from actcache.testing.faults import KINDS as KINDS
    from actcache.testing.faults import Faults as Faults
    from actcache.testing.memory import MemoryObjects as MemoryObjects
    from actcache.testing.objects import PROMISES as PROMISES
    from actcache.testing.objects import SimulatedObjects as SimulatedObjects
    from actcache.testing.places import Disk as Disk
    from actcache.testing.places import ObjectPlace as ObjectPlace
    from actcache.testing.places import Place as Place
    from actcache.testing.schedule import Process as Process
    from actcache.testing.schedule import Schedule as Schedule
    from actcache.testing.store_schedule import StoreSchedule as StoreSchedule
    from actcache.testing.views import ProcessObjects as ProcessObjects

# Resolved on first use: what needs obstore, torch or Arrow is imported where it is used.
_HOME = {
    "Clock": "clock",
    "Disk": "places",
    "Faults": "faults",
    "KINDS": "faults",
    "MemoryObjects": "memory",
    "ObjectPlace": "places",
    "PROMISES": "objects",
    "Place": "places",
    "Process": "schedule",
    "ProcessObjects": "views",
    "Schedule": "schedule",
    "SimulatedObjects": "objects",
    "StoreSchedule": "store_schedule",
}
__all__ = sorted(_HOME)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"actcache.testing.{_HOME[name]}"), name)
    raise AttributeError(f"module 'actcache.testing' has no attribute {name!r}")
