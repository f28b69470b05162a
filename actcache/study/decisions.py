"""Decisions: every event of a store decided anew by its own checkpoints, strict and in packs, and where two part.

What is decided is what the capture decided: along an event's sequence, the first position at which the pair does not
choose what follows. The choices are those of forward jobs. Knows stores and jobs; loads no models, keeps no file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from actcache.canonical import digest_of
from actcache.errors import InputError
from actcache.models.checkpoint import DTYPES
from actcache.progress import Tally, untold
from actcache.schema import HISTORIES, ROLES
from actcache.store import Store
from actcache.study.engine import LoadBackbone, LocalEngine
from actcache.study.forward_job import ForwardJob
from actcache.study.jobs import Result
from actcache.study.runner import run_jobs

UNIT = "decisions"  # what is counted: one event's by one checkpoint in one dtype, strict or packed

_GAPS = [f"gap_{role}" for role in ROLES]
DECIDED = pa.schema(
    [
        ("event_id", pa.string()),
        ("prompt_id", pa.string()),
        ("dtype", pa.string()),
        ("stable", pa.bool_()),
        ("position", pa.int64()),
        ("changed", pa.string()),
        ("gap", pa.float32()),
        ("as_stored", pa.bool_()),
        ("position_vs_stored", pa.int64()),
        ("changed_vs_stored", pa.string()),
        ("gap_vs_stored", pa.float32()),
        *((name, pa.float32()) for name in _GAPS),
        ("not_packable", pa.string()),
    ]
)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


def check_stability(
    store: Store,
    load: LoadBackbone,
    dtypes: Sequence[str],
    *,
    max_tokens: int,
    events: Sequence[int] | None = None,
    tally: Tally | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> pa.Table:
    """Decide events anew under strict and under packed numerics, and compare.

    A decision is what the capture would decide on the event's sequence: the first position, from the last prompt token
    on, at which the two checkpoints do not both choose the token that follows there, and their choices at it. Of an
    event on one checkpoint's rollout, the choices of that one alone count before the event. Which of several
    disagreements was drawn is not decided anew. Events of one sequence share a forward over it, up to the last of them.

    Args:
        store: whose events are checked; their states are not read.
        load: gives the backbone of a checkpoint by label and dtype; called once for each. One is let go before the next
            one is asked for: memory holds one model.
        dtypes: of ``float32`` and ``bfloat16``.
        max_tokens: tokens of one pack. Packs hold the events that are checked, in this order.
        events: indices, or None for all.
        tally: counts the decisions: an event by one checkpoint in one dtype, strict or packed, so four an event for
            each dtype.
        say: told, in one line, what a person should know (packing not possible, for example).

    Returns:
        One row per (dtype, event), in the order given:

        - event_id, prompt_id, dtype; gap_pt, gap_it: as captured, float32 logits, null in a store without them.
        - stable: the strict decision and the packed one are the same. Where they are not: position, the first at which
          a choice differs; changed, whose choice (a label, or ``pt,it``); gap, the changed checkpoint's top-1 minus
          top-2 logit in the strict forward there (float32; of two changed ones the larger gap). Null otherwise.
        - as_stored: the strict decision is the store's. Where it is not, position_vs_stored, changed_vs_stored and
          gap_vs_stored say the same of these two.
        - not_packable: why packs of this pair are not exact, or null. Capture, too, then runs one sequence at a time:
          packed is strict, and every event stable.

    Raises:
        InputError: unknown dtype or event.
    """
    for dtype in dtypes:
        check_dtype(dtype)
    indices = list(range(len(store)) if events is None else events)
    ids, offsets = store.token_ids(indices)
    if not indices:
        return DECIDED.empty_table()
    table = store.events.take(pa.array(indices))
    pairs = [tuple(pair.split(",")) for pair in table["pair"].to_pylist()]
    histories = [HISTORIES.get(kind, ROLES) for kind in table["kind"].to_pylist()]
    compared = _Compared(ids, offsets.numpy(), table["step"].to_numpy().astype(np.int64), pairs, histories)
    stored = _Choices({role: compared.following(table[f"y_{role}"].to_numpy()) for role in ROLES}, {})
    tally = tally or Tally(len(dtypes) * n_decisions(len(indices)), UNIT, untold)
    engine = LocalEngine(store, load_backbone=load)
    sequences = _Sequences(store, table, compared)
    parts = []
    for dtype in dtypes:
        strict, packed, reasons = _choose(engine, sequences, dtype, max_tokens, tally)
        if reasons:
            packed = strict
            say(f"{dtype}: one sequence per forward: {reasons[0]}")
        columns = {
            "event_id": table["event_id"],
            "prompt_id": table["prompt_id"],
            "dtype": [dtype] * len(indices),
            **_where_parted(compared, strict, packed, ("stable", "position", "changed", "gap")),
            **_where_parted(
                compared, strict, stored, ("as_stored", "position_vs_stored", "changed_vs_stored", "gap_vs_stored")
            ),
            **{name: table[name] for name in _GAPS if name in table.column_names},
            "not_packable": [reasons[0] if reasons else None] * len(indices),
        }
        nulls = [None] * len(indices)
        parts.append(pa.table({name: columns.get(name, nulls) for name in DECIDED.names}, DECIDED))
    return pa.concat_tables(parts)


def n_decisions(n_events: int) -> int:
    """How many decisions the check of this many events takes in one dtype."""
    return 2 * len(ROLES) * n_events


@dataclass(frozen=True)
class _Choices:
    """What the checkpoint in each role chose at every compared position, and how far its logit lay above the second."""

    tokens: dict[str, Ints]  # role -> [C]
    gaps: dict[str, Floats]  # role -> [C]; none for choices that were not made here


@dataclass(frozen=True)
class _Compared:
    """The compared positions of n events, one after another: C of them, ``step + 1`` an event, the last ones of the
    sequence up to it."""

    ids: torch.Tensor  # [T]
    offsets: Ints  # [n + 1], where the sequence of each event begins in ids
    step: Ints  # [n]
    pairs: Sequence[tuple[str, ...]]  # [n], labels in the roles
    histories: Sequence[tuple[str, ...]]  # [n], the roles whose choices count before the event, too

    @cached_property
    def starts(self) -> Ints:
        """``[n + 1]``, where each sequence's compared positions begin among all C."""
        return np.concatenate([[0], np.cumsum(self.step + 1)])

    @cached_property
    def rows(self) -> Ints:
        """``[C]``, where they lie in ids."""
        before = np.repeat(self.offsets[1:] - self.starts[1:], self.step + 1)
        return before + np.arange(self.starts[-1])

    @cached_property
    def positions(self) -> Ints:
        """``[C]``, each counted in its own sequence."""
        return self.rows - np.repeat(self.offsets[:-1], self.step + 1)

    def following(self, last: Ints) -> Ints:
        """``[C]``, the token that follows each in its sequence; ``last [n]`` after the sequences' ends."""
        tokens = np.append(self.ids.numpy(), 0)[self.rows + 1]
        tokens[self.starts[1:] - 1] = last
        return tokens

    def first(self, mask: Bools) -> Ints:
        """``[n]``, among all C the first True of each sequence; C where it has none."""
        n_compared = len(mask)
        return np.minimum.reduceat(np.where(mask, np.arange(n_compared), n_compared), self.starts[:-1])

    def counts(self, role: str) -> Bools:
        """``[C]``, whether the choices of this role decide anything there: at an event they always do."""
        before = np.repeat([role in history for history in self.histories], self.step + 1)
        before[self.starts[1:] - 1] = True
        return before

    def decided(self, choices: _Choices) -> Ints:
        """``[n]``, among all C the one at which the choices decide each event."""
        nothing = np.full(len(self.step), -1)  # no choice is what follows the last one: it always decides
        following = self.following(nothing)
        return self.first(np.logical_or(*((choices.tokens[r] != following) & self.counts(r) for r in ROLES)))


