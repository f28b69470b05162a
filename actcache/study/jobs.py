"""Jobs: units of work as plain data. A job says what to compute and nothing about where.

Each kind has a file: :class:`actcache.study.replay_job.ReplayJob` (stored rows behind a late stack),
:class:`actcache.study.forward_job.ForwardJob` and :class:`actcache.study.decode_job.DecodeJob` (a full model over given
sequences), :class:`actcache.study.capture_job.CaptureJob` (a segment of prompts). All are frozen and can be pickled: a
worker that has an engine gives what this process gives. In which order jobs run is the runner's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import torch

from actcache.models.cost import ModelShape
from actcache.progress import Told, nobody_told
from actcache.study.work import Cost

Engine = TypeVar("Engine", contravariant=True)
Read = TypeVar("Read")
Given = TypeVar("Given", covariant=True)


class Job(Protocol[Engine, Read, Given]):
    """What the runner and the planner know of a job."""

    @property
    def key(self) -> dict[str, Any]:
        """All that what it gives depends on: equal keys give the same."""

    @property
    def n_units(self) -> int:
        """What its progress counts, in units of its kind."""

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """What it takes, with checkpoints of these shapes, by label."""

    def read(self, engine: Engine) -> Read:
        """What it needs from the store: called while the job before it runs."""

    def run(self, engine: Engine, read: Read, told: Told = nobody_told) -> Given:
        """Compute."""


class Result(NamedTuple):
    """What a job gives that makes a table.

    Attributes:
        table: its rows.
        notes: on how it went, which its rows do not depend on.
        final: what is kept beside it: of replays, final states of plain cells, ``[E, D]`` by ``scope/upstream``; of
            states jobs, ``rows``.
    """

    table: pa.Table
    notes: dict[str, Any]
    final: dict[str, torch.Tensor]
