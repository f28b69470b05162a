"""Handoff: how much of what a window of earlier MLPs does to the margin goes through the best features at the end.

The final blocks, from the first with a crosscoder on, are the descendant's in all that follows. Before them runs a
host:

- *rescue*: the base, with the descendant's MLPs in a window of its blocks. The *change* is what the margin gains.
- *degrade*: the descendant, with the base's MLPs there. The change is what the margin loses.

It is a swap of weights on what the host hands them (`actcache windows`). At position p, the final blocks then lose the
features of the set, both behind the host as it is and behind the changed one. What of the change is gone is *mediated*
by the set. Its *share* is a ratio of means. The *fraction* is the mean over events of mediated / change, where the
change is larger than 1e-6. The window `entry` swaps the state that enters the final blocks, from the base's to the
descendant's: no module, all that came before.

Windows of the study are `early` and `mid`, `late_preterminal` (from the main boundary to the final blocks) and
`midlate_preterminal` (from the middle to the final blocks). Those are left out that begin before every captured
boundary, and the first of two that are the same blocks. In arXiv 2605.07284 (three families), the best features
mediate 6.5% of the rescue and 10.8% of the degrade direction, and 12.5% of the entry's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache.analyses.features.before import Before
from actcache.analyses.features.cell_step import CellStep
from actcache.analyses.features.edited import (
    SETS,
    EditOptions,
    Moved,
    check_edits,
    minus,
    numbered,
    over_seeds,
    size,
    stand_ins,
    variants_of,
    with_controls,
)
from actcache.analyses.features.rank import ranking_seal, read_ranked
from actcache.analyses.features.ranked import Ranked
from actcache.analyses.windows import Window, check_together, not_served, study_windows, windows_of
from actcache.canonical import digest_of
from actcache.errors import InputError
from actcache.replay.edits import PLAIN, Variant
from actcache.replay.swap import Swap
from actcache.schema import FIRST_DIVERGENCE
from actcache.store import Store
from actcache.study.analysis import Numbers, exactness_of, option
from actcache.study.cells import Finished, finished_cells
from actcache.study.engine import LateJob
from actcache.study.handoff_job import Handoff
from actcache.study.results import file_name
from actcache.study.run_folder import RunFolder
from actcache.study.section import Bars, Section
from actcache.study.statistics import Floats, Sample

if TYPE_CHECKING:
    from actcache.study.run import Run

ENTRY = "entry"
DIRECTIONS = ("rescue", "degrade")
LEAST_CHANGE = 1e-6
"""Where the margin changes by no more, an event has no fraction of it."""


@dataclass(frozen=True)
class HandoffOptions(EditOptions):
    """Which windows, and how many features are removed behind them."""

    k: int = option(200, "size of the set; a larger one is all features (default %(default)s)", type=size)
    window: str = option(
        "",
        "windows as NAME=FIRST:STOP, with commas between, before the first block with a crosscoder (default: those of "
        "the study that the store serves)",
    )


class _Place(NamedTuple):
    """A host with the other's MLPs in a window; None for the host as it is."""

    host: str
    window: Window | None


