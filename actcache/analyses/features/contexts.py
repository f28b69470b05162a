"""Contexts: on which texts is each feature the most active?

For each feature, the tokens of the corpus at which it is the highest, with the text around them: what a reader guesses
a meaning from. The features are those that `features rank` puts first. Where these crosscoders are not ranked, they are
those that are the most active in all. Rows are encoded by all branches, with the threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from actcache.analyses.features.before import Before
from actcache.analyses.features.crosscoder import Crosscoder
from actcache.analyses.features.step import (
    SITE,
    CorpusStep,
    crosscoder_digests,
    load_crosscoders,
    open_corpus,
    trained_blocks,
)
from actcache.errors import InputError
from actcache.files import digests_of_files, write_atomically
from actcache.progress import OnProgress, Tally, untold
from actcache.sealed import parquet_bytes, read_parquet
from actcache.store import Store
from actcache.store.feed import RowFeed
from actcache.study.analysis import option
from actcache.study.dealt import Outlay
from actcache.study.run_folder import RunFolder
from actcache.study.section import Section

if TYPE_CHECKING:
    from actcache.study.cells import Finished
    from actcache.study.run import Run

_SHOWN = 20  # features in the report
_N_BYTES = 36  # per row of a batch and feature: activations and row numbers, both sorted, and the order
_TABLE = pa.schema(
    {
        "block": pa.int32(),
        "feature": pa.int64(),
        "rank": pa.int32(),
        "prompt_id": pa.string(),
        "position": pa.int64(),
        "token": pa.string(),
        "text": pa.string(),
        "value": pa.float32(),
    }
)


@dataclass(frozen=True)
class ContextsOptions:
    """How many features, and how much of each."""

    corpus: str = option("", "store of the corpus (default: RUN/corpus)")
    rows: str = option("all", "texts to look at: all, train or held_out (default %(default)s)")
    features: int = option(200, "features to show, over all blocks (default %(default)s)", type=int)
    top: int = option(10, "contexts of each feature (default %(default)s)", type=int)
    before: int = option(16, "tokens of text before the token (default %(default)s)", type=int)
    after: int = option(4, "tokens of text after the token (default %(default)s)", type=int)
    batch: int = option(2048, "rows of a batch (default %(default)s)", type=int)


class Contexts(CorpusStep[ContextsOptions]):
    """The contexts of the features that matter most."""

    name = "features contexts"
    options = ContextsOptions
    needs_less = "a smaller --batch needs less"

    def beside(self, folder: RunFolder, options: Mapping[str, Any]) -> dict[str, str]:
        """As of every step that reads a corpus, and the ranking, whose order the features have; "" for none yet."""
        ranking = {"ranking": ""} | digests_of_files({"ranking": str(_ranking(folder))})
        return super().beside(folder, options) | ranking

    def check(self, store: Store, options: ContextsOptions) -> None:
        """Counts, and which rows."""
        for name in ("features", "top", "batch"):
            if getattr(options, name) < 1:
                raise InputError(f"{name} is {getattr(options, name)}: give 1 or more")
        if min(options.before, options.after) < 0:
            raise InputError("before and after count tokens: give 0 or more")
        if options.rows not in ("all", "train", "held_out"):
            raise InputError(f"rows is {options.rows!r}, expected all, train or held_out")

    def answer(
        self,
        run: Run,
        options: ContextsOptions,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """See :meth:`Analysis.answer`."""
        folder, store = run.folder, run.folder.open_store()
        self.check(store, options)
        corpus = open_corpus(folder, options.corpus, store)
        made_from = self.made_with(folder, store, self.beside(folder, asdict(options)))
        blocks = trained_blocks(folder)
        device = run.placement.devices[0]
        tally = Tally(len(blocks), "crosscoders", on_progress)
        found = {}
        for block in blocks:
            found[block] = highest(load_crosscoders(folder, [block], device)[block], corpus, options)
            tally.add(1, doing=f"block {block}")
        chosen, order = _chosen(folder, found, options.features)
        rows = [row for block, feature in chosen for row in _rows(block, feature, found[block], corpus, run, options)]
        table = pa.Table.from_pylist(rows, _TABLE)
        write_atomically(self.table_path(folder), parquet_bytes(table, made_from))
        groups = []
        for number, (block, feature) in enumerate(chosen, 1):
            own = [row for row in rows if (row["block"], row["feature"]) == (block, feature)]
            if own:
                texts = [row["text"] for row in own[:3]]
                group = {"block": block, "feature": feature, "order": number, "ordered_by": order, "texts": texts}
                groups.append(group | {"active_rate": found[block].active_rate[feature], "highest": own[0]["value"]})
        return self.write(folder, options, groups, made_from)

    def planned(self, before: Before, folder: RunFolder, finished: Finished) -> Outlay:
        """All rows, encoded, and sorted by each feature."""
        return before.passes(before.n_rows, 1, self.options().batch, n_bytes=_N_BYTES)

    def lines(self, found: Mapping[str, Any], store: Store | None = None) -> list[str]:
        """The first features, each with some contexts below it."""
        lines = []
        for group in found["groups"][:_SHOWN]:
            on = f"on at {group['active_rate']:.1%} of rows, at most {group['highest']:.3g}"
            lines.append(f"block {group['block']}, feature {group['feature']}: {on}")
            lines += [f"    {_on_one_line(text)}" for text in group["texts"]]
        return lines or ["no feature is on"]

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """The first features with some contexts."""
        order = groups[0]["ordered_by"]
        return Section(
            title="What features are on for",
            figures=[],
            columns=["block, feature", "on, share of rows", "highest", "the contexts where it is the highest"],
            rows=[
                [
                    f"{group['block']}, {group['feature']}",
                    {"mean": group["active_rate"], "low": None, "high": None},
                    group["highest"],
                    " | ".join(map(_on_one_line, group["texts"])),
                ]
                for group in groups[:_SHOWN]
            ],
            shows=(
                f"The first {min(_SHOWN, len(groups))} of {len(groups)} features, by {order}. The token at which a "
                "feature is the highest stands in brackets. RUN/features/contexts.parquet has all of them."
            ),
            does_not_show=(
                "What a feature is the highest on need not be what it does most often. No judge has read these texts: "
                "a meaning is the reader's guess."
            ),
            shares=("on, share of rows",),
        )


@dataclass(frozen=True)
class Highest:
    """Of one crosscoder, where each feature is the highest.

    Attributes:
        values: ``[F, top]`` float32, highest first; 0 where it is not on so often.
        rows: ``[F, top]`` int64, the corpus' rows.
        mass: ``[F]``, activations times decoder norms, summed.
        active_rate: ``[F]``, share of rows on which it is on.
        feed: which numbered the rows.
    """

    values: torch.Tensor
    rows: torch.Tensor
    mass: list[float]
    active_rate: list[float]
    feed: RowFeed


@torch.no_grad()
def highest(crosscoder: Crosscoder, corpus: Store, options: ContextsOptions) -> Highest:
    """Look through all rows; of equal activations, the first in the corpus come first."""
    feed = RowFeed(
        corpus,
        labels=crosscoder.labels,
        boundaries=[crosscoder.block],
        site=SITE,
        positions=options.rows,
        batch_rows=options.batch,
        shuffle=False,
    )
    n, device = crosscoder.n_features, crosscoder.encoder.device
    values = torch.zeros(n, options.top, device=device)
    rows = torch.zeros(n, options.top, dtype=torch.int64, device=device)
    mass, n_on = (torch.zeros(n, dtype=torch.float64, device=device) for _ in range(2))
    for batch in feed:
        found = crosscoder.encode(batch.states[:, :, 0].to(device)).T
        mass += (found.sum(dim=1) * crosscoder.scale).double()
        n_on += (found > 0).sum(dim=1)
        candidates = torch.cat([values, found], dim=1)
        numbers = torch.cat([rows, batch.rows.to(device).expand(n, -1)], dim=1)
        # A stable sort, where topk may take any of equal ones.
        values, at = candidates.sort(dim=1, descending=True, stable=True)
        values, rows = values[:, : options.top], numbers.gather(1, at[:, : options.top])
    rates = (n_on / feed.chosen.n_rows).tolist()
    return Highest(values.cpu(), rows.cpu(), mass.tolist(), rates, feed)


def _on_one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def _ranking(folder: RunFolder) -> Path:
    return folder.features / "ranking.parquet"


def _chosen(folder: RunFolder, found: Mapping[int, Highest], n: int) -> tuple[list[tuple[int, int]], str]:
    """Blocks and features, the first ones first; and what they are ordered by, in words."""
    if (path := _ranking(folder)).is_file():
        again = f"'actcache features rank {folder.path}' makes it again"
        ranking = read_parquet(path, "a ranking of features", again, columns=["block", "feature", "rank"])
        if ranking.made_from.get("crosscoders") == crosscoder_digests(folder):  # else features are others by now
            first = ranking.content.sort_by("rank").slice(0, n).to_pylist()
            return [(row["block"], row["feature"]) for row in first], "causal rank"
    every = [(-mass, block, feature) for block, of in found.items() for feature, mass in enumerate(of.mass) if mass]
    return [(block, feature) for _, block, feature in sorted(every)[:n]], "activation in all"


def _rows(
    block: int, feature: int, found: Highest, corpus: Store, run: Run, options: ContextsOptions
) -> list[dict[str, Any]]:
    """The contexts of one feature."""
    on = found.values[feature] > 0
    values, numbers = found.values[feature][on].tolist(), found.rows[feature][on]
    if not values:
        return []
    places = found.feed.locate(numbers)
    texts = corpus.sequences["prompt_id"]
    firsts = np.cumsum([0, *(segment.n_sequences for segment in corpus.segments)]).tolist()
    rows = []
    for rank, (value, *place) in enumerate(zip(values, *(one.tolist() for one in places), strict=True), 1):
        segment, sequence, position, token = place
        of = corpus.segments[segment]
        start, stop = of.row_offsets[sequence : sequence + 2].tolist()
        at = start + position
        first, last = max(start, at - options.before), min(stop, at + 1 + options.after)
        ids = of.read("token_ids", first, last).astype(np.int64).tolist()
        before, after = run.lineup.decode(ids[: at - first]), run.lineup.decode(ids[at - first + 1 :])
        shown = run.lineup.decode([token])
        rows.append(
            {
                "block": block,
                "feature": feature,
                "rank": rank,
                "prompt_id": texts[firsts[segment] + sequence].as_py(),
                "position": position,
                "token": shown,
                "text": f"{before}[{shown}]{after}",
                "value": value,
            }
        )
    return rows


ANALYSIS = Contexts()
