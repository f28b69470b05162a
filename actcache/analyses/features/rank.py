"""Rank: which features of the final blocks' MLPs make the descendant prefer its own token on its own states.

The *attribution* of feature i in a cell is f_i <D_i, dY/dm>: its activation, times what the margin Y gains for each
unit of the feature's decoder row that is added to the MLP's output m at position p. To first order, that is what the
margin loses where the feature is removed. Its *score* is the mean over events of

    attribution in (U_it, L_it) - attribution in (U_pt, L_it)

with the descendant's late blocks and readout in both cells: what the feature adds to the interaction. All blocks with a
crosscoder are ranked together. One backward from each margin serves them all.

Only some prompts rank. The others test, in the steps that follow, unless these say otherwise.

Activations are those of the descendant's branch alone with the joint threshold, as arXiv 2605.07284 has them: fewer
and lower than in training. The joint encoding needs the base's MLP output beside it. On a state of U that is what the
base's late blocks give there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from actcache.analyses.features.before import Before
from actcache.analyses.features.cell_step import CellStep
from actcache.analyses.features.crosscoder import Crosscoder
from actcache.analyses.features.ranked import (
    Ranked,
    Reading,
    only,
    ranking_prompts,
    reading_of,
)
from actcache.analyses.features.step import described_crosscoders, load_crosscoders
from actcache.errors import InputError
from actcache.replay.gradients import Gradients
from actcache.schema import FIRST_DIVERGENCE
from actcache.sealed import read_parquet
from actcache.store import Store
from actcache.study.analysis import Numbers, option
from actcache.study.cells import Finished, finished_cells
from actcache.study.engine import LateJob
from actcache.study.gradient_job import GradientsOf
from actcache.study.run_folder import RunFolder
from actcache.study.section import Bars, Section
from actcache.study.statistics import DRAWS, SEED, Floats, Sample, check_draws

if TYPE_CHECKING:
    from actcache.study.run import Run

SHOWN = 10
"""How many of the best features have an interval of their own."""
_AT_ONCE = 64  # events whose activations are in memory


@dataclass(frozen=True)
class RankOptions:
    """Which events rank, and how their rows are read."""

    pair: str = option("", "pair of checkpoints, base and descendant, as pt,it (default: the first of the run)")
    boundary: str = option(
        "", "boundary of the cells: 18, a fraction, -3 (of L) (default: the last one before all crosscoders)"
    )
    ranking: str = option(
        "0.25",
        "prompts that rank: a share of them, by a hash of their ids, or a number, the first so many (160 as "
        "published) (default %(default)s)",
    )
    encoding: str = option(
        "branch",
        "how activations are read: branch (the descendant's alone, with the joint threshold) or joint (default "
        "%(default)s)",
    )
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


class Rank(CellStep[RankOptions]):
    """Features by what they add to the interaction, to first order."""

    name = "features rank"
    options = RankOptions

    def check(self, store: Store, options: RankOptions) -> None:
        """Draws, and which prompts rank."""
        check_draws(options.draws, options.seed)
        ranking_prompts([], options.ranking)
        if not store.fingerprint.has_prefix_rows:
            raise InputError("the store keeps rows of event positions only; features need prefix rows: capture again")

    def table_path(self, folder: RunFolder) -> Path:
        """Where the ranking lies."""
        return folder.features / "ranking.parquet"

    def asked(
        self, folder: RunFolder, store: Store, finished: Finished, options: RankOptions
    ) -> dict[Path, Sequence[LateJob]]:
        """The gradients of all events, in the cells that are read."""
        return _work(folder, store, crosscoder_blocks(folder), options)

    def planned(self, before: Before, folder: RunFolder, finished: Finished) -> Mapping[Path, Sequence[LateJob]]:
        """The same, of the blocks that will have a crosscoder."""
        return _work(folder, before.store, before.blocks, self.options())

    def numbers(self, cells: pa.Table, run: Run, options: RankOptions) -> Numbers:
        """One row per feature, best first; a group for each of the best."""
        store, folder = run.store, run.folder
        blocks = crosscoder_blocks(folder)
        reading = _reading(store, blocks, options)
        rows, prompts = _ranking_events(store, reading, options.ranking)
        found = read_gradients(folder, store, reading, blocks)
        tables: list[dict[str, Any]] = []
        shown: dict[tuple[int, int], Floats] = {}
        for number, block in enumerate(blocks):
            crosscoder = _checked(load_crosscoders(folder, [block])[block], reading)
            table = _attributed(crosscoder, reading, found, number, rows)
            best = np.lexsort((table["feature"], -table["score"]))[:SHOWN]
            of_best = gates(only(crosscoder, best), reading, found, number, rows)
            shown |= {(block, feature): of_best[:, at] for at, feature in enumerate(best.tolist())}
            tables.append(table)
        columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        order = np.lexsort((columns["feature"], columns["block"], -columns["score"]))
        columns = {name: column[order] for name, column in columns.items()}
        ranking = pa.table(columns | {"rank": np.arange(1, len(order) + 1)})
        groups = []
        for row in ranking.slice(0, SHOWN if rows else 0).to_pylist():
            values = {"score": shown[row["block"], row["feature"]]}
            sample = Sample.of([prompts[at] for at in rows], values, draws=options.draws, seed=options.seed)
            groups.append(
                {
                    **{"pair": ",".join(reading.pair), "boundary": reading.boundary, "readout": reading.readout},
                    **{"encoding": reading.encoding, "feature": f"{row['block']}:{row['feature']}"},
                    **{"n_events": sample.n_events, "n_prompts": sample.n_prompts, "score": sample.mean("score")},
                    **{name: row[name] for name in ("active_rate", "mean_abs_attribution")},
                }
            )
        return Numbers(ranking, groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """The best features."""
        first = groups[0]
        bars = [(one["feature"], one["score"]) for one in groups]
        said = f"{len(groups)} best features of the pair {first['pair']}, at boundary {first['boundary']}."
        return Section(
            title="Features ranked by attribution",
            figures=[Bars("score, logits", {"": bars}, 0.0, said)],
            columns=["feature (block:number)", "events", "prompts", "score", "active rate", "mean |attribution|"],
            rows=[
                [
                    *(one[name] for name in ("feature", "n_events", "n_prompts", "score")),
                    *(float(one[name]) for name in ("active_rate", "mean_abs_attribution")),
                ]
                for one in groups
            ],
            shows=(
                "These features add most to the interaction, to first order, on the prompts that rank. The encoding is "
                f"{'the descendant alone, by the joint threshold' if first['encoding'] == 'branch' else 'joint'}."
            ),
            does_not_show=(
                "The best of many are best partly by chance: their scores here are larger than on other prompts. "
                "What an attribution says of removing a feature holds for small changes only."
            ),
        )


def crosscoder_blocks(folder: RunFolder) -> list[int]:
    """The blocks that have a crosscoder, ascending.

    Raises:
        InputError: there is none.
    """
    blocks = list(described_crosscoders(folder))
    if not blocks:
        raise InputError(f"{folder.path} has no crosscoder: 'actcache features train {folder.path}' trains them")
    return blocks


def _work(
    folder: RunFolder, store: Store, blocks: Sequence[int], options: RankOptions
) -> dict[Path, Sequence[LateJob]]:
    """What is not finished of the gradients, by the folder of their results."""
    place, reading = gradients_place(folder), _reading(store, blocks, options)
    done = finished_cells(place, store)
    return {place: [job for of in _gradients(reading, blocks).values() for job in of.jobs(store, done)]}


def _reading(store: Store, blocks: Sequence[int], options: RankOptions) -> Reading:
    return reading_of(store, blocks, options.pair, options.boundary, options.encoding)


def _ranking_events(store: Store, reading: Reading, rule: str) -> tuple[list[int], list[str]]:
    """Numbers of the events that rank, and the prompts of all: first divergences, where the pair has any."""
    pairs, kinds, prompts = (store.events[name].to_pylist() for name in ("pair", "kind", "prompt_id"))
    own = [number for number, pair in enumerate(pairs) if pair == ",".join(reading.pair)]
    chosen = ranking_prompts([prompts[number] for number in own], rule)
    kept = [number for number in own if kinds[number] == FIRST_DIVERGENCE] or own
    return [number for number in kept if prompts[number] in chosen], prompts


def _checked(crosscoder: Crosscoder, reading: Reading) -> Crosscoder:
    """One whose branches are what the reading needs (InputError: they are not)."""
    for label in reading.pair if reading.encoding == "joint" else reading.pair[1:]:
        crosscoder.branch(label)
    if reading.encoding == "joint" and set(crosscoder.labels) != set(reading.pair):
        raise InputError(
            f"the crosscoder of block {crosscoder.block} has branches {', '.join(crosscoder.labels)}: a joint encoding "
            "of a pair needs one of these two"
        )
    return crosscoder


# ---- rows and gradients at the MLPs ----


def gradients_place(folder: RunFolder) -> Path:
    """Where the rows and gradients of all events lie."""
    return folder.features / "gradients"


def _gradients(reading: Reading, blocks: Sequence[int]) -> dict[str, GradientsOf]:
    """By label of the late stack, what is needed of it."""
    lates = reading.pair[1:] if reading.encoding == "branch" else reading.pair
    return {late: GradientsOf(reading.boundary, late, reading.pair, blocks, reading.readout) for late in lates}


def read_gradients(
    folder: RunFolder, store: Store, reading: Reading, blocks: Sequence[int]
) -> dict[tuple[str, str], Gradients]:
    """Of all events, by upstream and late stack (errors as :meth:`GradientsOf.read`)."""
    return {
        (upstream, late): found
        for late, of in _gradients(reading, blocks).items()
        for upstream, found in of.read(gradients_place(folder), store).items()
    }


def attributions(
    crosscoder: Crosscoder,
    reading: Reading,
    found: Mapping[tuple[str, str], Gradients],
    number: int,
    upstream: str,
    rows: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations and attributions, ``[n, F]`` each, of some events in the cell of an upstream.

    Args:
        crosscoder: of the block.
        reading: how rows are read.
        found: of :func:`read_gradients`.
        number: of the block, among those with a crosscoder.
        upstream: label.
        rows: numbers of the events.
    """
    pt, it = reading.pair
    at = torch.tensor(rows, dtype=torch.int64)
    cell, beside = found[upstream, it], found.get((upstream, pt))
    other = None if beside is None else beside.outputs[at, number]
    active = reading.activations(crosscoder, cell.outputs[at, number], other)
    return active, active * (cell.gradients[at, number].float() @ crosscoder.decoder_of(it).T)