class _Sequences:
    """The sequences that some events lie on, each up to the last of them: what is run.

    Attributes:
        labels: of the checkpoints whose choices the events are.
        n_decided: how many of the events on each sequence are a label's choices, by label.
    """

    def __init__(self, store: Store, table: pa.Table, compared: _Compared) -> None:
        self._store, self._compared = store, compared
        self.labels = list(dict.fromkeys(label for pair in compared.pairs for label in pair))
        places = list(zip(table["segment"].to_pylist(), table["sequence"].to_pylist(), strict=True))
        numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
        number = np.array([numbers[place] for place in places])
        lengths = np.diff(compared.offsets)
        order = np.lexsort((lengths, number))
        begins = np.searchsorted(number[order], np.arange(len(numbers)))
        longest = order[np.append(begins[1:], len(order)) - 1]
        firsts = np.minimum.reduceat((lengths - compared.step - 1)[order], begins)
        self.n_decided = {
            label: np.bincount(number, [label in pair for pair in compared.pairs]).astype(int).tolist()
            for label in self.labels
        }
        self._ids = tuple(
            tuple(compared.ids[start:stop].tolist())
            for start, stop in zip(compared.offsets[longest], compared.offsets[longest + 1], strict=True)
        )
        self._first = tuple(firsts.tolist())
        self._names = tuple(f"event {table['event_id'][int(event)]}" for event in longest)
        starts = np.concatenate([[0], np.cumsum(lengths[longest] - firsts)])
        # Where each event's compared positions lie among those of the sequences.
        self._at = np.repeat(starts[number] - firsts[number], compared.step + 1) + compared.positions

    def job(self, label: str, dtype: str) -> ForwardJob:
        """What a checkpoint chooses along every sequence, strictly."""
        return ForwardJob(
            checkpoint=digest_of(self._store.fingerprint.checkpoints[label].to_json()),
            label=label,
            dtype=dtype,
            sequences=self._ids,
            first=self._first,
            strict=True,
            max_tokens=0,
            names=self._names,
        )

    def choices(self, found: Mapping[str, Result]) -> _Choices:
        """By role at every compared position, of what each checkpoint chose."""
        columns = {
            name: np.stack([found[label].table[name].to_numpy()[self._at] for label in self.labels])
            for name in ("top1_id", "gap")
        }
        places = np.arange(len(self._at))
        of_role = {
            role: np.repeat([self.labels.index(pair[at]) for pair in self._compared.pairs], self._compared.step + 1)
            for at, role in enumerate(ROLES)
        }
        tokens, gaps = ({r: column[label, places] for r, label in of_role.items()} for column in columns.values())
        return _Choices(tokens, gaps)


