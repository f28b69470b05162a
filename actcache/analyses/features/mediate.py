"""Mediate: how much of the interaction goes through a few features of the final blocks' MLPs.

The best k features of the ranking are removed at position p, while the descendant's late blocks run on both upstream
states: what each MLP gives loses f_i D_i of every feature i of the set. The *drop* is the interaction less what it is
then. Its *share* is the mean drop over the mean interaction of the same boundary's plain cells. A negative drop says
that the interaction is larger without the features.

Beside every set stand its controls: as many *matched random* features, each drawn among the 50 others of its block that
are nearest in active rate times mean attribution; *random directions*, in each of which a row moves as far as it does
with the set; and the *most active others*, of the half whose scores are nearest to 0.

In arXiv 2605.07284, the best 200 features carry 48%, 26% and 37% of the interaction in three families, matched random
ones less than nothing. Its shares are over interactions of two different boundaries; here it is always that of the
edited cells. Rank with `--boundary` to choose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from actcache.analyses.features.edited import (
    SETS,
    EditOptions,
    EditStep,
    Moved,
    Tested,
    drop_groups,
    drops,
    event_table,
    of_what,
    sizes,
    with_controls,
)
from actcache.analyses.features.ranked import Ranked
from actcache.schema import FIRST_DIVERGENCE
from actcache.study.analysis import Numbers, option
from actcache.study.section import Interval, Lines, Section

if TYPE_CHECKING:
    from actcache.study.run import Run


@dataclass(frozen=True)
class MediateOptions(EditOptions):
    """How many features are removed."""

    k: tuple[int, ...] = option(
        (25, 50, 100, 200, 500), "sizes of sets; larger ones are all features (default 25,50,100,200,500)", type=sizes
    )


class Mediate(EditStep[MediateOptions]):
    """The interaction without the best features."""

    name = "features mediate"
    options = MediateOptions
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {"share": ("drop", "interaction")}

    def moved(self, ranked: Ranked, options: MediateOptions) -> list[Moved]:
        """The best k, and all controls of each."""
        controls = tuple(SETS)[1:]
        return [
            moved
            for k in ranked.capped(options.k)
            for moved in with_controls(ranked, ranked.top(k), options.seeds, controls)
        ]

    def of_kind(
        self, tested: Tested, moved: Sequence[Moved], ranked: Ranked, run: Run, options: MediateOptions
    ) -> Numbers:
        """Drops, and their shares."""
        found = drops(tested, moved, ranked.reading)
        interaction = tested.effects["interaction"].to_numpy()
        table = event_table(tested, moved, {"interaction": [interaction] * len(moved), "drop": found})
        return Numbers(table, drop_groups(tested, moved, ranked.reading, options)[1])

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """The share over k, of the set and its controls."""
        kinds = list(dict.fromkeys(one["kind"] for one in groups))
        drawn = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else kinds[0]  # others are in the table
        lines: dict[str, list[tuple[float, Interval]]] = {}
        for one in (one for one in groups if one["kind"] == drawn):
            lines.setdefault(SETS[one["set"]], []).append((one["k"], one["share"]))
        boundary = groups[0]["boundary"]
        warning = of_what(groups, drawn)
        said = warning.strip() or "; ".join(
            f"{one['k']} features {one['share']['mean']:.0%}"
            for one in groups
            if one["kind"] == drawn and one["set"] == "top" and one["share"]["mean"] is not None
        )
        return Section(
            title="Features that carry the interaction",
            figures=[
                Lines("features removed", f"drop / interaction at boundary {boundary}", lines, None, said, shares=True)
            ],
            columns=["set, k", "features", "events", "prompts", "drop", "share", "interaction"],
            rows=[
                [
                    f"{'' if len(kinds) == 1 else one['kind'] + ', '}{SETS[one['set']]}, {one['k']}",
                    *(one[name] for name in ("features", "n_events", "n_prompts", "drop", "share", "interaction")),
                ]
                for one in groups
            ],
            shows=warning
            + (
                f"The share of the interaction at boundary {boundary} that is gone without the best k features, which "
                "other prompts ranked by default, and without as many others."
            ),
            does_not_show=(
                "Features are read by the crosscoders at hand: what these leave out of an MLP's output is not tested. "
                "A share is a ratio of two means; that of single events may be far from it."
            ),
            shares=("share",),
        )


ANALYSIS = Mediate()
