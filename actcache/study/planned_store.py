"""Planned store: the store that a capture is expected to leave, so that analyses say before it what they will run.

Its events, sequences and segments are those that the plan assumes. Its token ids tell sequences apart, and its rows at
events are random, of the shapes to come: jobs that are made of it cost what those of the capture will cost. Knows
plans and stores; nothing of it is written, and nothing is computed with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.capture.settings import CaptureSettings
from actcache.carried import as_columns, encode
from actcache.errors import InputError
from actcache.fingerprint import CheckpointFingerprint, Fingerprint
from actcache.models.lineup import Lineup
from actcache.prompts import Prompt
from actcache.schema import EVENTS, FIRST_DIVERGENCE, SEGMENT, arrow_type
from actcache.store import Segment, Store, layout
from actcache.store.commit_record import CommitRecord
from actcache.store.selection import Events
from actcache.study.cells import Finished, Scored
from actcache.study.plan import Assumptions
from actcache.study.replay_job import ReplayJob


class PlannedStore(Store):
    """See the module."""

    def __init__(
        self, fingerprint: Fingerprint, events: pa.Table, segments: Sequence[tuple[str, int, Sequence[int]]]
    ) -> None:
        """Of each segment its name, its number of events, and the tokens of its sequences."""
        self.fingerprint = fingerprint
        self.storage = _NotThere()
        self.segments = []
        self._tables = {"events": events}
        for name, n_events, lengths in segments:
            start = len(self)
            counts = {"n_events": n_events, "n_tokens": sum(lengths), "n_sequences": len(lengths), "n_excluded": 0}
            said = {"segment": name, "folder": name, "record": "", "replaces": [], "parts": [], **counts}
            record = CommitRecord(said, "")
            segment = Segment(self.storage, range(start, start + n_events), record, fingerprint)
            segment._row_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            self.segments.append(segment)

    @classmethod
    def of(
        cls,
        lineup: Lineup,
        prompts: Sequence[Prompt],
        lengths: Sequence[int],
        settings: CaptureSettings,
        assumed: Assumptions,
    ) -> PlannedStore:
        """What a capture of these prompts, of so many tokens, leaves where searches end as assumed.

        Raises:
            InputError: events are not first divergences, or their rows are not kept.
        """
        if settings.support != FIRST_DIVERGENCE or settings.row_selection != "prefix":
            raise InputError(
                "a study is planned for first divergences with their prefix: leave out --support and --rows"
            )
        n = len(prompts)
        shared = np.diff(np.floor(np.arange(n + 1) * assumed.event_share + 1e-9))
        having = np.flatnonzero(shared).tolist()
        steps = dict(zip(having, _steps(len(having), assumed, settings.max_new - 1), strict=True))
        rows: list[dict[str, Any]] = []
        segments = []
        for first in range(0, n, settings.shard_prompts):
            own = [number for number in range(first, min(n, first + settings.shard_prompts)) if number in steps]
            name = f"planned-{first // settings.shard_prompts:06d}"
            rows += [
                {
                    "event_id": f"{prompts[number].id}:{pt},{it}",
                    "prompt_id": prompts[number].id,
                    "kind": FIRST_DIVERGENCE,
                    "y_it": 1 + of_pair,
                    "pair": f"{pt},{it}",
                    "step": steps[number],
                    "sequence": sequence,
                    "position": lengths[number] + steps[number] - 1,
                    "segment": name,
                }
                for sequence, number in enumerate(own)
                for of_pair, (pt, it) in enumerate(lineup.pairs)
            ]
            segments.append((name, len(own) * len(lineup.pairs), [lengths[number] + steps[number] for number in own]))
        texts = [encode(prompts[number].carried) for number in having for _ in lineup.pairs]
        return cls(_fingerprint(lineup, settings, n), _table(rows, texts), segments)

    @property
    def path(self) -> str:
        """In words."""
        return "the store to come"

    @property
    def _sites(self) -> layout.Sites:
        return {layout.STATE: list(self.fingerprint.boundaries)}

    def _kept_table(self, name: str) -> pa.Table:
        if name not in self._tables:
            raise _not_told()
        return self._tables[name]

    def _rows(self, array: str, events: Events = None, *, at_p: bool = False) -> Any:
        numbers = self.numbers(events)
        is_whole = not at_p and not array.startswith("final")
        n_rows = self.events["position"].to_numpy()[numbers] + 1 if is_whole else np.ones(len(numbers), np.int64)
        offsets = np.concatenate([[0], np.cumsum(n_rows)])
        if array == "token_ids":
            # No two sequences have the same ones: what is computed once for equal sequences would count once for all.
            prompts = np.unique(self.events["prompt_id"].to_numpy(), return_inverse=True)[1][numbers]
            return np.repeat(prompts, n_rows).astype(np.int64), torch.from_numpy(offsets)
        if is_whole:
            raise _not_told()
        drawn = np.random.default_rng(zlib.crc32(array.encode()))
        rows = drawn.standard_normal((len(numbers), self.width), np.float32)
        stored = (rows.view(np.uint32) >> 16).astype(np.uint16) if self.fingerprint.dtype == "bfloat16" else rows
        return stored, torch.from_numpy(offsets)


class _NotThere:
    """The storage of a store that is not there."""

    def __getattr__(self, name: str) -> Any:
        raise _not_told()


def _not_told() -> InputError:
    return InputError("what it takes depends on what the capture will store, and is not told before")


def _steps(n: int, assumed: Assumptions, most: int) -> list[int]:
    """How many tokens each of ``n`` prompts shares: as the pilot's did, or else as if each token had the same chance to
    be the last one."""
    share = (np.arange(n) + 0.5) / n
    mean = assumed.shared_tokens
    if len(assumed.shared_counts):
        counts = np.cumsum(assumed.shared_counts)
        steps = np.searchsorted(counts, share * counts[-1], side="right")
    else:
        steps = np.minimum(np.log1p(-share) / np.log(mean / (1 + mean)), most) if mean else np.zeros(n)
    # Whole numbers with the mean that is assumed, in no order.
    steps = steps * (mean * n / steps.sum()) if steps.sum() else steps
    whole = np.diff(np.floor(np.concatenate([[0], np.cumsum(steps)]) + 1e-9)).astype(np.int64)
    return np.random.default_rng(0).permutation(whole).tolist()


def _table(rows: Sequence[dict[str, Any]], carried: Sequence[str]) -> pa.Table:
    columns: dict[str, Any] = {}
    for column in (*EVENTS, SEGMENT):
        kind = arrow_type(column.type)
        nothing = None if not column.required else "" if pa.types.is_string(kind) else 0
        if column.name != "carried":
            columns[column.name] = pa.array([row.get(column.name, nothing) for row in rows], kind)
    columns |= {name: values for name, values in as_columns(carried).items() if name not in columns}
    return pa.table(columns)


def _fingerprint(lineup: Lineup, settings: CaptureSettings, n_prompts: int) -> Fingerprint:
    """As the capture's, as far as jobs depend on it: no weights are read."""
    checkpoints = {
        label: CheckpointFingerprint(architecture=checkpoint.config.model_type, weights=label)
        for label, checkpoint in lineup.checkpoints.items()
    }
    return Fingerprint(
        checkpoints=checkpoints,
        pair=lineup.pair,
        pairs=None if len(lineup.pairs) == 1 else tuple(",".join(pair) for pair in lineup.pairs),
        lineup=tuple(lineup.labels),
        n_prompts=n_prompts,
        dtype=settings.dtype,
        boundaries=settings.boundaries,
        row_selection=settings.row_selection,
        width=lineup.width,
        n_blocks=lineup.n_blocks,
        max_new=settings.max_new,
        strict=settings.strict,
        max_tokens=settings.max_tokens,
        shard_prompts=settings.shard_prompts,
        codec=settings.codec,
        device=settings.device,
    )


def as_finished(jobs: Iterable[ReplayJob], store: PlannedStore) -> Finished:
    """What a folder of results will hold where these jobs have run."""
    events: dict[str, npt.NDArray[np.int64]] = {one.name: np.array(one.events, np.int64) for one in store.segments}
    finished: Finished = {}
    for job in jobs:
        scored = Scored(Path("planned"), dict(job.key), events[job.segment])
        for scope in job.scopes:
            finished.setdefault((job.boundary, scope, job.late), []).append(scored)
    return finished
