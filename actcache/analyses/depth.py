"""Depth: how much of the interaction is left where only the last blocks are late.

At every boundary the 2x2 of late stacks and upstream states has an interaction B - A (effects.py). The deeper the
boundary, the fewer blocks the late stack has. *Retention* at a boundary is its mean interaction over that of the main
boundary, on the events that have both. Its interval comes from draws that both share. In arXiv 2605.07284 (terminal
depth, four families), the final three blocks keep 52% and the final one 23%.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from actcache.analyses.grid import GridSettings, check_settings, jobs_left
from actcache.capture.settings import parse_boundaries
from actcache.replay.edits import PLAIN
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, option
from actcache.study.cells import Finished
from actcache.study.contrasts import contrasts, read_by
from actcache.study.replay_job import ReplayJob
from actcache.study.section import Lines, Section
from actcache.study.statistics import DRAWS, SEED, Floats, Sample, check_draws

if TYPE_CHECKING:
    from actcache.study.run import Run

_ALIKE = ("kind", "pair", "scope", "readout")  # events of one group, at every boundary
_NAMES = ("kind", "pair", "readout")  # of a group, beside what is asked for
_MEANS = ("late_from_pt", "late_from_it", "interaction")


@dataclass(frozen=True)
class DepthOptions:
    """What to compare."""

    boundaries: str = option(
        "all", "boundaries to compare, the main one first: 18, a fraction, -3 (of L), a list (default: all captured)",
        flag="--boundary",
    )  # fmt: skip
    scope: str = option("prefix", "scope of the cells: prefix or position (default %(default)s)")
    readout: str = option(
        "common_it",
        "readout of the cells: native, common_LABEL, or common_pt and common_it of each pair (default common_it)",
    )
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


class Depth(CellAnalysis[DepthOptions]):
    """The interaction at each boundary, and what of the main one's is left there."""

    name = "depth"
    options = DepthOptions
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {"retention": ("interaction", "main_interaction")}

    def check(self, store: Store, options: DepthOptions) -> None:
        """Draws, boundaries, scope and readout."""
        check_draws(options.draws, options.seed)
        check_settings(store, _settings(store, options))

    def jobs(
        self, store: Store, finished: Finished, options: DepthOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells of every boundary asked for."""
        return jobs_left(store, finished, replace(_settings(store, options), **exactness))

    def numbers(self, cells: pa.Table, run: Run, options: DepthOptions) -> Numbers:
        """One row per event and boundary; one group per kind, pair and boundary."""
        store = run.store
        boundaries = _boundaries(store, options)
        of = {"scope": options.scope, "variant": PLAIN.name}
        chosen = pc.is_in(cells["boundary"], value_set=pa.array(boundaries, pa.int32()))
        for name, value in of.items():
            chosen = pc.and_(chosen, pc.equal(cells[name], value))
        cells = cells.filter(pc.and_(chosen, read_by(cells, options.readout, store.checkpoints)))
        table = contrasts(cells).drop_columns(["variant"])
        table = table.filter(_at_every(table, len(boundaries)))
        groups = []
        for names in sorted({tuple(row.values()) for row in table.select(_NAMES).to_pylist()}):
            alike = pc.and_(*(pc.equal(table[name], value) for name, value in zip(_NAMES[:2], names, strict=False)))
            of_kind = table.filter(alike).sort_by("event_id")
            groups += _groups(dict(zip(_NAMES, names, strict=True)) | of, of_kind, boundaries, options)
        return Numbers(table, groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Interaction and retention over boundaries."""
        main = groups[0]["main_boundary"]
        has_one_pair = len({group["pair"] for group in groups}) == 1

        def kind_of(group: Mapping[str, Any]) -> str:
            return group["kind"] if has_one_pair else f"{group['kind']} of {group['pair']}"

        ordered = sorted(groups, key=lambda group: (kind_of(group), group["boundary"]))
        kinds = list(dict.fromkeys(map(kind_of, ordered)))

        def lines(quantity: str) -> dict[str, list[tuple[int, Mapping[str, float | None]]]]:
            of_kind = {kind: [group for group in ordered if kind_of(group) == kind] for kind in kinds}
            return {kind: [(one["boundary"], one[quantity]) for one in of] for kind, of in of_kind.items()}

        said = ", ".join(f"boundary {one['boundary']} {_percent(one['retention']['mean'])}" for one in ordered)
        return Section(
            title="Terminal depth",
            figures=[
                Lines("boundary (first late block)", "interaction B - A, logits", lines("interaction"), main, said),
            ],
            columns=["kind, boundary", "events", "prompts", "A", "B", "interaction", "retention"],
            rows=[
                [
                    f"{kind_of(one)}, {one['boundary']}" + (" (main)" if one["boundary"] == main else ""),
                    one["n_events"],
                    one["n_prompts"],
                    *(one[name] for name in _MEANS),
                    one["retention"],
                ]
                for one in ordered
            ],
            shows=(
                f"Retention is the mean interaction at a boundary over that at the main boundary {main}, on the same "
                "events: what the blocks from there on still do on their own."
            ),
            does_not_show=(
                "A boundary near the end compares almost finished states. A low retention there does not say that the "
                "last blocks matter little in the whole model."
            ),
            shares=("retention",),
        )


def _settings(store: Store, options: DepthOptions) -> GridSettings:
    settings = GridSettings(tuple(_boundaries(store, options)), (options.scope,), (options.readout,))
    return settings.of_pair(store.checkpoints, store.fingerprint.event_pairs)


def _boundaries(store: Store, options: DepthOptions) -> list[int]:
    """Those asked for, the main one first."""
    if options.boundaries == "all":
        main = store.main_boundary
        return [main, *(boundary for boundary in store.boundaries if boundary != main)]
    return list(parse_boundaries(options.boundaries, store.fingerprint.n_blocks))


def _at_every(table: pa.Table, n_boundaries: int) -> pa.Array:
    """Which rows are of events that all boundaries have: a store that grew lacks some."""
    counts = table.group_by(["event_id", *_ALIKE]).aggregate([("boundary", "count_distinct")])
    whole = counts.filter(pc.equal(counts["boundary_count_distinct"], n_boundaries))["event_id"]
    return pc.is_in(table["event_id"], value_set=whole.combine_chunks())


def _groups(
    names: dict[str, Any], table: pa.Table, boundaries: Sequence[int], options: DepthOptions
) -> list[dict[str, Any]]:
    """Of one kind; every number of every boundary is of the same draws."""
    values: dict[str, Floats] = {}
    for boundary in boundaries:
        at = table.filter(pc.equal(table["boundary"], boundary))
        values |= {f"{name} {boundary}": at[name].to_numpy() for name in _MEANS}
    sample = Sample.of(at["prompt_id"], values, weights="event", draws=options.draws, seed=options.seed)
    groups = []
    for boundary in boundaries:
        group = names | {"boundary": boundary, "main_boundary": boundaries[0]}
        group |= {"n_events": sample.n_events, "n_prompts": sample.n_prompts}
        group |= {name: sample.mean(f"{name} {boundary}") for name in _MEANS}
        group["main_interaction"] = sample.mean(f"interaction {boundaries[0]}")
        group["retention"] = sample.ratio(f"interaction {boundary}", f"interaction {boundaries[0]}")
        groups.append(group)
    return groups


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.0%}"


ANALYSIS = Depth()
