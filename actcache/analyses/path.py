"""Path: what one part of a block at p does to the margin through the final norm alone.

The final state at p is a sum: the state at the boundary, and what the attention and the MLP of each later block add.
The *direct effect* of one of them: the host's final state with the source's addend in place of its own, read by the
host's final norm and head, less the host's own margin (direct logit attribution of the difference; path patching to the
head). No later block sees the change, so the *total* effect of the same patch may be another (`actcache map`). Both
checkpoints of a pair are host and source in turn. The *share* is over the mean difference of their own margins.

Where blocks norm or scale what they add (Gemma 2 and 3, OLMo 2), these are no addends, and it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from actcache.analyses.grid import GridSettings, check_settings, jobs_left, one_boundary, pairs_of
from actcache.schema import FIRST_DIVERGENCE, NATIVE
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, exactness_of, option
from actcache.study.cells import Finished, finished_cells
from actcache.study.engine import LateJob
from actcache.study.path_job import PARTS, PathSettings
from actcache.study.replay_job import ReplayJob
from actcache.study.run_folder import RunFolder
from actcache.study.section import Interval, Lines, Section
from actcache.study.statistics import DRAWS, SEED, Sample, check_draws, check_weights

if TYPE_CHECKING:
    from actcache.study.run import Run

_COLUMNS = ("event_id", "prompt_id", "host", "source", "site", "boundary", "margin")
_MOST_ROWS = 40


@dataclass(frozen=True)
class PathOptions:
    """From which block on."""

    boundary: str = option("", "boundary before the first block: 18, a fraction, -3 (of L) (default: the main one)")
    weights: str = option("prompt", "what weighs the same in a mean: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


class Paths(CellAnalysis[PathOptions]):
    """Direct effects of attention and MLPs."""

    name = "path"
    options = PathOptions
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {"share": ("effect", "difference")}

    def check(self, store: Store, options: PathOptions) -> None:
        """Boundary, draws and weights."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        check_settings(store, _cells(store, options))

    def jobs(
        self, store: Store, finished: Finished, options: PathOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells by the native readout, which the direct effects stand beside."""
        return jobs_left(store, finished, replace(_cells(store, options), **exactness))

    def own_jobs(
        self, folder: RunFolder, store: Store, options: PathOptions, exactness: Mapping[str, Any]
    ) -> Mapping[Path, Sequence[LateJob]]:
        """What the parts add."""
        place = _place(folder)
        return {place: replace(_settings(store, options), **exactness).jobs(store, finished_cells(place, store))}

    def numbers(self, cells: pa.Table, run: Run, options: PathOptions) -> Numbers:
        """One row per event, block and part; a group for each kind, pair, host, block and part."""
        store = run.store
        table = replace(_settings(store, options), **exactness_of(run.folder)).read(_place(run.folder), store)
        if not len(table):
            return Numbers(pa.table({name: pa.nulls(0) for name in _COLUMNS}), [])
        at = pc.index_in(table["event_id"], value_set=store.events["event_id"].combine_chunks()).to_numpy()
        own = {label: store.events[f"margin_{label}"].to_numpy()[at] for label in store.checkpoints}
        table = table.append_column("pair", store.events["pair"].combine_chunks().take(pa.array(at)))
        table = table.append_column("row", pa.array(range(len(table))))
        groups: list[dict[str, Any]] = []
        names = ("kind", "pair", "host", "source")
        for whose in sorted({tuple(row.values()) for row in table.select(names).to_pylist()}):
            group = dict(zip(names, whose, strict=True))
            kept = [pc.equal(table[name], value) for name, value in group.items()]
            mine = table.filter(pc.and_(pc.and_(kept[0], kept[1]), kept[2]))
            rows = mine["row"].to_numpy()
            blocks = sorted(set(mine["boundary"].to_pylist()))
            sites = {site: i for i, site in enumerate(sorted(PARTS))}
            order = mine["margin"].to_numpy().reshape(-1, len(blocks) * len(sites))  # the rows are by event and place
            base = own[group["host"]][rows].reshape(order.shape)[:, 0]
            values = {"difference": own[group["source"]][rows].reshape(order.shape)[:, 0] - base}
            places = [(block, site) for block in blocks for site in sites]
            for column, place in enumerate(places):
                values |= {f"margin {place}": order[:, column], f"effect {place}": order[:, column] - base}
            prompts = mine["prompt_id"].to_pylist()[:: order.shape[1]]
            sample = Sample.of(prompts, values, weights=options.weights, draws=options.draws, seed=options.seed)
            for block, site in places:
                groups.append(
                    {
                        **group,
                        **{"site": site, "boundary": block},
                        **{"n_events": sample.n_events, "n_prompts": sample.n_prompts},
                        **{name: sample.mean(f"{name} {(block, site)}") for name in ("margin", "effect")},
                        "share": sample.ratio(f"effect {(block, site)}", "difference"),
                        "difference": sample.mean("difference"),
                    }
                )
        return Numbers(table.select(_COLUMNS), groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Direct effects over blocks, for each host."""
        kinds = sorted({one["kind"] for one in groups})
        drawn = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else kinds[0]  # others are in the table
        lines: dict[tuple[str, str], dict[str, list[tuple[float, Interval]]]] = {}
        for one in (one for one in groups if one["kind"] == drawn):
            of_host = lines.setdefault((one["source"], one["host"]), {})
            of_host.setdefault(one["site"], []).append((one["boundary"], one["effect"]))
        largest = sorted(groups, key=lambda one: -abs(one["effect"]["mean"] or 0.0))[:_MOST_ROWS]
        shown = [one for one in groups if any(one is other for other in largest)]
        first = largest[0]
        return Section(
            title="Direct paths",
            figures=[
                Lines("block", f"direct effect, logits: {source} into {host}", of, None, f"{source} into {host}.")
                for (source, host), of in lines.items()
            ],
            columns=["part", "events", "prompts", "margin", "direct effect", "share"],
            rows=[
                [
                    (f"{one['kind']}: " if len(kinds) > 1 else "") + _in_words(one),
                    *(one["n_events"], one["n_prompts"]),
                    *(one[name] for name in ("margin", "effect", "share")),
                ]
                for one in shown
            ],
            shows=(
                f"The largest direct effect is that of {_in_words(first)} ({first['effect']['mean']:+.2f}): what the "
                "final norm and head make of its difference, all else unchanged."
            ),
            does_not_show=(
                "What a part does through later blocks is not in it, and may be most of its effect: the map has the "
                "total. The final norm makes direct effects of several parts other than their sum."
            ),
            shares=("share",),
        )


def _in_words(group: Mapping[str, Any]) -> str:
    return f"{group['source']} into {group['host']}: {group['site']} of block {group['boundary']}"


def _cells(store: Store, options: PathOptions) -> GridSettings:
    return GridSettings((one_boundary(store, options.boundary),), ("prefix",), (NATIVE,))


def _settings(store: Store, options: PathOptions) -> PathSettings:
    return PathSettings(pairs_of(store), one_boundary(store, options.boundary))


def _place(folder: RunFolder) -> Path:
    return folder.path / "path" / "parts"


ANALYSIS = Paths()
