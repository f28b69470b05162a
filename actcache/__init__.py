"""actcache: an activation cache for comparing checkpoints.

run = actcache.run(pt="DIR", it="DIR", prompts="P.jsonl", out="RUN")        # or actcache.Run("RUN"), made before
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
    from actcache.cli.run import run as run
    from actcache.errors import ActcacheError as ActcacheError
    from actcache.replay.edits import Add as Add
    from actcache.replay.edits import Call as Call
    from actcache.replay.edits import Edit as Edit
    from actcache.replay.edits import Interpolate as Interpolate
    from actcache.replay.edits import MatchedNorm as MatchedNorm
    from actcache.replay.edits import Project as Project
    from actcache.replay.edits import Replace as Replace
    from actcache.replay.edits import SignedPermutation as SignedPermutation
    from actcache.replay.edits import Variant as Variant
    from actcache.replay.late_stack import LateStack as LateStack
    from actcache.store import Store as Store
    from actcache.store.feed import ActivationBuffer as ActivationBuffer
    from actcache.store.feed import RowFeed as RowFeed
    from actcache.study.run import Run as Run
    from actcache.study.run_folder import open_store as open_store

# Resolved on first use: importing the package costs nothing, and reading a store never imports transformers.
_HOME = {
    **dict.fromkeys(
        ("Add", "Call", "Edit", "Interpolate", "MatchedNorm", "Project", "Replace", "SignedPermutation", "Variant"),
        "actcache.replay.edits",
    ),
    "ActcacheError": "actcache.errors",
    "ActivationBuffer": "actcache.store.feed",
    "LateStack": "actcache.replay.late_stack",
    "RowFeed": "actcache.store.feed",
    "Run": "actcache.study.run",
    "Store": "actcache.store",
    "open_store": "actcache.study.run_folder",
    "run": "actcache.cli.run",
}
__all__ = sorted(_HOME)


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'actcache' has no attribute {name!r}")
