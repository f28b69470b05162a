"""Stability: would an event be the same one if its forwards were rounded otherwise?

An argmax may depend on the shape of the batch that computed it, above all in bfloat16. Here both checkpoints of the
pair decide every event anew on its own sequence, twice in each dtype: *strict*, one sequence per forward, and *packed*,
many in one. Nothing is captured again; the token ids in the store are enough.

For whoever asks how many of a run's events its numerics have made. The choices are those of forward jobs. The table is
kept as it grows, so that a dtype that was checked is not checked again. Knows the store and jobs; loads no models
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actcache.errors import InputError
from actcache.files import as_path, write_atomically
from actcache.models.checkpoint import DTYPES
from actcache.progress import OnProgress, Tally, untold
from actcache.schema import CHOSEN_KINDS
from actcache.sealed import NoSealError, Sealed, parquet_bytes, read_parquet
from actcache.store import Store
from actcache.store.claims import Claims
from actcache.store.storage import open_storage
from actcache.study.analysis import Analysis, option
from actcache.study.cells import identity
from actcache.study.decisions import DECIDED, UNIT, check_dtype, check_stability, n_decisions
from actcache.study.engine import LoadBackbone
from actcache.study.run_folder import RunFolder
from actcache.study.section import Section
from actcache.study.statistics import Sample

if TYPE_CHECKING:
    from actcache.study.run import Run


def run_stability(
    store: Store,
    load: LoadBackbone,
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
        check_dtype(dtype)
        if sample is not None and sample < 1:
            raise InputError(f"a sample of {sample} events: give at least 1, or all")
        wanted[dtype] = len(chosen) if sample is None else min(sample, len(chosen))
    path = as_path(path)
    found = read_sealed(store, path)
    tally = Tally(sum(map(n_decisions, wanted.values())), UNIT, on_progress)
    for dtype, n_wanted in wanted.items():
        note = found.made_from["dtypes"].get(dtype, {})
        if {name: note.get(name) for name in made_with} == made_with and note["n_events"] >= n_wanted:
            tally.add(found=n_decisions(n_wanted))
            continue
        events = [chosen[index] for index in spread(len(chosen), n_wanted)]
        rows = check_stability(store, load, [dtype], max_tokens=max_tokens, events=events, tally=tally, say=say)
        with Claims(open_storage(path.parent)) as claims, claims.alone(path.name):
            # Another check may have written another dtype meanwhile.
            found = read_sealed(store, path)
            of_dtype = {name: found.content.filter(pc.equal(found.content["dtype"], name)) for name in DTYPES}
            table = pa.concat_tables([DECIDED.empty_table(), *(of_dtype | {dtype: rows}).values()])
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
    nothing = Sealed(DECIDED.empty_table(), {"dtypes": {}}, "")
    try:
        found = read_parquet(path, "a table of stability", "remove it and check again")
    except FileNotFoundError:
        return nothing
    except NoSealError:
        if _is_of_an_earlier_version(path):
            return nothing
        raise
    if not found.content.schema.equals(DECIDED):
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
    return schema.equals(DECIDED) and set(schema.metadata or ()) == {b"actcache"}


def spread(n_events: int, n: int) -> list[int]:
    """``n`` indices spread evenly over ``n_events``, the first one included; all of them where ``n`` is not less."""
    return [index * n_events // n for index in range(n)] if n < n_events else list(range(n_events))


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
            check_dtype(dtype)
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
            run.load_blocks,
            run.folder.stability,
            options.samples,
            max_tokens=options.max_tokens or store.fingerprint.max_tokens,
            device=run.placement.kind,
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


ANALYSIS = Stability()
