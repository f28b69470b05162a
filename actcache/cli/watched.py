"""A run whose loads a person sees, under the line of the stage that is under way, and that a clock counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actcache.cli.memory import LESS_MODEL, enough_memory
from actcache.study.run import Run

if TYPE_CHECKING:
    import torch

    from actcache.cli.terminal import LiveLine
    from actcache.cli.timing import AnalysisClock
    from actcache.models.backbone import Backbone
    from actcache.models.readout import Readout
    from actcache.replay.late_stack import LateStack


class WatchedRun(Run):
    """A run that says what it loads."""

    def __init__(self, path: Any, clock: AnalysisClock, line: LiveLine, **more: Any) -> None:
        super().__init__(path, **more)
        self._clock, self._line = clock, line

    def load_late(self, label: str, boundary: int, device: str | None = None) -> LateStack:
        """As a run does."""
        what = f"loading {label} from block {boundary} on"
        with self._clock.loading(), enough_memory(what, LESS_MODEL), self._line.during(what):
            return super().load_late(label, boundary, device)

    def load_readout(self, label: str, device: str | None = None) -> Readout:
        """As a run does."""
        what = f"loading the head of {label}"
        with self._clock.loading(), enough_memory(what, LESS_MODEL), self._line.during(what):
            return super().load_readout(label, device)

    def load_backbone(self, label: str, dtype: torch.dtype | None = None) -> Backbone:
        """As a run does."""
        what = f"loading {label} in {str(dtype or self.store.dtype).removeprefix('torch.')}"
        with self._clock.loading(), enough_memory(what, LESS_MODEL), self._line.during(what):
            return super().load_backbone(label, dtype)
