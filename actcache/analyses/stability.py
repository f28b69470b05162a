"""Stability: would an event be the same one if its forwards were rounded otherwise?

An argmax may depend on the shape of the batch that computed it, above all in bfloat16. Here both checkpoints of the
pair decide every event anew on its own sequence, twice in each dtype: *strict*, one sequence per forward, and *packed*,
many in one. Nothing is captured again; the token ids in the store are enough.

For whoever asks how many of a run's events its numerics have made. The choices are those of forward jobs. The table is
kept as it grows, so that a dtype that was checked is not checked again. Knows the store and jobs; loads no models
itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from actcache.errors import InputError
from actcache.files import locked, write_atomically
from actcache.models.backbone import Backbone
from actcache.models.checkpoint import DTYPES
from actcache.progress import OnProgress, Tally, untold
from actcache.schema import CHOSEN_KINDS, HISTORIES, ROLES, digest_of
from actcache.sealed import NoSealError, Sealed, parquet_bytes, read_parquet
from actcache.store import Store
from actcache.study.analysis import Analysis, Section, option
from actcache.study.cells import identity
from actcache.study.engine import LocalEngine
from actcache.study.forward_job import ForwardJob
from actcache.study.jobs import Result
from actcache.study.run_folder import RunFolder
from actcache.study.runner import run_jobs
from actcache.study.statistics import Sample

if TYPE_CHECKING:
    from actcache.study.run import Run

UNIT = "decisions"  # what is counted: one event's by one checkpoint in one dtype, strict or packed

_GAPS = [f"gap_{role}" for role in ROLES]
_SCHEMA = pa.schema(
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
    load: Callable[[str, torch.dtype], Backbone],
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
        _check_dtype(dtype)
    indices = list(range(len(store)) if events is None else events)
    ids, offsets = store.token_ids(indices)
    if not indices:
        return _SCHEMA.empty_table()
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
        parts.append(pa.table({name: columns.get(name, nulls) for name in _SCHEMA.names}, _SCHEMA))
    return pa.concat_tables(parts)


def run_stability(
    store: Store,
    load: Callable[[str, torch.dtype], Backbone],
    path: str | Path,
    samples: Mapping[str, int | None],
    *,
    max_tokens: int,
    device: str = "cpu",
    on_progress: OnProgress = untold,
    say: Callable[[str], None] = lambda line: None,
) -> pa.Table:
    """The table of :func:`check_stability` over evenly spread events, kept in a file and made only where it is not.

    Args:
        store: as for :func:`check_stability`, and so are load, max_tokens and say.
        load: see there.
        path: of the Parquet file, written anew after each dtype. A dtype that it holds is not checked again if it was
            checked for this store on as many events or more, with the same ``max_tokens``, device and library versions.
        samples: dtype -> how many events, None for all, of those whose tokens the pair chose.
        max_tokens: see there.
        device: where ``load`` puts the models.
        on_progress: told of the decisions, after every pack.
        say: see there.

    Returns:
        What the file now holds: the dtypes asked for, and any other one that it held of this store.

    Raises:
        InputError: unknown dtype, or a sample of less than one event.
    """
    chosen = chosen_events(store)
    made_with = {
        "max_tokens": max_tokens,
        "device": device,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    wanted = {}
    for dtype, sample in samples.items():
        _check_dtype(dtype)
        if sample is not None and sample < 1:
            raise InputError(f"a sample of {sample} events: give at least 1, or all")
        wanted[dtype] = len(chosen) if sample is None else min(sample, len(chosen))
    path, found = Path(path), read_sealed(store, path)
    tally = Tally(sum(map(n_decisions, wanted.values())), UNIT, on_progress)
    for dtype, n_wanted in wanted.items():
        note = found.made_from["dtypes"].get(dtype, {})
        if {name: note.get(name) for name in made_with} == made_with and note["n_events"] >= n_wanted:
            tally.add(found=n_decisions(n_wanted))
            continue
        events = [chosen[index] for index in spread(len(chosen), n_wanted)]
        rows = check_stability(store, load, [dtype], max_tokens=max_tokens, events=events, tally=tally, say=say)
        with locked(path):  # another check may have written another dtype meanwhile
            found = read_sealed(store, path)
            of_dtype = {name: found.content.filter(pc.equal(found.content["dtype"], name)) for name in DTYPES}
            table = pa.concat_tables([_SCHEMA.empty_table(), *(of_dtype | {dtype: rows}).values()])
            notes = found.made_from["dtypes"] | {dtype: {"n_events": n_wanted, **made_with}}
            write_atomically(path, parquet_bytes(table, {**identity(store), "dtypes": notes}))
            found = read_sealed(store, path)
    return found.content


def chosen_events(store: Store) -> list[int]:
    """The events whose tokens the pair chose: nothing is decided at those that were given."""
    return [index for index, kind in enumerate(store.events["kind"].to_pylist()) if kind in CHOSEN_KINDS]


def read_stability(store: Store, path: str | Path) -> pa.Table:
    """The table that :func:`run_stability` left; without rows where there is none, or one of other events or of an
    earlier version.

    Raises:
        InputError: the file is not such a table.
        CorruptFileError: it is damaged.
    """
    return read_sealed(store, path).content


def read_sealed(store: Store, path: str | Path) -> Sealed:
    """That table, and under ``dtypes`` of what it was made from, how each was checked (errors as above)."""
    nothing = Sealed(_SCHEMA.empty_table(), {"dtypes": {}}, "")
    try:
        found = read_parquet(path, "a table of stability", "remove it and check again")
    except FileNotFoundError:
        return nothing
    except NoSealError:
        if _is_of_an_earlier_version(path):
            return nothing
        raise
    if not found.content.schema.equals(_SCHEMA):
        names = found.content.column_names
        raise InputError(f"{path} is not a table of stability: its columns are {names}; remove it and check again")
    made_from = identity(store)
    return found if {name: found.made_from.get(name) for name in made_from} == made_from else nothing


def _is_of_an_earlier_version(path: str | Path) -> bool:
    """Whether a table without a seal never had one: what it holds cannot be checked, and is made again."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return False
    return schema.equals(_SCHEMA) and set(schema.metadata or ()) == {b"actcache"}


