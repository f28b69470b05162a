"""What both sides of the study's bench begin with: a captured run, with its checkpoints in memory.

An analysis of the bench is one :class:`Both`: how actcache answers it of a run, how hooks answer it of one event, and
where the same values lie in what actcache left.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import hooks
import torch
from hooks import HookEvent
from torch import nn
from transformers import PreTrainedModel

from actcache.models.backbone import Backbone
from actcache.models.blocks import find_site
from actcache.models.lineup import Lineup
from actcache.models.readout import Readout
from actcache.replay.late_stack import LateStack
from actcache.store import Store
from actcache.study.run import Run

Keyed = Iterator[tuple[tuple[Any, ...], float]]
"""Values by key."""
OfEvent = Callable[[Mapping[str, Any], HookEvent], Keyed]
"""What answers one event: its row of the store, and what hooks need of it."""


@dataclass
class Held:
    """What is in memory before anything is timed, for all runs of the bench.

    Attributes:
        models: by label.
        stacks: late stacks, by label.
        backbones: whole models that were asked for, by label.
    """

    models: Mapping[str, PreTrainedModel]
    stacks: dict[str, LateStack] = field(default_factory=dict)
    backbones: dict[str, Backbone] = field(default_factory=dict)

    def stack(self, label: str, first: int) -> LateStack:
        """From a boundary on, or an earlier one; once per checkpoint."""
        if label not in self.stacks:
            self.stacks[label] = LateStack.load(self.models[label], first)
        return self.stacks[label]

    def backbone(self, label: str) -> Backbone:
        """Once per checkpoint."""
        if label not in self.backbones:
            self.backbones[label] = Backbone(self.models[label])
        return self.backbones[label]


class InMemory(Run):
    """A run whose checkpoints are those in memory, as the hooks' are."""

    held_here: Held
    opened: Lineup

    @cached_property
    def lineup(self) -> Lineup:
        """Opened once."""
        return self.opened

    def load_late(self, label: str, boundary: int, device: str | None = None) -> LateStack:
        """A part of the stack that is in memory."""
        stack = self.held_here.stack(label, min(self.store.boundaries))
        stack.readout.mask(self.masked_ids)
        return stack.at(boundary)

    def load_blocks(self, label: str, dtype: torch.dtype | None = None) -> Backbone:
        """The whole model that is in memory."""
        backbone = self.held_here.backbone(label)
        backbone.readout.mask(self.masked_ids)
        return backbone

    def load_readout(self, label: str, device: str | None = None) -> Readout:
        """Of the late stack."""
        return self.load_late(label, max(self.store.boundaries)).readout


@dataclass
class Captured:
    """A captured run, as every repeat begins with it.

    Attributes:
        path: of its folder.
        labels: of its checkpoints.
        held: these and others, in memory.
        n_sampled: events that the hooks are timed on.
    """

    path: Path
    labels: tuple[str, ...]
    held: Held
    n_sampled: int

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """By label."""
        return {label: self.held.models[label] for label in self.labels}

    @cached_property
    def run(self) -> Run:
        """The run itself, which nobody adds to."""
        return Run(self.path)

    @property
    def store(self) -> Store:
        """Of the run."""
        return self.run.store

    @cached_property
    def events(self) -> list[tuple[dict[str, Any], HookEvent]]:
        """All events: their rows, and what hooks need of them."""
        ids, offsets = self.store.token_ids()
        rows = self.store.events.to_pylist()
        return [
            (row, HookEvent(ids[offsets[i] : offsets[i + 1]].tolist(), row["y_pt"], row["y_it"]))
            for i, row in enumerate(rows)
        ]

    @property
    def sampled(self) -> list[tuple[dict[str, Any], HookEvent]]:
        """Some of them, spread evenly."""
        n = min(self.n_sampled, len(self.events))
        return [self.events[i * len(self.events) // n] for i in range(n)]

    def copy(self, path: Path) -> InMemory:
        """A run that begins anew in a copy of the folder."""
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.path, path)
        run = InMemory(path)
        run.held_here, run.opened = self.held, self.run.lineup
        return run

    def native(self, event: HookEvent, boundaries: list[int]) -> dict[str, Any]:
        """Of every checkpoint by hooks: states at the boundaries, and the last block's output at all positions."""
        ids = torch.tensor([event.ids])
        return {label: hooks.native(model, ids, boundaries, whole=True) for label, model in self.models.items()}

    def margin(self, head: str, outputs: torch.Tensor, event: HookEvent) -> float:
        """Of outputs ``[1, T, D]``, at the last position, by one checkpoint's head."""
        return float(hooks.margins(self.models[head], outputs[:, -1], event))

    def blocks(self, label: str) -> Any:
        """Of one checkpoint's model."""
        return hooks.blocks_of(self.models[label])

    def site(self, label: str, site: str, block: int) -> nn.Module:
        """A module of one checkpoint's model, by the names that edits have for them."""
        return find_site(self.blocks(label)[block], site)

    @contextmanager
    def swapped_mlps(self, host: str, source: str, window: range) -> Iterator[None]:
        """Within this context a model has the MLPs of another in some blocks."""
        blocks, others = self.blocks(host), self.blocks(source)
        own = {block: blocks[block].mlp for block in window}
        for block in window:
            blocks[block].mlp = others[block].mlp
        try:
            yield
        finally:
            for block, mlp in own.items():
                blocks[block].mlp = mlp


@dataclass(frozen=True)
class Both:
    """An analysis, by actcache and by hooks.

    Attributes:
        of: which run it is answered of.
        ours: answers it.
        hooks: of a captured run, what answers one event by hooks; what it needs beforehand is made here, untimed.
        found: the same values as actcache left them, of all events.
    """

    of: str
    ours: Callable[[InMemory], Any]
    hooks: Callable[[Captured], OfEvent]
    found: Callable[[InMemory], Keyed]


def directly(
    answer: Callable[[Captured, Mapping[str, Any], HookEvent], Keyed],
) -> Callable[[Captured], OfEvent]:
    """Of an answer that needs nothing beforehand."""
    return lambda captured: partial(answer, captured)
