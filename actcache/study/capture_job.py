"""Capture job: the events of some prompts and the rows that their replay needs, as one segment of a store; and the rows
of further sites for a segment that is stored.

What they give is committed, not written as a table. Knows how events are decided; knows no writers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from actcache.canonical import digest_of
from actcache.capture.asks import Steps, T
from actcache.capture.corpus import texts_captured
from actcache.capture.decide import Decider
from actcache.capture.given import GivenPrompt
from actcache.capture.rollouts import Rollouts
from actcache.capture.settings import CaptureSettings
from actcache.capture.supports import ROLLOUTS
from actcache.models.cost import ModelShape
from actcache.progress import Told, nobody_told
from actcache.prompts import Prompt, digest
from actcache.store import Segment, SegmentData
from actcache.store.corpus import CORPUS
from actcache.store.segment_data import SiteRows
from actcache.study.work import CaptureWork, Cost, Expected


class CaptureEngine(Protocol):
    """What these jobs ask of what they are run with."""

    @property
    def decider(self) -> Decider:
        """With the backbones of all checkpoints."""

    def segment(self, name: str) -> Segment:
        """A stored one."""


@dataclass(frozen=True)
class CaptureJob:
    """A segment of prompts.

    Attributes:
        store: digest of the store's fingerprint.
        segment: name of the segment.
        settings: what to compute.
        prompts: in order.
        ids: token ids of each; empty where events are given.
        given: the events of each prompt, where they are given and not searched for.
        n_pairs, n_paired: pairs whose choices are events, and checkpoints in them, for :meth:`cost`.
        expected: how the searches are expected to end, for :meth:`cost`; no part of the key.
    """

    store: str
    segment: str
    settings: CaptureSettings
    prompts: tuple[Prompt, ...]
    ids: tuple[tuple[int, ...], ...] = ()
    given: tuple[GivenPrompt, ...] = ()
    n_pairs: int = 1
    n_paired: int = 2
    expected: Expected | None = None

    @property
    def key(self) -> dict[str, Any]:
        """All that the segment depends on; the fingerprint of the store has the settings."""
        return {"store": self.store, "segment": self.segment, "prompts": digest(self.prompts)}

    @property
    def n_units(self) -> int:
        """Prompts."""
        return len(self.prompts)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """What it is expected to take."""
        if self.settings.support == CORPUS:
            return _one_forward([len(ids) for ids in self.ids], shapes)
        given = [sequence for one in self.given for sequence in one.sequences]
        lengths = [len(ids) for ids in (self.ids or [ids for ids, _ in given])]
        n_given = sum(len(events) for _, events in given) if self.given else None
        work = CaptureWork(lengths, self.settings, n_given, self.n_paired)
        return work.cost(shapes, self.expected or Expected.of(self.settings, self.n_pairs))

    def read(self, engine: CaptureEngine) -> None:
        """Nothing: the job has its prompts."""

    def run(self, engine: CaptureEngine, read: None = None, told: Told = nobody_told) -> SegmentData:
        """Decide every event and gather its rows.

        Raises:
            NotFiniteError: a checkpoint computes NaN or infinity; names it, the prompt and the first block.
        """
        return _only(engine.decider, self.steps(engine, told), told)

    def steps(self, engine: CaptureEngine, told: Told = nobody_told) -> Steps[SegmentData]:
        """What :meth:`run` does, in steps that many jobs may take together."""
        if self.settings.support == CORPUS:
            return texts_captured(engine.decider, self.prompts, self.ids, told)
        if self.given:
            return engine.decider.given(self.given, told)
        if self.settings.support == ROLLOUTS or len(engine.decider.pairs) > 1:
            return Rollouts(engine.decider).run(self.prompts, self.ids, told)
        return engine.decider.searched(self.prompts, self.ids, told)


@dataclass(frozen=True)
class RowsJob:
    """Rows of further sites of a stored segment, whose sequences run again without a search.

    Attributes:
        store: digest of the store's fingerprint.
        segment: name of the segment.
        lengths: tokens of each of its sequences.
        sites: each a site and its blocks.
    """

    store: str
    segment: str
    lengths: tuple[int, ...]
    sites: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def key(self) -> dict[str, Any]:
        """All that the rows depend on."""
        return {"store": self.store, "segment": self.segment, "sites": digest_of(self.sites)}

    @property
    def n_units(self) -> int:
        """Sequences."""
        return len(self.lengths)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """What it takes: one forward of every checkpoint."""
        return _one_forward(self.lengths, shapes)

    def read(self, engine: CaptureEngine) -> Segment:
        """The segment, whose token ids are read as they are needed."""
        return engine.segment(self.segment)

    def run(self, engine: CaptureEngine, read: Segment, told: Told = nobody_told) -> SiteRows:
        """Run the sequences (errors as :meth:`CaptureJob.run`)."""
        return _only(engine.decider, self.steps(engine, told), told)

    def steps(self, engine: CaptureEngine, told: Told = nobody_told) -> Steps[SiteRows]:
        """What :meth:`run` does, in steps that many jobs may take together."""
        sites = {site: list(blocks) for site, blocks in self.sites}
        return engine.decider.rerun(engine.segment(self.segment), sites, told)


def _one_forward(lengths: Sequence[int], shapes: Mapping[str, ModelShape]) -> Cost:
    """What it takes to run sequences of these lengths through every checkpoint once."""
    counted = np.array(lengths, np.float64)
    return Cost({"capture": sum(shape.products(counted) for shape in shapes.values())})


def _only(decider: Decider, steps: Steps[T], told: Told) -> T:
    """What one job gives by itself."""
    ((_, given),) = decider.complete([steps], told)
    return given