def _choose(
    engine: LocalEngine, sequences: _Sequences, dtype: str, max_tokens: int, tally: Tally
) -> tuple[_Choices, _Choices, list[str]]:
    """The choices along sequences, alone and in packs, and why packs are not exact, where they are not."""
    strict: dict[str, Result] = {}
    packed: dict[str, Result] = {}
    # Every job goes through all sequences in their order: strict, then packed.
    n_decided = itertools.chain.from_iterable(2 * sequences.n_decided[label] for label in sequences.labels)

    def keep(job: ForwardJob, result: Result) -> None:
        (strict if job.strict else packed)[job.label] = result

    def told(n: int = 0, *, found: int = 0, tokens: int = 0, doing: str = "", in_rounds: bool = False) -> None:
        tally.add(sum(itertools.islice(n_decided, n)), found=found, tokens=tokens, doing=doing, in_rounds=in_rounds)

    jobs = (sequences.job(label, dtype) for label in sequences.labels)
    both = itertools.chain.from_iterable((job, replace(job, strict=False, max_tokens=max_tokens)) for job in jobs)
    run_jobs(both, engine, keep, told)
    reasons = [reason for result in packed.values() if (reason := result.notes["not_packable"]) is not None]
    return sequences.choices(strict), sequences.choices(packed), reasons


def _where_parted(
    compared: _Compared, choices: _Choices, others: _Choices, names: tuple[str, str, str, str]
) -> dict[str, Any]:
    """Whether two decisions of each event are the same, and where they part; gaps are those of ``choices``."""
    differ = {role: (choices.tokens[role] != others.tokens[role]) & compared.counts(role) for role in ROLES}
    at = compared.first(np.logical_or(*differ.values()))
    # What is chosen after the decision does not count. Where choices differ before it, the two decisions are not one.
    same = at > compared.decided(choices)
    at = np.where(same, 0, at)
    changed = {role: differ[role][at] for role in ROLES}
    gap = np.max([np.where(changed[role], choices.gaps[role][at], -np.inf) for role in ROLES], axis=0)
    whose = [
        ",".join(label for role, label in zip(ROLES, pair, strict=True) if changed[role][event])
        for event, pair in enumerate(compared.pairs)
    ]
    columns = (
        pa.array(same),
        pa.array(compared.positions[at], pa.int64(), mask=same),
        pa.array(whose, pa.string(), mask=same),
        pa.array(gap, pa.float32(), mask=same),
    )
    return dict(zip(names, columns, strict=True))


def check_dtype(dtype: str) -> None:
    """Raise InputError for one that is unknown."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")
