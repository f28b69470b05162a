"""Controls: whether the interaction could come of states that neither checkpoint makes.

The off-diagonal cells of the 2x2 read states that their late stack never made. Three controls ask what that does, all
by the *late advantage* of a state u: LA(u) = Y(u, IT) - Y(u, PT). That of PT's state is A, that of IT's is B.

- *Interpolation*: u = (1 - weight) u_PT + weight u_IT at every position, for weights 0, 0.25, 0.5, 0.75 and 1, behind
  both late stacks. The *slope* is that of an event's regression of LA on the five weights. `rising_share` are events
  whose slope is positive, `monotone_share` those whose LA never falls, `spearman` is the rank correlation of LA and
  weight (0 where LA is the same at all weights), and the *endpoint* is LA(1) - LA(0), the interaction.
- *Random displacement*: u = u_PT + S (u_IT - u_PT), where S permutes coordinates and flips signs at random, one S per
  seed and prompt for all positions; and a random direction as long as the difference at each position (`matched_norm`).
  The *displacement* is LA(u) - A. `absolute_displacement` averages its absolute value, per event over the seeds. Both
  are put over the absolute value of the mean interaction. The ratio with absolute values on top is an upper reading:
  noise alone makes it positive.
- *Anomaly*: how far final states of an off-diagonal cell are from those that its late checkpoint makes of its own
  states. Four sizes are compared: root mean square and standard deviation, over the sequence and at p. Each is a
  distance |z| from the mean of the native cells, in their standard deviations. The anomaly of a cell is the largest of
  its four, that of an event the larger of its two cells. The interaction is taken again on events of low anomaly.

A *placebo*, an edit that adds zeros everywhere, must displace nothing at all: anything but 0 is an error. The rows that
a run keeps by default, of all positions at the boundary, are all that this needs. What it replays lies in
`RUN/controls/`, and is no cell of the run; `controls.parquet` has the cells, with the sizes of the plain ones.

In arXiv 2605.07284 (four families), the endpoint is +1.79, the slope +1.83, and the ratio with absolute values 0.31.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.analyses.grid import GridSettings, check_settings, jobs_left, one_boundary, pairs_of
from actcache.errors import CheckError, InputError
from actcache.replay.edits import (
    PLAIN,
    Add,
    Edit,
    Interpolate,
    MatchedNorm,
    Operation,
    SignedPermutation,
    Variant,
)
from actcache.replay.sizes import SIZES
from actcache.schema import FIRST_DIVERGENCE
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, exactness_of, option
from actcache.study.cells import Finished, finished_cells, gather_cells
from actcache.study.contrasts import contrasts
from actcache.study.engine import LateJob
from actcache.study.replay_job import ReplayJob
from actcache.study.run_folder import RunFolder
from actcache.study.section import Bars, Interval, Lines, Section
from actcache.study.size_job import read_sizes, size_jobs
from actcache.study.statistics import DRAWS, SEED, Floats, Number, Sample, check_draws, check_weights

if TYPE_CHECKING:
    from actcache.study.run import Run

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
RANDOM = ("signed_permutation", "matched_norm")
PLACEBO = "placebo"
STRATA = ("all", "lower half", "lower tertile", "without top 10%", *(f"quartile {number}" for number in (1, 2, 3, 4)))


@dataclass(frozen=True)
class ControlsOptions:
    """What to control, and how."""

    boundary: str = option("", "boundary of the cells: 18, a fraction, or -3 (of L) (default: the main one)")
    readout: str = option(
        "common_it",
        "readout of the cells: native, common_LABEL, or common_pt and common_it of the pair (default common_it)",
    )
    seeds: int = option(3, "random displacements of each kind, with seeds 0, 1, ... (default %(default)s)", type=int)
    weights: str = option("prompt", "what weighs the same in a mean: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


class Controls(CellAnalysis[ControlsOptions]):
    """Interpolated, randomly displaced and anomalous states."""

    name = "controls"
    options = ControlsOptions

    def check(self, store: Store, options: ControlsOptions) -> None:
        """Boundary, readout, seeds and weights."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        if not 1 <= options.seeds < 1000:
            raise InputError(f"seeds is {options.seeds}; expected 1 to 999 random displacements of each kind")
        for pair in pairs_of(store):
            check_settings(store, _settings(store, options, pair))

    def jobs(
        self, store: Store, finished: Finished, options: ControlsOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells, by the readouts of all pairs."""
        plain = GridSettings((one_boundary(store, options.boundary),), readouts=(options.readout,))
        plain = plain.of_pair(store.checkpoints, pairs_of(store))
        return jobs_left(store, finished, replace(plain, **exactness))

    def own_jobs(
        self, folder: RunFolder, store: Store, options: ControlsOptions, exactness: Mapping[str, Any]
    ) -> Mapping[Path, Sequence[LateJob]]:
        """Of every pair, variants of PT's states behind both late stacks, and the sizes of the four plain cells."""
        jobs: dict[Path, Sequence[LateJob]] = {}
        for pair in pairs_of(store):
            settings = replace(_settings(store, options, pair), **exactness)
            cells, sizes = _places(folder, pair)
            jobs[cells] = jobs_left(store, finished_cells(cells, store), settings)
            jobs[sizes] = size_jobs(store, finished_cells(sizes, store), settings.boundaries[0], pair, **exactness)
        return jobs

    def numbers(self, cells: pa.Table, run: Run, options: ControlsOptions) -> Numbers:
        """The cells; groups for each kind and pair of events."""
        store, exactness = run.store, exactness_of(run.folder)
        tables, groups = [], []
        for pair in pairs_of(store):
            settings = _settings(store, options, pair)
            places = _places(run.folder, pair)
            plain = _chosen(cells, settings, pair, [PLAIN.name])
            names = [variant.name for variant in settings.variants_at(settings.boundaries[0])]
            varied = _chosen(gather_cells(places[0], store, **exactness), settings, pair, names)
            sizes = read_sizes(places[1], store, settings.boundaries[0], pair, **exactness)
            tables.append(_table(store, plain, varied, names, sizes, pair[1]))
            effects = contrasts(plain)
            for kind in sorted(set(effects["kind"].to_pylist())):
                of_kind = effects.filter(pc.equal(effects["kind"], kind))
                events = of_kind["event_id"].to_pylist()
                axes = {"variant": names, "late": pair, "event_id": events}
                margins, deltas = (aligned(varied, axes, column) for column in ("margin", "noop_delta"))
                of_pt, of_it = np.moveaxis(margins + deltas, 1, 0)  # as replayed, on the diagonal too
                slack = np.spacing(np.abs(deltas[0]).max(axis=0).astype(np.float32)).astype(np.float64)
                at = pc.index_in(of_kind["event_id"], value_set=store.events["event_id"].combine_chunks()).to_numpy()
                cells_of = ((sizes[other, host][at], sizes[host, host][at]) for host, other in (pair, pair[::-1]))
                anomaly = np.maximum(*(anomaly_of(hybrid, native) for hybrid, native in cells_of))
                group = {name: of_kind[name][0].as_py() for name in ("kind", "pair", "boundary", "scope", "readout")}
                advantages = dict(zip(names, of_it - of_pt, strict=True))
                groups += [group | one for one in _groups(of_kind, advantages, anomaly, options, slack)]
        return Numbers(pa.concat_tables(tables), groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Late advantage over weights, displacements, and the interaction over anomaly."""
        whose = {(one["kind"], one["pair"]) for one in groups}
        several = {at for at in (0, 1) if len({one[at] for one in whose}) > 1}
        kinds = sorted(kind for kind, _ in whose)
        drawn = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else kinds[0]  # others are in the table

        def of_whom(group: Mapping[str, Any]) -> str:
            return ", ".join(group[name] for at, name in enumerate(("kind", "pair")) if at in several)

        def series(named: Mapping[str, Any], quantity: str) -> dict[str, list[tuple[Any, Interval]]]:
            """By pair, (what stands for its name, number) of the groups of one kind that have one of these names."""
            found: dict[str, list[tuple[Any, Interval]]] = {}
            for one in groups:
                if one["kind"] == drawn and (name := one.get("stratum", one["control"])) in named:
                    found.setdefault(of_whom(one), []).append((named[name], one[quantity]))
            return found

        weights = {_interpolated(weight): weight for weight in WEIGHTS}
        randoms = {name: name.replace("_", " ") for name in RANDOM}
        strata = {name: name for name in STRATA}
        return Section(
            title="Hybrid-state controls",
            figures=[
                Lines(
                    "weight of IT's state",
                    "late advantage, logits",
                    series(weights, "late_advantage"),
                    None,
                    "Late advantage of states between PT's and IT's.",
                ),
                Bars(
                    "displacement / |interaction|",
                    series(randoms, "displacement_ratio"),
                    0.0,
                    "Mean displacement by random states, over the interaction.",
                    shares=True,
                ),
                Bars(
                    "interaction B - A, logits",
                    series(strata, "interaction"),
                    0.0,
                    "Interaction of the events of each stratum of anomaly.",
                ),
            ],
            columns=["control", "events", "prompts", "mean", "share"],
            rows=[
                [
                    ": ".join(part for part in (of_whom(one), text) if part),
                    one["n_events"],
                    one["n_prompts"],
                    *(("", one[quantity]) if quantity in _SHARES else (one[quantity], "")),
                ]
                for one in groups
                for text, quantity in _rows(one)
            ],
            shows=(
                "The late advantage rises step by step with the weight of IT's state where the interaction is gradual. "
                "Random displacements as long as the difference should move it little. Events whose hybrid cells look "
                "like native ones should have an interaction too."
            ),
            does_not_show=(
                "Hybrid states are compared by their size alone: none of this says that they are natural. A small mean "
                "displacement does not say that single events stay."
            ),
            shares=("share",),
        )


def _groups(
    effects: pa.Table,
    advantages: Mapping[str, Floats],
    anomaly: Floats,
    options: ControlsOptions,
    slack: Floats | float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Of one kind: interpolation, random displacements, the placebo, and the interaction by anomaly.

    Args:
        effects: of the plain cells, one row per event.
        advantages: LA ``[E]`` by variant, as replayed.
        anomaly: ``[E]``; not finite where nothing tells it.
        options: of the analysis.
        slack: ``[E]``, how far the plain advantages may be off as a diagonal margin is told as a float32 difference.
    """
    how: dict[str, Any] = {"weights": options.weights, "draws": options.draws, "seed": options.seed}
    contrast = {name: effects[name].to_numpy() for name in ("late_from_pt", "late_from_it", "interaction")}
    start = contrast["late_from_pt"]
    course = [start, *(advantages[_interpolated(weight)] for weight in WEIGHTS[1:-1]), contrast["late_from_it"]]
    of_course = of_interpolation(np.stack(course))
    values = {"interaction": contrast["interaction"], **of_course}
    values |= {_interpolated(weight): one for weight, one in zip(WEIGHTS, course, strict=True)}
    for kind in RANDOM:
        there = np.stack([advantages[name] for name in _drawn(kind, options.seeds)])
        values[kind] = there.mean(axis=0)
        values[f"{kind}, moved"] = (there - start).mean(axis=0)
        values[f"{kind}, moved at all"] = np.abs(there - start).mean(axis=0)
    # Held against the plain replay that ran with it: packs of another shape round otherwise.
    moved = advantages[PLACEBO] - advantages[PLAIN.name]
    values[PLACEBO] = np.where(np.abs(moved) <= slack, 0.0, moved)
    if values[PLACEBO].any():
        raise CheckError(
            f"a placebo that adds zeros moved the late advantage by {np.abs(values[PLACEBO]).max():.3g}: replays of "
            "equal states differ here; please report it, with what 'actcache inspect --engine' prints"
        )
    sample = Sample.of(effects["prompt_id"], values, **how)
    n = {"n_events": sample.n_events, "n_prompts": sample.n_prompts}
    for weight in WEIGHTS:
        yield {"control": _interpolated(weight), **n, "late_advantage": sample.mean(_interpolated(weight))}
    yield {"control": "interpolation", **n, **{name: sample.mean(name) for name in of_course}}
    sign = -1.0 if (sample.mean("interaction")["mean"] or 0.0) < 0 else 1.0

    def over_interaction(name: str) -> Number:
        return sample.ratio(name, lambda means: sign * means["interaction"])

    for kind in RANDOM:
        signed, absolute = f"{kind}, moved", f"{kind}, moved at all"
        yield {
            "control": kind,
            **n,
            "late_advantage": sample.mean(kind),
            "displacement": sample.mean(signed),
            "absolute_displacement": sample.mean(absolute),
            "displacement_ratio": over_interaction(signed),
            "absolute_ratio": over_interaction(absolute),
        }
    yield {"control": PLACEBO, **n, "displacement": sample.mean(PLACEBO)}
    is_told = bool(np.isfinite(anomaly).all())  # not by a single native cell
    strata = strata_of(anomaly) if is_told else {STRATA[0]: np.ones(len(anomaly), bool)}
    for stratum, kept in strata.items():
        if not kept.any():
            continue
        of = {name: one[kept] for name, one in (contrast | ({"anomaly": anomaly} if is_told else {})).items()}
        part = Sample.of(effects["prompt_id"].filter(pa.array(kept)), of, **how)
        n = {"n_events": part.n_events, "n_prompts": part.n_prompts}
        yield {"control": "anomaly", "stratum": stratum, **n, **{name: part.mean(name) for name in of}}


def of_interpolation(advantages: Floats) -> dict[str, Floats]:
    """LA ``[5, E]`` at each of ``WEIGHTS`` -> by name, what each event's course is: ``[E]``."""
    weights = np.array(WEIGHTS) - np.mean(WEIGHTS)
    slope = weights @ advantages / (weights @ weights)
    ranks = _ranks(advantages)
    ranks = ranks - ranks.mean(axis=0)
    lengths = np.linalg.norm(ranks, axis=0) * np.linalg.norm(_ranks(weights[:, None]) - 3)
    return {
        "slope": slope,
        "rising_share": (slope > 0).astype(np.float64),
        "monotone_share": (np.diff(advantages, axis=0) >= 0).all(axis=0).astype(np.float64),
        "spearman": np.divide((np.arange(5) - 2) @ ranks, lengths, out=np.zeros_like(slope), where=lengths > 0),
        "endpoint": advantages[-1] - advantages[0],
    }


def _ranks(values: Floats) -> Floats:
    """Ranks from 1 on along the first axis; equal values share theirs."""
    below, equal = (of(values[:, None], values[None]).sum(axis=1) for of in (np.greater, np.equal))
    ranks: Floats = below + (equal + 1) / 2
    return ranks


def anomaly_of(hybrid: Floats, native: Floats) -> Floats:
    """Sizes ``[E, 4]`` of a cell and of native ones -> ``[E]``: the largest |z|; infinite where native ones are all the
    same and the cell's is another."""
    distance, spread = np.abs(hybrid - native.mean(axis=0)), native.std(axis=0)
    z = np.divide(distance, spread, out=np.where(distance > 0, np.inf, 0.0), where=spread > 0)
    largest: Floats = z.max(axis=1)
    return largest


def strata_of(anomaly: Floats) -> dict[str, Any]:
    """By the names of ``STRATA``, which events ``[E]`` are in each; a border is of the lower one."""
    q25, third, half, q75, top = np.percentile(anomaly, [25, 100 / 3, 50, 75, 90])
    bands = [anomaly <= q25, anomaly <= half, anomaly <= q75, np.ones(len(anomaly), bool)]
    quartiles = [bands[0], *(upper & ~lower for lower, upper in itertools.pairwise(bands))]
    return dict(zip(STRATA, [bands[-1], bands[1], anomaly <= third, anomaly <= top, *quartiles], strict=True))


_SHARES = ("rising_share", "monotone_share", "displacement_ratio", "absolute_ratio")


def _rows(group: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the table shows of a group: texts, and the names of quantities."""
    if group["control"] == "anomaly":
        return [(f"interaction, anomaly: {group['stratum']}", "interaction")]
    control = group["control"].replace("_", " ")
    texts = {
        "late_advantage": "late advantage, logits",
        "slope": "slope over weights, logits",
        "endpoint": "endpoint B - A, logits",
        "rising_share": "events whose slope is positive",
        "monotone_share": "events that never fall",
        "spearman": "rank correlation with weight",
        "displacement": "displacement, logits",
        "absolute_displacement": "absolute displacement, logits",
        "displacement_ratio": "displacement / |interaction|",
        "absolute_ratio": "absolute displacement / |interaction|",
    }
    return [(f"{control}: {text}", name) for name, text in texts.items() if name in group]


def _interpolated(weight: float) -> str:
    return f"interpolate[weight={weight}]"


def _drawn(kind: str, seeds: int) -> list[str]:
    return [f"{kind}[seed={seed}]" for seed in range(seeds)]


def controlled(store: Store, options: ControlsOptions, pair: Sequence[str]) -> tuple[Variant, ...]:
    """What is replayed of PT's states, at every position."""
    donor, seeds = pair[1], options.seeds
    operations: dict[str, Operation] = {_interpolated(weight): Interpolate(donor, weight) for weight in WEIGHTS[1:-1]}
    for seed, names in enumerate(zip(*(_drawn(kind, seeds) for kind in RANDOM), strict=True)):
        operations |= zip(names, (SignedPermutation(seed, donor, "prompt"), MatchedNorm(seed, donor)), strict=True)
    variants = (Variant(name, (Edit(one, "all"),)) for name, one in operations.items())
    return (*variants, Variant(PLACEBO, (Edit(Add(torch.zeros(store.width)), "all"),), placebo=True))


def _settings(store: Store, options: ControlsOptions, pair: tuple[str, str]) -> GridSettings:
    """What is replayed of PT's states."""
    return GridSettings(
        (one_boundary(store, options.boundary),),
        readouts=(options.readout,),
        variants=controlled(store, options, pair),
        upstreams=pair[:1],
        lates=pair,
    ).of_pair(store.checkpoints, pair)


def _chosen(cells: pa.Table, settings: GridSettings, pair: Sequence[str], variants: Sequence[str]) -> pa.Table:
    """The cells of a pair's events that its 2x2 has, as the settings say."""
    of: dict[str, Sequence[Any]] = {"boundary": settings.boundaries, "scope": settings.scopes}
    of |= {"readout": settings.readouts, "variant": variants, "upstream": pair, "late": pair, "pair": [",".join(pair)]}
    kept = (pc.is_in(cells[name], value_set=pa.array(values, cells[name].type)) for name, values in of.items())
    return cells.filter(functools.reduce(pc.and_, kept))


def aligned(cells: pa.Table, axes: Mapping[str, Sequence[str]], column: str) -> Floats:
    """A column of cells as an array with an axis for each of these columns, over these of its values; nulls as 0.

    Raises:
        CheckError: a cell is missing.
    """
    found = np.full([len(values) for values in axes.values()], np.nan)
    at = [pc.index_in(cells[name], value_set=pa.array(values, pa.string())) for name, values in axes.items()]
    known = functools.reduce(pc.and_, (one.is_valid() for one in at))
    values = pc.fill_null(cells[column].cast(pa.float64()), 0.0)
    found[tuple(one.filter(known).to_numpy() for one in at)] = values.filter(known).to_numpy()
    if np.isnan(found).any():
        raise CheckError("cells of the controls are missing: files of them are gone; give the same command again")
    return found


def _table(
    store: Store,
    plain: pa.Table,
    varied: pa.Table,
    variants: Sequence[str],
    sizes: Mapping[tuple[str, str], Floats],
    it: str,
) -> pa.Table:
    """The cells: plain ones with the sizes of their final states; those of the variants; and those of IT's own states,
    which no variant moves, as a move towards IT."""
    at = pc.index_in(plain["event_id"], value_set=store.events["event_id"].combine_chunks()).to_numpy()
    places = zip(plain["upstream"].to_pylist(), plain["late"].to_pylist(), at.tolist(), strict=True)
    columns = np.array([sizes[upstream, late][event] for upstream, late, event in places]).reshape(-1, len(SIZES))
    tables = [varied.filter(pc.not_equal(varied["variant"], PLAIN.name))]
    of_it = plain.filter(pc.equal(plain["upstream"], it))
    for name in variants[1:]:
        named = of_it.set_column(of_it.column_names.index("variant"), "variant", pa.array([name] * len(of_it)))
        tables.append(named.set_column(named.column_names.index("noop_delta"), "noop_delta", pa.nulls(len(named))))
    for name, values in zip(SIZES, columns.T, strict=True):
        plain = plain.append_column(name, pa.array(values, pa.float64()))
    return pa.concat_tables([plain, *tables], promote_options="permissive")


def _places(folder: RunFolder, pair: Sequence[str]) -> tuple[Path, Path]:
    """Where the cells of its variants are, and the sizes of its plain cells."""
    own = folder.path / Controls.name
    return own / f"cells-{','.join(pair)}", own / f"sizes-{','.join(pair)}"


ANALYSIS = Controls()
