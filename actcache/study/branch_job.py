"""Branch job: one token forced after each event's sequence, and what a checkpoint then writes by itself.

For analyses that ask where a token leads. A job is of one segment and one branch, such as ``y_it``; what it writes is a
decode job's (decode_job.py), its end token included. Knows backbones through an engine alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from actcache.canonical import digest_of
from actcache.models.cost import ModelShape
from actcache.progress import Told, nobody_told
from actcache.store import Store
from actcache.study.decode_job import DecodeJob
from actcache.study.forward_job import ModelEngine
from actcache.study.jobs import Result
from actcache.study.results import file_name, read_result
from actcache.study.work import Cost

if TYPE_CHECKING:
    from actcache.models.lineup import Lineup

BRANCHES = pa.schema(
    [
        ("event_id", pa.string()),
        ("token", pa.int64()),
        ("tail", pa.list_(pa.int64())),
        ("ended_by", pa.string()),
        ("n_plain", pa.int64()),
        ("room", pa.int64()),
    ]
)


class Limits(NamedTuple):
    """What ends a branch; nothing does where only its cost is asked.

    Attributes:
        end_ids: tokens that end a text.
        special_ids: tokens that stand for no text, those that end one among them or not.
        max_positions: longest sequence that the checkpoints take, or None.
    """

    end_ids: frozenset[int] = frozenset()
    special_ids: frozenset[int] = frozenset()
    max_positions: int | None = None

    @classmethod
    def of(cls, lineup: Lineup) -> Limits:
        """Of these checkpoints."""
        return cls(lineup.end_ids, lineup.special_ids, lineup.max_positions)


@dataclass(frozen=True, eq=False, kw_only=True)
class BranchJob:
    """What a checkpoint writes after the sequences of some events of a segment, and one token behind each.

    Attributes:
        store: digest of the store's fingerprint.
        segment: its name.
        branch: what the tokens are, such as ``y_it``.
        checkpoint: digest of the checkpoint's fingerprint.
        label: by which an engine knows the checkpoint.
        dtype: of weights and states.
        events: ids.
        prefixes: token ids of each event's sequence.
        tokens: the one that is forced behind each.
        max_new: tokens to write at most behind it, at least one.
        limits: what ends a branch.
        max_tokens: tokens of one batch's prompts, padded to the longest.
    """

    store: str
    segment: str
    branch: str
    checkpoint: str
    label: str
    dtype: str
    events: tuple[str, ...]
    prefixes: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    max_new: int
    limits: Limits
    max_tokens: int

    @property
    def key(self) -> dict[str, Any]:
        """All that its rows depend on; the store settles the limits."""
        return {
            "job": "branch",
            "store": self.store,
            "segment": self.segment,
            "branch": self.branch,
            "checkpoint": self.checkpoint,
            "dtype": self.dtype,
            "sequences": digest_of([self.events, self.prefixes, self.tokens]),
            "max_new": self.max_new,
            "max_tokens": self.max_tokens,
        }

    @property
    def n_units(self) -> int:
        """Sequences."""
        return len(self.events)

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """What it takes at most, where no branch ends early."""
        return self._decoding(range(len(self.events))).cost(shapes)

    def read(self, engine: ModelEngine) -> None:
        """Nothing: the job has its sequences."""

    def run(self, engine: ModelEngine, read: None = None, told: Told = nobody_told) -> Result:
        """Decode every branch.

        Returns:
            One row per event, in order:

            - ``event_id`` and ``token``, the one that was forced.
            - ``tail``: what follows it, an end token included. None follows an end token, or the last position.
            - ``ended_by``: ``end_token``, ``max_new`` or ``position_limit``.
            - ``n_plain``: of the forced token and its tail, how many come before the first special token that ends no
              text.
            - ``room``: how many tokens, the forced one among them, could follow the event's sequence in one forward
              that computes as its own does; null where there is no end.

        Raises:
            NotFiniteError: a logit is NaN or infinite; names the event and the first block.
        """
        ends, _, most = self.limits
        going = [
            number
            for number, (prefix, token) in enumerate(zip(self.prefixes, self.tokens, strict=True))
            if token not in ends and (most is None or len(prefix) < most)
        ]
        told(len(self.events) - len(going))
        notes: dict[str, Any] = {}
        tails: list[list[int]] = [[] for _ in self.events]
        ended_by = ["end_token" if token in ends else "position_limit" for token in self.tokens]
        if going:
            found = self._decoding(going).run(engine, None, told)
            notes = found.notes
            for number, row in zip(going, found.table.to_pylist(), strict=True):
                tails[number] = row["token_ids"] + ([] if row["end_id"] is None else [row["end_id"]])
                ended_by[number] = row["ended_by"]
        regimes = engine.backbone(self.label, self.dtype).regimes
        rooms: list[int | None] = []
        for prefix in self.prefixes:
            last = [end for end in (most, regimes.last(len(prefix))) if end is not None]
            rooms.append(min(last) - len(prefix) + 1 if last else None)
        columns = [
            pa.array(self.events, pa.string()),
            pa.array(self.tokens, pa.int64()),
            pa.array(tails, pa.list_(pa.int64())),
            pa.array(ended_by, pa.string()),
            pa.array([self._n_plain([token, *tail]) for token, tail in zip(self.tokens, tails, strict=True)]),
            pa.array(rooms, pa.int64()),
        ]
        return Result(pa.table(columns, schema=BRANCHES), notes, {})

    def _n_plain(self, tokens: Sequence[int]) -> int:
        special = self.limits.special_ids - self.limits.end_ids
        return next((number for number, token in enumerate(tokens) if token in special), len(tokens))

    def _decoding(self, numbers: Sequence[int]) -> DecodeJob:
        return DecodeJob(
            checkpoint=self.checkpoint,
            label=self.label,
            dtype=self.dtype,
            sequences=tuple((*self.prefixes[number], self.tokens[number]) for number in numbers),
            max_new=self.max_new,
            end_ids=tuple(sorted(self.limits.end_ids)),
            max_positions=self.limits.max_positions,
            max_tokens=self.max_tokens,
            names=tuple(f"event {self.events[number]}, {self.branch} forced" for number in numbers),
        )


def branch_jobs(
    store: Store, branch: str, tokens: Mapping[int, int], label: str, max_new: int, limits: Limits
) -> list[BranchJob]:
    """The jobs of one branch, one per segment.

    Args:
        store: of the events.
        branch: its name.
        tokens: number of an event -> the token that is forced behind its sequence.
        label: of the checkpoint that writes.
        max_new: tokens of a tail at most.
        limits: what ends a branch.
    """
    captured = store.fingerprint
    jobs = []
    for segment in store.segments:
        own = [number for number in segment.events if number in tokens]
        if not own:
            continue
        ids, offsets = store.token_ids(own)
        starts = offsets.tolist()
        jobs.append(
            BranchJob(
                store=captured.digest,
                segment=segment.name,
                branch=branch,
                checkpoint=digest_of(captured.checkpoints[label].to_json()),
                label=label,
                dtype=captured.dtype,
                events=tuple(store.events["event_id"].take(pa.array(own)).to_pylist()),
                prefixes=tuple(tuple(ids[start:stop].tolist()) for start, stop in itertools.pairwise(starts)),
                tokens=tuple(tokens[number] for number in own),
                max_new=max_new,
                limits=limits,
                max_tokens=captured.max_tokens,
            )
        )
    return jobs


def read_branches(folder: Path, jobs: Sequence[BranchJob]) -> pa.Table:
    """What finished jobs left in a folder, as one table.

    Raises:
        CorruptFileError, NoSealError: a file is damaged.
        FileNotFoundError: a job is not finished.
    """
    tables = [read_result(folder / file_name(job.key)).content for job in jobs]
    return pa.concat_tables([BRANCHES.empty_table(), *tables])