def spread(n_events: int, n: int) -> list[int]:
    """``n`` indices spread evenly over ``n_events``, the first one included; all of them where ``n`` is not less."""
    return [index * n_events // n for index in range(n)] if n < n_events else list(range(n_events))


def n_decisions(n_events: int) -> int:
    """How many decisions the check of this many events takes in one dtype."""
    return 2 * len(ROLES) * n_events


def summarise(table: pa.Table) -> list[dict[str, Any]]:
    """One group per dtype, in the order of the table, ready for JSON.

    Each has ``dtype``, ``n_events`` (checked) and ``n_prompts``; ``changed`` and ``not_as_stored``, the shares of
    events that are not stable and not as stored, with intervals; ``n_changed``, ``gap_median`` and ``gap_max`` of the
    first (None without one), ``n_not_as_stored``, ``gap_median_vs_stored`` and ``gap_max_vs_stored`` of the second; and
    ``not_packable``.
    """
    summaries = []
    for dtype in dict.fromkeys(table["dtype"].to_pylist()):
        rows = table.filter(pc.equal(table["dtype"], dtype))
        gap, vs_stored = (rows[name].drop_null().to_numpy() for name in ("gap", "gap_vs_stored"))
        differ = {name: pc.invert(rows[name]).cast(pa.float64()).to_numpy() for name in ("stable", "as_stored")}
        sample = Sample.of(rows["prompt_id"], differ, weights="event")
        summaries.append(
            {
                "dtype": dtype,
                "n_events": sample.n_events,
                "n_prompts": sample.n_prompts,
                "changed": sample.mean("stable"),
                "not_as_stored": sample.mean("as_stored"),
                "n_changed": len(gap),
                "gap_median": float(np.median(gap)) if len(gap) else None,
                "gap_max": float(gap.max()) if len(gap) else None,
                "n_not_as_stored": len(vs_stored),
                "gap_median_vs_stored": float(np.median(vs_stored)) if len(vs_stored) else None,
                "gap_max_vs_stored": float(vs_stored.max()) if len(vs_stored) else None,
                "not_packable": rows["not_packable"][0].as_py(),
            }
        )
    return summaries


def describe(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What :func:`summarise` returned, as two lines for people; none where nothing was checked."""
    if not summaries:
        return []

    def counted(count: str, suffix: str, words: str) -> str:
        found: list[str] = []
        for summary in summaries:
            n, median, largest = (summary[name] for name in (count, f"gap_median{suffix}", f"gap_max{suffix}"))
            gaps = f", at gaps up to {largest:.2g} (median {median:.2g})" if n else ""
            said = "" if found else f" events {words}"
            found.append(f"{summary['dtype']}: {n} of {summary['n_events']}{said}{gaps}")
        return "; ".join(found)

    between = counted("n_changed", "", "change between strict and packed")
    if all(summary["not_packable"] for summary in summaries):
        between = "packed is strict here, one sequence per forward: no event can change between them"
    return [between, counted("n_not_as_stored", "_vs_stored", "differ from the stored decision")]


@dataclass(frozen=True)
class StabilityOptions:
    """What to decide anew."""

    dtype: str = option(",".join(DTYPES), "dtypes to decide in: a list of float32, bfloat16 (default: both)")
    sample: str = option(
        "all",
        "number of events to decide anew, evenly spread, or all; float32=100,bfloat16=all has one for each dtype "
        "(default %(default)s)",
    )
    max_tokens: int | None = option(None, "tokens per pack (default: as captured)", type=int)

    @property
    def samples(self) -> dict[str, int | None]:
        """How many events in each dtype; None for all.

        Raises:
            InputError: an unknown dtype, or a sample of less than one event.
        """
        asked = dict.fromkeys((name.strip() for name in self.dtype.split(",")), self.sample)
        if "=" in self.sample:
            each = {dtype: n for dtype, _, n in (part.partition("=") for part in self.sample.split(","))}
            if unasked := [name for name in each if name not in asked]:
                raise InputError(
                    f"--sample {self.sample} has {unasked[0]!r}, of which --dtype {self.dtype} knows nothing; give "
                    "DTYPE=N for some of its dtypes, or one number for all"
                )
            asked = each
        for dtype, sample in asked.items():
            _check_dtype(dtype)
            if sample != "all" and not (sample.isdecimal() and int(sample) > 0):
                raise InputError(f"a sample of {sample} events: give at least 1, or all")
        return {dtype: None if sample == "all" else int(sample) for dtype, sample in asked.items()}


class Stability(Analysis[StabilityOptions]):
    """Which events other rounding would change."""

    name = "stability"
    options = StabilityOptions
    opt_in = True  # whole models run over every event, eight times
    needs_less = "a lower --max-tokens needs less"

    def check(self, store: Store, options: StabilityOptions) -> None:
        """Dtypes, samples and tokens per pack."""
        _ = options.samples
        if options.max_tokens is not None and options.max_tokens < 1:
            raise InputError(f"{options.max_tokens} tokens per pack: give at least 1")

    def answer(
        self,
        run: Run,
        options: StabilityOptions,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """See :meth:`Analysis.answer`."""
        store = run.folder.open_store()
        self.check(store, options)
        if not chosen_events(store) and len(store):
            say("the tokens of all events were given: nothing decides them, so rounding cannot change them")
        table = run_stability(
            store,
            run.load_backbone,
            run.folder.stability,
            options.samples,
            max_tokens=options.max_tokens or store.fingerprint.max_tokens,
            device=run.device,
            on_progress=on_progress,
            say=say,
        )
        return self.write(run.folder, options, summarise(table), self.made_from(run.folder, store))

    def what_next(self, folder: RunFolder, options: StabilityOptions) -> str:
        """What leaves the events out that change."""
        return (
            f"{folder.stability} holds them; 'actcache effects {folder.path} --stable-only' leaves changed events out"
        )

    def read(self, folder: RunFolder, store: Store) -> dict[str, Any] | None:
        """Of the table: it may have grown since, and an earlier version left no more."""
        if not self.table_path(folder).is_file():
            return None
        content = super().read(folder, store) or {"options": asdict(StabilityOptions())}
        return content | {"groups": summarise(read_stability(store, folder.stability))}

    def lines(self, found: Mapping[str, Any], store: Store | None = None) -> list[str]:
        """Counts in two sentences."""
        return describe(found["groups"]) or super().lines(found)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Counts and gaps of each dtype."""

        def gap(group: Mapping[str, Any], name: str) -> str | dict[str, float | None]:
            return "-" if group[name] is None else {"mean": group[name], "low": None, "high": None}

        largest = max((group["gap_max"] for group in groups if group["n_changed"]), default=None)
        reasons = [group["not_packable"] for group in groups]
        if largest is not None:
            found = (
                "A choice that changes was made by rounding, not by the checkpoint; here that happened at gaps up to "
                f"{largest:.2g} logits. 'actcache effects --stable-only' leaves such events out."
            )
        elif all(reasons):
            found = f"Packs of these checkpoints are not exact ({reasons[0]}): sequences always run one at a time."
        else:
            found = "None of the events checked hangs on the shape of its batch."
        return Section(
            title="Events that rounding would change",
            figures=[],
            columns=[
                "dtype",
                "events checked",
                "change between strict and packed",
                "largest gap",
                "median gap",
                "strict differs from the stored event",
                "largest gap there",
                "median gap there",
            ],
            rows=[
                [
                    group["dtype"],
                    f"{group['n_events']:,}",
                    "never packed" if group["not_packable"] else f"{group['n_changed']:,}",
                    gap(group, "gap_max"),
                    gap(group, "gap_median"),
                    f"{group['n_not_as_stored']:,}",
                    gap(group, "gap_max_vs_stored"),
                    gap(group, "gap_median_vs_stored"),
                ]
                for group in groups
            ],
            shows=(
                "Which logit is the highest may depend on the shape of the batch that computed it. Events were decided "
                "anew from their token ids: strict, one sequence per forward, and packed, many in one. "
                f"{found}"
            ),
            does_not_show=(
                "The stored events are those of this run's dtype. The other dtype's row says how many it would have "
                "decided otherwise; it does not say which of the two is right."
            ),
        )


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

    def told(n: int = 0, *, tokens: int = 0, doing: str = "") -> None:
        tally.add(sum(itertools.islice(n_decided, n)), tokens=tokens, doing=doing)

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


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}")


ANALYSIS = Stability()