def gates(
    crosscoder: Crosscoder,
    reading: Reading,
    found: Mapping[tuple[str, str], Gradients],
    number: int,
    rows: Sequence[int],
) -> Floats:
    """``[n, F]``: attribution on the descendant's states less that on the base's (arguments as
    :func:`attributions`)."""
    pt, it = (attributions(crosscoder, reading, found, number, upstream, rows)[1] for upstream in reading.pair)
    difference: Floats = (it.double() - pt.double()).numpy()
    return difference


def _attributed(
    crosscoder: Crosscoder,
    reading: Reading,
    found: Mapping[tuple[str, str], Gradients],
    number: int,
    rows: Sequence[int],
) -> dict[str, Any]:
    """Columns of the ranking, of one block; means are over the events and both cells."""
    n = crosscoder.n_features
    score, on, size, active_sum = (torch.zeros(n, dtype=torch.float64) for _ in range(4))
    for start in range(0, len(rows), _AT_ONCE):
        for upstream, sign in zip(reading.pair, (-1, 1), strict=True):
            some = rows[start : start + _AT_ONCE]
            active, attributed = attributions(crosscoder, reading, found, number, upstream, some)
            score += sign * attributed.double().sum(dim=0)
            on += (active > 0).sum(dim=0)
            size += attributed.double().abs().sum(dim=0)
            active_sum += active.double().sum(dim=0)
    n_events = max(1, len(rows))
    return {
        "block": np.full(n, crosscoder.block, np.int32),
        "feature": np.arange(n, dtype=np.int32),
        "score": (score / n_events).numpy(),
        "active_rate": (on / (2 * n_events)).numpy(),
        "mean_abs_attribution": (size / (2 * n_events)).numpy(),
        "mean_activation": (active_sum / (2 * n_events)).numpy(),
    }


