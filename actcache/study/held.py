"""Held: parts of the checkpoints of a store, loaded by whoever runs jobs, with the bound of memory that was asked for.

A holding is plain data, which a run records and a worker is sent: so wherever a job runs, as little is in memory. Knows
checkpoints and their parts; knows no jobs, and keeps nothing that it loads but which blocks were looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import cached_property

import torch

from actcache.capture.streams import Streaming
from actcache.models.backbone import Backbone
from actcache.models.devices import Placement, placed
from actcache.models.fit import are_together
from actcache.models.lineup import Lineup
from actcache.models.parts import load_readout
from actcache.models.readout import Readout
from actcache.models.streamed import Streamed
from actcache.replay.late_stack import LateStack
from actcache.replay.streamed_late import load_late
from actcache.store import Store
from actcache.study.holding import Holding


class Held:
    """Checkpoints of a lineup, as a holding says. Each part that is asked for is loaded anew."""

    def __init__(self, lineup: Lineup, holding: Holding, check: Callable[[], object] = lambda: None) -> None:
        """Of these checkpoints; ``check`` is called after each load, and raises where files are not what they were."""
        self.lineup, self.holding, self._check = lineup, holding, check
        self._proven: dict[tuple[str, torch.dtype], set[int]] = defaultdict(set)

    @classmethod
    def of(cls, store: Store, lineup: Lineup, holding: Holding) -> Held:
        """Those that a store was captured from: at each load it is made sure that they are."""
        lineup.follow(store.fingerprint.vocabulary)
        return cls(lineup, holding, lambda: lineup.check_captured(store.fingerprint))

    @cached_property
    def placement(self) -> Placement:
        """The device of each checkpoint (errors as :func:`placed`)."""
        return placed(self.holding.device, self.lineup.labels)

    def are_together(self, dtype: str, first: int = 0, say: Callable[[str], None] = lambda line: None) -> bool:
        """Whether all are in memory at once, from a block on (see :func:`actcache.models.fit.are_together`)."""
        resident = "one" if self.holding.stream else self.holding.resident
        return are_together(resident, self.lineup, dtype, self.placement.of, first=first, say=say)

    def late(self, label: str, boundary: int, dtype: torch.dtype, device: str | None = None) -> LateStack:
        """A late stack, whole or a block at a time (errors as :meth:`LateStack.load`)."""
        at = device or self.placement.of[label]
        late = load_late(self.lineup.checkpoints[label], boundary, dtype=dtype, device=at, stream=self.holding.stream)
        late.readout.mask(self.lineup.masked_ids)
        self._check()  # what was loaded lies between two looks at the files
        return late

    def readout(self, label: str, dtype: torch.dtype, device: str | None = None) -> Readout:
        """A final norm and head alone (errors as :func:`load_readout`)."""
        at = device or self.placement.of[label]
        readout = load_readout(self.lineup.checkpoints[label], dtype, at)
        readout.mask(self.lineup.masked_ids)
        self._check()
        return readout

    def backbone(self, label: str, dtype: torch.dtype) -> Backbone:
        """All blocks and the readout (errors as :class:`Backbone`)."""
        checkpoint = self.lineup.checkpoints[label]
        model = checkpoint.load(dtype, self.placement.of[label])
        with checkpoint.named():
            backbone = Backbone(model)
        backbone.readout.mask(self.lineup.masked_ids)
        self._check()
        return backbone

    def blocks(self, label: str, dtype: torch.dtype) -> Backbone | Streaming:
        """The same, or what streams, if the holding says so."""
        return Streaming(label, self.streamed(label, dtype)) if self.holding.stream else self.backbone(label, dtype)

    def streamed(self, label: str, dtype: torch.dtype) -> Streamed:
        """Blocks that are in memory one at a time; each is looked at once, however often it is loaded (errors as
        :class:`Streamed`)."""
        proven = self._proven[label, dtype]
        streamed = Streamed(self.lineup.checkpoints[label], dtype, self.placement.of[label], proven=proven)
        streamed.readout.mask(self.lineup.masked_ids)
        self._check()
        return streamed