class FeatureHandoff(CellStep[HandoffOptions]):
    """What the best features hand on of earlier windows."""

    name = "features handoff"
    options = HandoffOptions
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {"share": ("mediated", "change"), "fraction": None}

    def check(self, store: Store, options: HandoffOptions) -> None:
        """As of all edits."""
        check_edits(options)

    def made_from(self, folder: RunFolder, store: Store) -> dict[str, Any]:
        """As of every step, and the ranking."""
        return super().made_from(folder, store) | {"ranking": ranking_seal(folder)}

    def asked(
        self, folder: RunFolder, store: Store, finished: Finished, options: HandoffOptions
    ) -> dict[Path, Sequence[LateJob]]:
        """Both hosts as they are, and with the other's MLPs in each window."""
        if not len(store):
            return {}
        ranked = _ranked(folder, store)
        return self._work(folder, store, ranked, options, self._variants(folder, store, ranked, options))

    def planned(self, before: Before, folder: RunFolder, finished: Finished) -> Mapping[Path, Sequence[LateJob]]:
        """The same, of a ranking to come."""
        ranked, options = Ranked.before(before), self.options()
        variants = (PLAIN, *stand_ins(_moved(ranked, options), before.store.width))
        return self._work(folder, before.store, ranked, options, variants)

    def _work(
        self, folder: RunFolder, store: Store, ranked: Ranked, options: HandoffOptions, variants: Sequence[Variant]
    ) -> dict[Path, Sequence[LateJob]]:
        """What is not finished of all hosts."""
        place = self._place(folder, ranked, options)
        done = finished_cells(place, store)
        every = self._handoffs(folder, store, ranked, options, variants)
        left = (job for one in every.values() for job in one.jobs(store, done))
        return {place: list({file_name(job.key): job for job in left}.values())}  # two windows may be the same blocks

    def leaves_out(self, store: Store, options: HandoffOptions) -> str:
        """Windows of the study that begin before every boundary."""
        windows = _study_windows(store, store.fingerprint.n_blocks)
        return "" if options.window else not_served(store, windows)

    def answer(self, run: Run, options: HandoffOptions, **how: Any) -> dict[str, Any]:
        """See :meth:`CellAnalysis.answer`.

        Raises:
            InputError: also where one checkpoint is in memory at a time.
        """
        check_together(run)
        return super().answer(run, options, **how)

    def numbers(self, cells: pa.Table, run: Run, options: HandoffOptions) -> Numbers:
        """One row per event, direction, window and set; groups for each kind, direction, window and set."""
        folder, store = run.folder, run.store
        empty = store.events.select(["event_id", "prompt_id"]).slice(0, 0)
        if not len(store):
            return Numbers(empty, [])
        ranked = _ranked(folder, store)
        moved = _moved(ranked, options)
        names = [Variant(PLAIN.name), *(Variant(one.name) for one in moved)]  # results are found by these
        place = self._place(folder, ranked, options)
        handoffs = self._handoffs(folder, store, ranked, options, names)
        margins = {at: one.read(place, store) for at, one in handoffs.items()}
        events, (pt, it) = store.events, ranked.reading.pair
        kept = pc.equal(events["pair"], f"{pt},{it}")
        if options.tested == "held_out":
            ranking = pc.is_in(events["prompt_id"], value_set=pa.array(sorted(ranked.prompts), pa.string()))
            kept = pc.and_(kept, pc.invert(ranking))
        tables, groups = [empty], []
        for kind in sorted(set(events.filter(kept)["kind"].to_pylist())):
            own = np.flatnonzero(pc.and_(kept, pc.equal(events["kind"], kind)).to_numpy())
            of = events.take(pa.array(own)).select(["event_id", "prompt_id", "kind", "pair"])
            for direction, window, change in _changes(margins, ranked):
                found = change[:, own]
                named = {"kind": kind, "pair": f"{pt},{it}", "direction": direction, "window": window.name}
                named |= {"first": window.first, "stop": window.stop, "readout": ranked.reading.readout}
                tables.append(_table(of, named, moved, found))
                groups += [named | one for one in _groups(of, moved, found, options)]
        return Numbers(pa.concat_tables(tables, promote_options="default"), groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """The share of each window's change that each set mediates."""
        kinds = list(dict.fromkeys(one["kind"] for one in groups))
        drawn = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else kinds[0]
        bars: dict[str, list[tuple[str, Any]]] = {}
        for one in groups:
            if one["kind"] == drawn and one["set"] in ("top", "random"):
                series = f"{one['direction']}, {SETS[one['set']]}"
                bars.setdefault(series, []).append((one["window"], one["share"]))
        numbers = ("change", "mediated", "share", "fraction")
        return Section(
            title="What the final features hand on",
            figures=[Bars("mediated / change", bars, 0.0, "What goes through the features, by window.", shares=True)],
            columns=["direction, window, set", "blocks", "events", "prompts", *numbers],
            rows=[
                [
                    ", ".join(
                        [*([one["kind"]] if len(kinds) > 1 else []), one["direction"], one["window"], SETS[one["set"]]]
                    ),
                    f"{one['first']}..{one['stop'] - 1}" if one["window"] != ENTRY else "",
                    *(one[name] for name in ("n_events", "n_prompts", *numbers)),
                ]
                for one in groups
            ],
            shows=(
                "How much of what the MLPs of a window do to the margin is gone when the final blocks lose the best "
                "features, and when they lose as many others."
            ),
            does_not_show=(
                "What is not mediated may go through other features, through what the crosscoders leave out, or "
                "through the final blocks' attention. The swapped MLPs run on states that are not their own."
            ),
            shares=("share", "fraction"),
        )

    def _place(self, folder: RunFolder, ranked: Ranked, options: HandoffOptions) -> Path:
        """Where results lie: those of other sets lie elsewhere."""
        digest = digest_of([ranked.made, [one.described for one in _moved(ranked, options)]])
        return folder.features / self.step / digest[:16]

    def _variants(
        self, folder: RunFolder, store: Store, ranked: Ranked, options: HandoffOptions
    ) -> tuple[Variant, ...]:
        of = variants_of(_moved(ranked, options), ranked, folder, store, ranked.reading.pair[1:])
        return (PLAIN, *(one for variants in of.values() for one in variants))

    def _handoffs(
        self, folder: RunFolder, store: Store, ranked: Ranked, options: HandoffOptions, variants: Sequence[Variant]
    ) -> dict[_Place, Handoff]:
        pair, first = ranked.reading.pair, ranked.blocks[0]
        plain = Handoff("", ranked.reading.boundary, None, pair[1], first, variants, **exactness_of(folder))
        found = {_Place(host, None): replace(plain, host=host) for host in pair}
        for window in _windows(store, first, options.window):
            at = max(boundary for boundary in store.boundaries if boundary <= window.first)
            for host, source in (pair, pair[::-1]):
                swap = Swap(source, "mlp", window.first, window.stop)
                found[_Place(host, window)] = replace(plain, host=host, boundary=at, swap=swap)
        return found


def _ranked(folder: RunFolder, store: Store) -> Ranked:
    """The ranking; features that are read jointly would need what the base's final blocks give on every state."""
    ranked = read_ranked(folder, store)
    if ranked.reading.encoding != "branch":
        raise InputError(
            "a handoff reads the descendant's branch alone, and the ranking is of a joint encoding: "
            f"'actcache features rank {folder.path}' ranks by the branch"
        )
    return ranked


def _moved(ranked: Ranked, options: HandoffOptions) -> list[Moved]:
    return list(with_controls(ranked, ranked.top(options.k), options.seeds, tuple(SETS)[1:]))


def _windows(store: Store, first: int, given: str) -> list[Window]:
    """Those that a text names, or those of the study that the store serves; all end before the final blocks.

    Raises:
        InputError: see :func:`actcache.analyses.windows.windows_of`; or one does not end there.
    """
    if given:
        windows = windows_of(store, given)
        for window in windows:
            if window.stop > first or window.name == ENTRY:
                raise InputError(
                    f"window {window.name}={window.first}:{window.stop}: expected one that ends before block {first}, "
                    f"the first with a crosscoder, and is not named {ENTRY}"
                )
        return windows
    served = [one for one in _study_windows(store, first) if min(store.boundaries) <= one.first]
    return list({(one.first, one.stop): one for one in served}.values())


def _study_windows(store: Store, first: int) -> list[Window]:
    """Those of the study, cut where the final blocks begin, whether the store serves them or not."""
    named = {one.name: one for one in study_windows(store.fingerprint.n_blocks, store.main_boundary)}
    found = [named["early"], named["mid"]]
    found += [Window("late_preterminal", store.main_boundary, first)]
    found += [Window("midlate_preterminal", named["mid"].first, first)]
    cut = [window._replace(stop=min(window.stop, first)) for window in found]
    return [one for one in cut if one.first < one.stop]


def _changes(margins: Mapping[_Place, Floats], ranked: Ranked) -> list[tuple[str, Window, Floats]]:
    """Direction, window and change of the margin ``[V, E]``, under no edit and each."""
    (pt, it), first = ranked.reading.pair, ranked.blocks[0]
    base, descendant = (margins[_Place(host, None)] for host in (pt, it))
    found = [("both", Window(ENTRY, first, first), descendant - base)]
    for at, of in margins.items():
        if at.window is not None:
            change = of - base if at.host == pt else descendant - of
            found.append((DIRECTIONS[at.host == it], at.window, change))
    return found


def _mediated(change: Floats) -> list[Floats]:
    """Of each edit, ``[E]``: how much of the change is gone under it."""
    return [change[0] - of for of in change[1:]]


def _table(events: pa.Table, named: Mapping[str, Any], moved: Sequence[Moved], change: Floats) -> pa.Table:
    tables, n = [], len(events)
    for one, mediated in zip(moved, _mediated(change), strict=True):
        of: dict[str, pa.Array] = {name: pa.array([named[name]] * n) for name in ("direction", "window")}
        of |= {name: pa.array([named[name]] * n, pa.int32()) for name in ("first", "stop")}
        of |= {"set": pa.array([one.set] * n), "k": pa.array([one.k] * n, pa.int32())}
        of |= {"features": pa.array([one.n] * n, pa.int32()), "seed": pa.array([one.seed] * n, pa.int32())}
        of |= {"change": pa.array(change[0]), "mediated": pa.array(mediated)}
        tables.append(pa.table({name: events[name] for name in events.column_names} | of))
    return pa.concat_tables(tables)


def _groups(events: pa.Table, moved: Sequence[Moved], change: Floats, options: HandoffOptions) -> list[dict[str, Any]]:
    of_sets = {str(key): one for key, one in over_seeds(moved, _mediated(change)).items()}
    how: dict[str, Any] = {"weights": options.weights, "draws": options.draws, "seed": options.seed}
    prompts = events["prompt_id"]
    sample = Sample.of(prompts, of_sets | {"change": change[0]}, **how)
    kept = np.abs(change[0]) > LEAST_CHANGE
    fractions = {key: one[kept] / change[0][kept] for key, one in of_sets.items()}
    by_event = Sample.of(prompts.filter(pa.array(kept)), fractions, **how)
    groups, n = [], numbered(moved)
    for (name, k, amount), features in n.items():
        key = str((name, k, amount))
        group: dict[str, Any] = {"set": name, "k": k, "features": features}
        group |= {"n_events": sample.n_events, "n_prompts": sample.n_prompts}
        group |= {"change": sample.mean("change"), "mediated": sample.mean(key)}
        group |= {"share": sample.ratio(key, "change"), "fraction": by_event.mean(key)}
        group["n_of_fraction"] = by_event.n_events
        others = {other: str((other, k, amount)) for other in SETS if (other, k, amount) in n}
        groups.append(group | minus(sample, key, others))
    return groups


ANALYSIS = FeatureHandoff()