def ranking_seal(folder: RunFolder) -> str | None:
    """What a ranking is told by; None where there is none."""
    try:
        return read_parquet(
            ANALYSIS.table_path(folder), "a ranking", f"'actcache {ANALYSIS.name} RUN' makes it", []
        ).seal
    except FileNotFoundError:
        return None


def read_ranked(folder: RunFolder, store: Store) -> Ranked:
    """The ranking of a run, which is of the crosscoders and events that are there now.

    Raises:
        InputError: there is none, or it is of others.
        CorruptFileError, NoSealError: a file of it is damaged.
    """
    content = ANALYSIS.read(folder, store)
    again = f"'actcache {ANALYSIS.name} {folder.path}'"
    if content is None:
        raise InputError(
            f"{folder.path} has no ranking of the features that its crosscoders have now: {again} makes it"
        )
    options = ANALYSIS.options_of(content["options"])
    blocks = crosscoder_blocks(folder)
    table = read_parquet(ANALYSIS.table_path(folder), "a ranking", f"{again} makes it again")
    reading = _reading(store, blocks, options)
    of_pair = [
        prompt
        for prompt, pair in zip(store.events["prompt_id"].to_pylist(), store.events["pair"].to_pylist(), strict=True)
        if pair == ",".join(reading.pair)
    ]
    return Ranked(reading, ranking_prompts(of_pair, options.ranking), table.content, table.seal)


ANALYSIS = Rank()
