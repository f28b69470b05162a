"""actcache: an activation cache for comparing checkpoints.

store = actcache.open_store("RUN")                    # or a store itself; needs no model and no prompts file
rows, offsets = store.states("pt", boundary=18)
late = actcache.LateStack.load(model_folder, boundary=18, dtype=store.dtype)
final_hidden = late.run(rows, offsets)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from actcache.errors import ActcacheError as ActcacheError
    from actcache.replay.late_stack import LateStack as LateStack
    from actcache.store import Store as Store
    from actcache.store.feed import ActivationBuffer as ActivationBuffer
    from actcache.store.feed import RowFeed as RowFeed
    from actcache.study.run import Run as Run
    from actcache.study.run_folder import open_store as open_store

# Resolved on first use: importing the package costs nothing, and reading a store never imports transformers.
_HOME = {
    "ActcacheError": "actcache.errors",
    "ActivationBuffer": "actcache.store.feed",
    "LateStack": "actcache.replay.late_stack",
    "RowFeed": "actcache.store.feed",
    "Run": "actcache.study.run",
    "Store": "actcache.store",
    "open_store": "actcache.study.run_folder",
}
__all__ = ["ActcacheError", "ActivationBuffer", "LateStack", "RowFeed", "Run", "Store", "open_store"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'actcache' has no attribute {name!r}")
