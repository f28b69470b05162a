"""Commitment: whether the state at the boundary has decided for y_it before the late blocks read it.

The *boundary margin* b_U is what the common readout makes of U's state at p where it enters the boundary: its margin,
as if there were no late blocks. Where b_IT > 0 IT's state is *committed*: it already reads as y_it. If commitment made
the interaction, the interaction would vanish on other events, and with the difference b_IT - b_PT. Four views:

- *uncommitted* events, with b_IT <= 0, and the others;
- *thirds* of the events, by b_IT and by b_IT - b_PT, cut at the percentiles 33.333 and 66.667 of each kind and pair;
- *states*: a regression of the late effect (A of PT's state, B of IT's) on the state's boundary margin and on whether
  the state is IT's. Its interaction is the coefficient of the last: how much more IT's late stack adds to IT's state
  than to one of PT's that reads the same. Once on all states, once on those whose margin lies where both checkpoints
  have margins (`overlap`): from the larger of the two minima to the smaller of the two maxima;
- *pairs*: a regression of an event's interaction on b_IT - b_PT. Its interaction is the intercept: what is left where
  both states read the same.

Nothing is replayed but plain cells that are missing: the states at p are in the store, and only a head reads them. In
arXiv 2605.07284 the sign of all of these stays positive, by a lens of another boundary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.analyses.grid import GridSettings, check_settings, jobs_left, one_boundary, pairs_of
from actcache.errors import InputError
from actcache.replay.edits import PLAIN
from actcache.schema import FIRST_DIVERGENCE, NATIVE, ROLES, common_readout
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, option
from actcache.study.cells import Finished
from actcache.study.contrasts import contrasts
from actcache.study.regression import regress
from actcache.study.replay_job import ReplayJob
from actcache.study.scores import whose_head
from actcache.study.section import Bars, Interval, Section
from actcache.study.statistics import DRAWS, SEED, Floats, Sample, check_draws, check_weights

if TYPE_CHECKING:
    from actcache.study.run import Run

_CONTRASTS = ("late_from_pt", "late_from_it", "interaction")
_MARGINS = ("boundary_margin_pt", "boundary_margin_it")
_THIRDS = ("lowest", "middle", "highest")
_TEXTS = {
    "states": "states of equal margin",
    "states, overlap": "states of equal margin, overlap",
    "pairs": "pairs of equal margins",
}


@dataclass(frozen=True)
class CommitmentOptions:
    """Which states are read, and by which readout."""

    boundary: str = option("", "boundary of states and cells: 18, a fraction, -3 (of L) (default: the main one)")
    scope: str = option("prefix", "scope of the cells: prefix or position (default %(default)s)")
    readout: str = option("common_it", "common readout of states and cells: common_LABEL (default %(default)s)")
    weights: str = option("prompt", "what weighs the same in a mean: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


class Commitment(CellAnalysis[CommitmentOptions]):
    """The interaction by what the boundary states read as."""

    name = "commitment"
    options = CommitmentOptions

    def check(self, store: Store, options: CommitmentOptions) -> None:
        """Boundary, scope, readout and weights."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        if options.readout == NATIVE:
            raise InputError(
                "readout native would read the states of each checkpoint by its own head; choose a common one, as "
                f"{common_readout(store.fingerprint.pair[-1])}"
            )
        check_settings(store, _settings(store, options, pairs_of(store)))

    def jobs(
        self, store: Store, finished: Finished, options: CommitmentOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells, by the readouts of all pairs."""
        settings = _settings(store, options, pairs_of(store))
        return jobs_left(store, finished, replace(settings, **exactness))

    def numbers(self, cells: pa.Table, run: Run, options: CommitmentOptions) -> Numbers:
        """One row per event: its contrasts and boundary margins; groups for each kind, pair and view."""
        store = run.store
        cells = cells.filter(pc.equal(cells["variant"], PLAIN.name))
        tables = []
        for pair in pairs_of(store):
            settings = _settings(store, options, [pair])
            (boundary,), (readout,) = settings.boundaries, settings.readouts
            kept = pc.equal(cells["pair"], ",".join(pair))
            for name, value in (("boundary", boundary), ("scope", options.scope), ("readout", readout)):
                kept = pc.and_(kept, pc.equal(cells[name], value))
            table = contrasts(cells.filter(kept)).drop_columns(["variant"])
            for name, margins in zip(_MARGINS, boundary_margins(run, table, pair, boundary, readout), strict=True):
                table = table.append_column(name, pa.array(margins))
            tables.append(table)
        table = pa.concat_tables(tables)
        groups = []
        for kind, pair_name in sorted(set(zip(table["kind"].to_pylist(), table["pair"].to_pylist(), strict=True))):
            of = table.filter(pc.and_(pc.equal(table["kind"], kind), pc.equal(table["pair"], pair_name)))
            group = {name: of[name][0].as_py() for name in ("kind", "pair", "boundary", "scope", "readout")}
            groups += [group | one for one in _groups(of, options)]
        return Numbers(table, groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """The interaction in every view, and the margins of the states."""
        several = [name for name in ("kind", "pair") if len({one[name] for one in groups}) > 1]

        def of_whom(group: Mapping[str, Any]) -> str:
            return ", ".join(group[name] for name in several)

        kinds = sorted(one["kind"] for one in groups)
        drawn = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else kinds[0]  # others are in the table
        bars: dict[str, list[tuple[str, Interval]]] = {}
        for one in (one for one in groups if one["kind"] == drawn):
            bars.setdefault(of_whom(one), []).append((_TEXTS.get(one["view"], one["view"]), one["interaction"]))
        whole = [one for one in groups if one["view"] == "all" and one["kind"] == drawn]
        has_one_pair = len({one["pair"] for one in groups}) == 1
        said = "; ".join(
            f"{one['committed_share_it']['mean']:.0%} of {one['n_events']} events"
            + ("" if has_one_pair else f" of {one['pair']}")
            for one in whole
        )
        return Section(
            title="Commitment at the boundary",
            figures=[Bars("interaction B - A, logits", bars, 0.0, "The interaction in each view of commitment.")],
            columns=["view", "events", "prompts", "A", "B", "interaction", "margin of PT", "margin of IT", "committed"],
            rows=[
                [
                    ": ".join(part for part in (of_whom(one), _TEXTS.get(one["view"], one["view"])) if part),
                    one["n_events"],
                    one["n_prompts"],
                    *(one.get(name, "") for name in (*_CONTRASTS, *_MARGINS, "committed_share_it")),
                ]
                for one in groups
            ],
            shows=(
                f"IT's state at the boundary reads as y_it already in {said}. An interaction on uncommitted events, or "
                "where both states read the same, is more than a decision made before the boundary."
            ),
            does_not_show=(
                "The readout was made for the last block's output: what it makes of an earlier state may be less than "
                "that state holds. The regressions are linear, and the margins that they hold equal were not set."
            ),
            shares=("committed",),
        )


def boundary_margins(
    run: Run, events: pa.Table, pair: Sequence[str], boundary: int, readout: str
) -> tuple[Floats, Floats]:
    """What a common readout makes of the two checkpoints' states at p, ``[E]`` each, of a table with ``event_id``."""
    if not events.num_rows:
        return np.empty(0), np.empty(0)
    store, head = run.store, run.load_readout(whose_head(readout, ""))
    at = pc.index_in(events["event_id"], value_set=store.events["event_id"].combine_chunks()).to_pylist()
    tokens = store.events.take(at)
    pair_ids = torch.tensor([tokens[f"y_{role}"].to_pylist() for role in ROLES]).T
    margins = []
    for label in pair:
        rows, _ = store.states(label, boundary, at, positions="event")
        logits = head.scores(rows, pair_ids).double()
        margins.append((logits[:, 1] - logits[:, 0]).numpy())
    return margins[0], margins[1]


def _groups(table: pa.Table, options: CommitmentOptions) -> Iterator[dict[str, Any]]:
    """The views of one kind and pair, of a table of its events."""
    how: dict[str, Any] = {"weights": options.weights, "draws": options.draws, "seed": options.seed}
    prompts = np.array(table["prompt_id"].to_pylist(), object)
    values = {name: table[name].to_numpy() for name in (*_CONTRASTS, *_MARGINS)}
    b_pt, b_it = (values[name] for name in _MARGINS)
    views = {"all": np.ones(len(b_it), bool), "uncommitted": b_it <= 0, "committed": b_it > 0}
    views |= {f"{third} third of b_IT": kept for third, kept in thirds(b_it).items()}
    views |= {f"{third} third of b_IT - b_PT": kept for third, kept in thirds(b_it - b_pt).items()}
    committed = {
        f"committed_share_{role}": (of > 0).astype(float) for role, of in zip(ROLES, (b_pt, b_it), strict=True)
    }
    for view, kept in views.items():
        if kept.any():
            of = {name: one[kept] for name, one in (values | committed).items()}
            sample = Sample.of(prompts[kept].tolist(), of, **how)
            yield {"view": view, **_counted(prompts[kept]), **{name: sample.mean(name) for name in of}}
    margins, effects = np.concatenate([b_pt, b_it]), np.concatenate([values[name] for name in _CONTRASTS[:2]])
    is_it, twice = np.repeat([0.0, 1.0], len(b_it)), np.concatenate([prompts, prompts])
    low, high = max(b_pt.min(), b_it.min()), min(b_pt.max(), b_it.max())
    overlap = (low <= margins) & (margins <= high)
    for view, kept in {"states": np.ones(len(margins), bool), "states, overlap": overlap}.items():
        if kept.any():
            controls = {"boundary_margin": margins[kept], "upstream_it": is_it[kept]}
            found = regress(twice[kept].tolist(), effects[kept], controls, **how)
            events = np.flatnonzero(kept[: len(b_it)] | kept[len(b_it) :])
            numbers = {"interaction": found["upstream_it"], "per_logit": found["boundary_margin"]}
            yield {"view": view, **_counted(prompts[events]), "n_states": int(kept.sum()), **numbers}
    found = regress(prompts.tolist(), values["interaction"], {"difference": b_it - b_pt}, **how)
    numbers = {"interaction": found["intercept"], "per_logit": found["difference"]}
    yield {"view": "pairs", **_counted(prompts), **numbers}


def thirds(values: Floats) -> dict[str, Any]:
    """Which events ``[E]`` are in the lowest, the middle and the highest third; a border is of the lower one."""
    first, second = np.percentile(values, [100 / 3, 200 / 3])
    kept = values <= first, (first < values) & (values <= second), second < values
    return dict(zip(_THIRDS, kept, strict=True))


def _counted(prompts: Any) -> dict[str, int]:
    return {"n_events": len(prompts), "n_prompts": len(set(prompts.tolist()))}


def _settings(store: Store, options: CommitmentOptions, pairs: Sequence[tuple[str, str]]) -> GridSettings:
    """The plain cells, by the readout of each of these pairs."""
    boundary = one_boundary(store, options.boundary)
    return GridSettings((boundary,), (options.scope,), (options.readout,)).of_pair(store.checkpoints, pairs)


ANALYSIS = Commitment()
