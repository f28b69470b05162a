"""Dial: how the interaction changes as a few named features are turned down, off, and beyond.

At position p, while the descendant's late blocks run on either state, each MLP loses alpha f_i D_i of every feature i
of the bucket: alpha 1 removes the features, 2 overshoots as far again. The *drop* is the interaction less what it is
then. The bucket is named, feature by feature; by default it is the best 10 of the ranking. Its controls are as many
matched random features, and random directions, orthogonal to the decoder rows of the bucket, in which a row moves as
far.

In arXiv 2605.07284, ten features chosen beforehand drop the interaction by +0.039, 0.078, 0.125 and 0.180 at alpha 0.5,
1, 1.5 and 2, matched random ones by less than nothing. Its activations were the largest of each row, ours are those
above the threshold.
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
    amounts,
    drop_groups,
    drops,
    event_table,
    of_what,
    with_controls,
)
from actcache.analyses.features.ranked import Ranked
from actcache.schema import FIRST_DIVERGENCE
from actcache.study.analysis import Numbers, option
from actcache.study.section import Interval, Lines, Section

if TYPE_CHECKING:
    from actcache.study.run import Run

BUCKET = 10
"""How many features there are in the bucket where none is named."""


@dataclass(frozen=True)
class DialOptions(EditOptions):
    """Which features are turned, and how far."""

    features: str = option("", f"bucket, as 29:1034,30:77 (block:feature) (default: the best {BUCKET})")
    alpha: tuple[float, ...] = option(
        (0.5, 1.0, 1.5, 2.0), "how far features are turned down (default 0.5,1,1.5,2)", type=amounts
    )


class Dial(EditStep[DialOptions]):
    """The interaction by how far a bucket of features is turned down."""

    name = "features dial"
    options = DialOptions
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {"share": ("drop", "interaction")}

    def moved(self, ranked: Ranked, options: DialOptions) -> list[Moved]:
        """The bucket and its controls, at every alpha."""
        rows = ranked.rows_of(options.features.split(",")) if options.features else ranked.top(BUCKET)
        return [
            moved
            for alpha in sorted(options.alpha)
            for moved in with_controls(
                ranked, rows, options.seeds, ("random", "same_norm"), instead="orthogonal", amount=alpha
            )
        ]

    def of_kind(
        self, tested: Tested, moved: Sequence[Moved], ranked: Ranked, run: Run, options: DialOptions
    ) -> Numbers:
        """Drops, and their shares."""
        found = drops(tested, moved, ranked.reading)
        interaction = tested.effects["interaction"].to_numpy()
        table = event_table(tested, moved, {"interaction": [interaction] * len(moved), "drop": found})
        groups = drop_groups(tested, moved, ranked.reading, options)[1]
        return Numbers(table, [{"alpha": one.pop("amount"), **one} for one in groups])

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """The drop over alpha, of the bucket and its controls."""
        kinds = list(dict.fromkeys(one["kind"] for one in groups))
        drawn = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else kinds[0]
        names = SETS | {"top": "bucket", "same_norm": "orthogonal direction"}
        lines: dict[str, list[tuple[float, Interval]]] = {}
        for one in (one for one in groups if one["kind"] == drawn):
            lines.setdefault(names[one["set"]], []).append((one["alpha"], one["drop"]))
        return Section(
            title="A bucket of features turned down",
            figures=[Lines("alpha", "drop of the interaction, logits", lines, 1.0, "The drop by each set over alpha.")],
            columns=["set, alpha", "features", "events", "prompts", "drop", "share"],
            rows=[
                [
                    f"{'' if len(kinds) == 1 else one['kind'] + ', '}{names[one['set']]}, {one['alpha']:g}",
                    *(one[name] for name in ("features", "n_events", "n_prompts", "drop", "share")),
                ]
                for one in groups
            ],
            shows=of_what(groups, drawn)
            + (
                f"What the interaction at boundary {groups[0]['boundary']} loses as {groups[0]['features']} features "
                "are turned down: alpha 1 removes them."
            ),
            does_not_show=(
                "What the features stand for: read their texts for that (`actcache features contexts`). Beyond alpha "
                "1, states are unlike any that a checkpoint makes."
            ),
            shares=("share",),
        )


ANALYSIS = Dial()
