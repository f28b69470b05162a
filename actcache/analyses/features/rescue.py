"""Rescue: whether the base's states prefer the descendant's token once the best features are what they are natively.

On the base's state, while the descendant's late blocks run, each MLP of the ranking's blocks gains at position p

    alpha * sum over the set of (f_i there in the descendant's own forward - f_i now) D_i

The *gain* is the margin then, less Y(U_pt, L_it). What is *missing* is Y(U_it, L_it) - Y(U_pt, L_it). Two numbers say
how much of it comes back. The *share* is the mean gain over the mean that is missing. The *fraction* is the mean over
events of gain / missing, of those events alone in which more than 1e-6 is missing. The share is the sounder one.
Controls are matched random features, and random directions in which a row moves as far, all at the largest alpha.

In arXiv 2605.07284 (three families, 200 features, the prompts that ranked among those that test), the gain at alpha 1
is +0.49, 8.1% of what is missing by events; +0.56 above matched random features, +0.47 above random directions.
`--tested all` tests on all prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from actcache.analyses.features.edited import (
    SETS,
    EditOptions,
    EditStep,
    Moved,
    Tested,
    amounts,
    event_table,
    minus,
    numbered,
    over_seeds,
    size,
    with_controls,
)
from actcache.analyses.features.ranked import Ranked
from actcache.schema import FIRST_DIVERGENCE
from actcache.study.analysis import Numbers, option
from actcache.study.section import Interval, Lines, Section
from actcache.study.statistics import Floats, Sample

if TYPE_CHECKING:
    from actcache.study.run import Run

LEAST_MISSING = 1e-6
"""Where no more is missing, an event has no fraction of it."""


@dataclass(frozen=True)
class RescueOptions(EditOptions):
    """How many features are moved, and how far."""

    k: int = option(200, "size of the set; a larger one is all features (default %(default)s)", type=size)
    alpha: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 1.0), "how far features are moved (default 0,0.25,0.5,1)", type=amounts
    )


class Rescue(EditStep[RescueOptions]):
    """What the best features bring back."""

    name = "features rescue"
    options = RescueOptions
    roles = slice(0, 1)
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {"share": ("gain", "missing"), "fraction": None}

    def moved(self, ranked: Ranked, options: RescueOptions) -> list[Moved]:
        """The best k by every alpha; at the largest, their controls."""
        rows, most = ranked.top(options.k), max(options.alpha)
        less = [
            moved
            for alpha in sorted(options.alpha)[:-1]
            for moved in with_controls(ranked, rows, 0, (), amount=alpha, to_native=True)
        ]
        at_most = with_controls(ranked, rows, options.seeds, ("random", "same_norm"), amount=most, to_native=True)
        return [*less, *at_most]

    def of_kind(
        self, tested: Tested, moved: Sequence[Moved], ranked: Ranked, run: Run, options: RescueOptions
    ) -> Numbers:
        """Gains, and what they are of what is missing."""
        pt, _ = ranked.reading.pair
        gained = [-tested.lost(pt, number) for number in range(len(moved))]
        of = {name: tested.effects[name].to_numpy() for name in ("y_it_it", "y_pt_it")}
        missing: Floats = of["y_it_it"] - of["y_pt_it"]
        table = event_table(tested, moved, {"missing": [missing] * len(moved), "gain": gained})
        of_sets = {str(key): one for key, one in over_seeds(moved, gained).items()}
        how: dict[str, Any] = {"weights": options.weights, "draws": options.draws, "seed": options.seed}
        sample = Sample.of(tested.prompts, of_sets | {"missing": missing}, **how)
        kept = missing > LEAST_MISSING
        prompts = np.array(tested.prompts.to_pylist(), object)[kept].tolist()
        by_event = Sample.of(prompts, {key: one[kept] / missing[kept] for key, one in of_sets.items()}, **how)
        groups, n = [], numbered(moved)
        for (name, k, alpha), features in n.items():
            key = str((name, k, alpha))
            group: dict[str, Any] = {"set": name, "k": k, "alpha": alpha, "features": features}
            group |= {"n_events": sample.n_events, "n_prompts": sample.n_prompts}
            group |= {"gain": sample.mean(key), "missing": sample.mean("missing")}
            group |= {"share": sample.ratio(key, "missing"), "fraction": by_event.mean(key)}
            group["n_of_fraction"] = by_event.n_events
            others = {other: str((other, k, alpha)) for other in SETS if (other, k, alpha) in n}
            groups.append(group | minus(sample, key, others))
        return Numbers(table, groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """The share over alpha, of the set and its controls."""
        kinds = list(dict.fromkeys(one["kind"] for one in groups))
        drawn = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else kinds[0]
        lines: dict[str, list[tuple[float, Interval]]] = {}
        for one in (one for one in groups if one["kind"] == drawn):
            lines.setdefault(SETS[one["set"]], []).append((one["alpha"], one["share"]))
        numbers = ("gain", "missing", "share", "fraction")
        return Section(
            title="Features that bring the descendant's token back",
            figures=[Lines("alpha", "gain / missing", lines, None, "What comes back by each set.", shares=True)],
            columns=["set, alpha", "features", "events", "prompts", *numbers],
            rows=[
                [
                    f"{'' if len(kinds) == 1 else one['kind'] + ', '}{SETS[one['set']]}, {one['alpha']:g}",
                    *(one[name] for name in ("features", "n_events", "n_prompts", *numbers)),
                ]
                for one in groups
            ],
            shows=(
                f"How much of the margin that the base's states lack at boundary {groups[0]['boundary']} comes back "
                f"when {groups[0]['k']} features of the final blocks are set to what the descendant itself makes of "
                "them. The share is a ratio of means; the fraction is a mean over events in which something is missing."
            ),
            does_not_show=(
                "A fraction of an event that lacks little may be of any size, and so may the mean of them. Features "
                "are set at position p alone: what earlier positions hand over stays the base's."
            ),
            shares=("share", "fraction"),
        )


ANALYSIS = Rescue()
