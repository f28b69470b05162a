"""Supports: is the interaction a product of where the events were picked, the first divergence of each prompt?

The same 2x2 is taken on other events of the same prompts (capture/supports.py): disagreements drawn at random on the
rollouts of both checkpoints, all disagreements at fixed horizons, and steps before the first divergence. *Balanced* is,
of each prompt, the mean over its rollouts that have a drawn disagreement, so that a prompt counts once. A *ratio* is
the mean interaction of a support over that of the first divergences, a ratio of means over draws that both share; each
is over its own prompts.

Supports differ in more than how they were picked. Two audits say in what:

- *Balance*: the standardised difference from the first divergences, (mean - mean) / root of the mean variance, of the
  step, and of three measures of how sure the two checkpoints are, each their mean: the entropy of the next token, the
  probability of the best one, and the gap by which its logit leads. The ratio is taken once more on the overlap: events
  weigh as much as they could have been of either support, by a logistic regression on these four (overlap weights; then
  both supports have the same means of the four).
- *Tokens*: the shares of events at step 0 and from step 3 on, and of content, layout and discourse among their tokens.

Steps before the first divergence are scored on any run, as the rows are there: where they are no events of the store,
by replays of their own. A null of random signs per prompt stands beside each interaction.

In arXiv 2605.07284 (four families, first divergence +1.794) balanced is +1.005 (56%), pre-divergence +0.059 (3%), and
histories of IT at the horizons 4, 8 and 16 +1.514.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.analyses.grid import GridSettings, check_settings, jobs_left, one_boundary
from actcache.capture.supports import FEWEST_BEFORE, HORIZONS, before_divergence
from actcache.capture.token_class import CLASSES, TokenClasses, read_token_classes
from actcache.errors import InputError
from actcache.files import digests_of_files
from actcache.models.readout import Readout
from actcache.replay.edits import PLAIN
from actcache.schema import FIRST_DIVERGENCE, PRE_DIVERGENCE, ROLES
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, exactness_of, option
from actcache.study.cells import Finished, finished_cells
from actcache.study.contrasts import contrasts, read_by
from actcache.study.earlier_job import EARLIER, Earlier
from actcache.study.engine import LateJob
from actcache.study.overlap import overlap_weights
from actcache.study.replay_job import ReplayJob
from actcache.study.run_folder import RunFolder
from actcache.study.section import Bars, Figure, Lines, Section
from actcache.study.statistics import (
    DRAWS,
    FEWEST_PROMPTS,
    SEED,
    Floats,
    Number,
    Quantity,
    Sample,
    check_draws,
    check_weights,
    number,
    sign_flip_null,
)

if TYPE_CHECKING:
    from actcache.study.run import Run

BALANCED, ROLLOUT_KINDS = "balanced", ("pt_rollout", "it_rollout")
NATIVE_KINDS = ("native_it", "native_pt")
COVARIATES = ("step", "entropy", "confidence", "gap")
_ORDER = (FIRST_DIVERGENCE, BALANCED, *ROLLOUT_KINDS, *NATIVE_KINDS, PRE_DIVERGENCE)
_MEANS = ("late_from_pt", "late_from_it", "interaction", "native_shift")
_SHARES = ("step_0", "step_3", *CLASSES)
_LOGITS_AT_ONCE = 1 << 24  # float64 takes 128 MiB


@dataclass(frozen=True)
class SupportsOptions:
    """Which cells, and how they are averaged."""

    boundary: str = option("", "boundary of the cells: 18, a fraction, or -3 (of L) (default: the main one)")
    scope: str = option("prefix", "scope of the cells: prefix or position (default %(default)s)")
    readout: str = option(
        "common_it",
        "readout of the cells: native, common_LABEL, or common_pt and common_it of each pair (default common_it)",
    )
    horizons: str = option("4,8,16", "steps of native histories that are pooled, a list (default %(default)s)")
    classes: str = option("", "file of patterns that tell layout and discourse, .toml (default: built-in ones)")
    weights: str = option("prompt", "what weighs the same: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)

    @property
    def steps(self) -> list[int]:
        """The horizons that are pooled.

        Raises:
            InputError: one is none of ``HORIZONS``.
        """
        found = [step for step in HORIZONS if str(step) in [part.strip() for part in self.horizons.split(",")]]
        if len(found) != len(set(self.horizons.split(","))):
            known = ", ".join(map(str, HORIZONS))
            raise InputError(f"horizons {self.horizons!r}: give a list of some of {known}, such as 4,8,16")
        return found


class Supports(CellAnalysis[SupportsOptions]):
    """The interaction on each support, and what supports differ in."""

    name = "supports"
    options = SupportsOptions

    def check(self, store: Store, options: SupportsOptions) -> None:
        """Cells, draws, weights, horizons and classes."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        _ = options.steps, _classes(options)
        check_settings(store, _settings(store, options))

    def beside(self, folder: RunFolder, options: Mapping[str, Any]) -> dict[str, str]:
        """The file of classes."""
        return digests_of_files({"classes": options.get("classes", "")})

    def jobs(
        self, store: Store, finished: Finished, options: SupportsOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells of all events."""
        return jobs_left(store, finished, replace(_settings(store, options), **exactness))

    def own_jobs(
        self, folder: RunFolder, store: Store, options: SupportsOptions, exactness: Mapping[str, Any]
    ) -> Mapping[Path, Sequence[LateJob]]:
        """Steps before the first divergences, where they are no events of the store."""
        place = _place(folder)
        earlier = _earlier(store, options, exactness)
        return {} if earlier is None else {place: earlier.jobs(store, finished_cells(place, store))}

    def leaves_out(self, store: Store, options: SupportsOptions) -> str:
        """Supports beyond the first divergences."""
        if set(store.events["kind"].to_pylist()) - {FIRST_DIVERGENCE, PRE_DIVERGENCE}:
            return ""
        return "events on rollouts and native histories: --support rollouts captures them"

    def numbers(self, cells: pa.Table, run: Run, options: SupportsOptions) -> Numbers:
        """One row per event. Groups of two parts: ``support`` for each pair and support, and ``horizon`` for each pair,
        native kind and step."""
        settings = _settings(run.store, options)
        of = {"boundary": settings.boundaries[0], "scope": options.scope, "variant": PLAIN.name}
        chosen = read_by(cells, options.readout, run.store.checkpoints)
        for name, value in of.items():
            chosen = pc.and_(chosen, pc.equal(cells[name], value))
        classes = _classes(options)
        table = _described(contrasts(cells.filter(chosen)), run, classes)
        earlier = _earlier(run.store, options, exactness_of(run.folder))
        if earlier is not None:
            found = earlier.read(_place(run.folder), run.store)
            own = found.filter(read_by(found, options.readout, run.store.checkpoints))
            table = pa.concat_tables([table, _as_earlier(_described(contrasts(own), run, classes), own)])
        groups = []
        for pair in sorted(pc.unique(table["pair"]).to_pylist()):
            of_pair = table.filter(pc.equal(table["pair"], pair))
            names = {"pair": pair, "readout": of_pair["readout"][0].as_py(), **of}
            groups += [names | group for group in groups_of(of_pair, options)]
        return Numbers(table.drop_columns(["readout"]), groups)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Interactions and ratios by support, histories by step, and the audits."""
        supports = [one for one in groups if one["part"] == "support"]
        has_one_pair = len({one["pair"] for one in groups}) == 1

        def named(one: Mapping[str, Any], name: str) -> str:
            return one[name] if has_one_pair else f"{one[name]} of {one['pair']}"

        bars = [(named(one, "support"), one["interaction"]) for one in supports]
        said = ", ".join(f"{name} {of['mean']:+.2f}" for name, of in bars)
        figures: list[Figure] = [
            Bars("interaction B - A, logits", {"": bars}, None, f"Interaction by support: {said}.")
        ]
        lines: dict[str, list[tuple[float, Mapping[str, float | None]]]] = {}
        for one in groups:
            if one["part"] == "horizon":
                lines.setdefault(named(one, "support"), []).append((one["step"], one["interaction"]))
        if lines:
            figures.append(
                Lines("step", "interaction B - A, logits", lines, None, "Interaction along native histories.")
            )
        return Section(
            title="Supports",
            figures=figures,
            columns=[
                *("support", "events", "prompts", "A", "B", "interaction", "of first divergence", "on the overlap"),
                *("p", "largest difference", "step 0", "step >= 3", *CLASSES),
            ],
            rows=[
                [
                    named(one, "support"),
                    *(one["n_events"], one["n_prompts"]),
                    *(one[name] for name in _MEANS[:3]),
                    *(one.get(name, "") for name in ("ratio", "ratio_overlap")),
                    *(one["p"], _largest(one), *(one[f"share_{name}"] for name in _SHARES)),
                ]
                for one in supports
            ],
            shows=(
                "Balanced, pt_rollout and it_rollout are disagreements that were drawn at random, not the first of "
                "their prompt. What they keep of the interaction at the first divergence is not made by picking it."
            ),
            does_not_show=(
                "Supports differ in how far the text has come and in how sure the checkpoints are: the largest "
                "standardised difference is told. The overlap takes out four such measures, and nothing else."
            ),
            shares=("of first divergence", "on the overlap", "step 0", "step >= 3", *CLASSES),
        )


def groups_of(table: pa.Table, options: SupportsOptions) -> Iterator[dict[str, Any]]:
    """The groups of the events of one pair.

    Args:
        table: one row per event: ``prompt_id``, ``kind``, ``step``, contrasts, the covariates (NaN where unknown) and
            ``class_pt``, ``class_it``.
        options: weights, horizons, draws and seed.
    """
    kinds = pc.unique(table["kind"]).to_pylist()
    of_kind = {kind: table.filter(pc.equal(table["kind"], kind)) for kind in kinds}
    supports = dict(of_kind)
    for kind in set(NATIVE_KINDS) & of_kind.keys():
        pooled = pc.is_in(of_kind[kind]["step"], value_set=pa.array(options.steps, table.schema.field("step").type))
        supports[kind] = of_kind[kind].filter(pooled)
    if drawn := [of_kind[kind] for kind in ROLLOUT_KINDS if kind in of_kind]:
        supports[BALANCED] = pa.concat_tables(drawn)
    order = [*(name for name in _ORDER if name in supports), *sorted(supports.keys() - set(_ORDER))]
    first = supports.get(FIRST_DIVERGENCE)
    for name in order:
        events = supports[name]
        if not len(events):
            continue
        weights = "prompt" if name == BALANCED else options.weights
        group = {"part": "support", "support": name} | _means(events, weights, options)
        if first is not None and name != FIRST_DIVERGENCE:
            group |= _beside(events, first, weights, options)
        yield group
    for kind in NATIVE_KINDS:
        for step in sorted(pc.unique(of_kind[kind]["step"]).to_pylist()) if kind in of_kind else ():
            events = of_kind[kind].filter(pc.equal(of_kind[kind]["step"], step))
            yield {"part": "horizon", "support": kind, "step": step} | _means(events, options.weights, options)


def _means(events: pa.Table, weights: str, options: SupportsOptions) -> dict[str, Any]:
    """Means of one support, the shares of its events, and its null."""
    values = {name: events[name].to_numpy() for name in _MEANS} | _shares(events)
    sample = Sample.of(events["prompt_id"], values, weights=weights, draws=options.draws, seed=options.seed)
    null = sign_flip_null(sample.of_prompts("interaction"))
    return {
        **{"n_events": sample.n_events, "n_prompts": sample.n_prompts},
        **{name: sample.mean(name) for name in _MEANS},
        **{f"share_{name}": sample.mean(name) for name in _SHARES},
        **{"p": null["p"], "null_q99.9": null["null_q99.9"]},
    }


def _shares(events: pa.Table) -> dict[str, Floats]:
    step = events["step"].to_numpy()
    of_tokens = [np.array(events[f"class_{role}"].to_pylist(), object) for role in ROLES]
    classes = {name: np.mean([of == name for of in of_tokens], axis=0) for name in CLASSES}
    return {"step_0": (step == 0).astype(np.float64), "step_3": (step >= 3).astype(np.float64)} | classes


# ---- beside the first divergences ----


def _beside(events: pa.Table, first: pa.Table, weights: str, options: SupportsOptions) -> dict[str, Any]:
    """Ratios to the first divergences, and standardised differences from them."""
    sides = {"own": (events, weights), "first": (first, options.weights)}
    each = {side: _event_weights(of["prompt_id"], how) for side, (of, how) in sides.items()}
    tables = {side: of for side, (of, _) in sides.items()}
    few = min(len(pc.unique(of["prompt_id"])) for of in tables.values()) < FEWEST_PROMPTS
    plain = _joint(tables, each, ("interaction",), options)
    found: dict[str, Any] = {"ratio": _ratio(plain, few)}
    found["flags"] = ["ratio"] if plain.opposed(*_INTERACTIONS) else []  # of other signs: no share of anything
    x = {side: np.stack([of[name].to_numpy() for name in COVARIATES], axis=1) for side, of in tables.items()}
    if not all(np.isfinite(of).all() for of in x.values()):  # nothing is known of final states that are not stored
        return found
    joint = _joint(tables, each, COVARIATES, options)
    found |= {f"smd_{name}": _told(joint.number(_standardised(name)), few) for name in COVARIATES}
    overlap = overlap_weights(*(x[side] for side in sides), *(each[side] for side in sides))
    each = {side: each[side] * of for side, of in zip(sides, overlap, strict=True)}
    found["ratio_overlap"] = _ratio(_joint(tables, each, ("interaction",), options), few)
    found["n_effective"] = min(float(of.sum() ** 2 / (of**2).sum()) if of.any() else 0.0 for of in each.values())
    return found


def _event_weights(prompt_ids: pa.ChunkedArray, weights: str) -> Floats:
    """``[E]``: 1, or so that those of a prompt add up to 1."""
    if weights == "event":
        return np.ones(len(prompt_ids))
    codes = prompt_ids.combine_chunks().dictionary_encode().indices.to_numpy()
    return 1 / np.bincount(codes)[codes]


def _joint(
    tables: Mapping[str, pa.Table], weights: Mapping[str, Floats], names: Sequence[str], options: SupportsOptions
) -> Sample:
    """A sample of all prompts of several sides: of each prompt and side the sum of its events' weights, as ``side``,
    and of their values and squares, so that a side's mean is a ratio of two means of the sample."""
    ids = pa.concat_arrays([table["prompt_id"].combine_chunks() for table in tables.values()])
    prompts = pc.unique(ids).sort()
    values: dict[str, Floats] = {}
    for side, table in tables.items():
        at = pc.index_in(table["prompt_id"].combine_chunks(), value_set=prompts).to_numpy()
        of = {side: weights[side]}
        for name in names:
            of[f"{side}.{name}"] = weights[side] * table[name].to_numpy()
            of[f"{side}.{name} squared"] = weights[side] * table[name].to_numpy().astype(np.float64) ** 2
        for name, sums in of.items():
            values[name] = np.bincount(at, weights=sums, minlength=len(prompts)).astype(np.float64)
    return Sample.of(prompts, values, weights="event", draws=options.draws, seed=options.seed)


def _mean_of(side: str, name: str) -> Quantity:
    return lambda means: means[f"{side}.{name}"] / means[side]


_INTERACTIONS = _mean_of("own", "interaction"), _mean_of("first", "interaction")


def _ratio(joint: Sample, few: bool) -> Number:
    return _told(joint.ratio(*_INTERACTIONS), few)


def _standardised(name: str) -> Quantity:
    def difference(means: Mapping[str, Floats]) -> Floats:
        mean = [means[f"{side}.{name}"] / means[side] for side in ("own", "first")]
        square = [means[f"{side}.{name} squared"] / means[side] for side in ("own", "first")]
        variance = np.mean([of - one**2 for of, one in zip(square, mean, strict=True)], axis=0)
        return (mean[0] - mean[1]) / np.sqrt(variance)

    return difference


def _told(found: Number, few: bool) -> Number:
    """Without an interval where one of the sides has too few prompts for one."""
    return number(found["mean"], None) if few else found


# ---- steps before the first divergences ----


def _earlier(store: Store, options: SupportsOptions, exactness: Mapping[str, Any]) -> Earlier | None:
    """Those to score, drawn as a capture of rollouts draws them; None where there are none, or events of them."""
    kinds = store.events["kind"].to_pylist()
    if PRE_DIVERGENCE in kinds or options.scope != "prefix":
        return None
    rows = zip(kinds, store.events["step"].to_pylist(), store.events["prompt_id"].to_pylist(), strict=True)
    steps = {
        number: before_divergence(prompt, step)
        for number, (kind, step, prompt) in enumerate(rows)
        if kind == FIRST_DIVERGENCE and step >= FEWEST_BEFORE
    }
    settings = _settings(store, options)
    labels = dict.fromkeys(label for pair in store.fingerprint.event_pairs for label in pair)
    if not steps:
        return None
    return Earlier(steps, settings.boundaries[0], tuple(labels), settings.readouts, **exactness)


def _as_earlier(table: pa.Table, cells: pa.Table) -> pa.Table:
    """First divergences as the steps before them, which they were scored at."""
    at = pc.index_in(table["event_id"], value_set=cells["event_id"].combine_chunks())
    nothing = pa.array(np.full(len(table), np.nan))
    columns = {
        "event_id": pc.binary_join_element_wise(table["event_id"], "earlier", "-"),
        "kind": pa.array([PRE_DIVERGENCE] * len(table), pa.string()),
        "step": cells[EARLIER].take(at).cast(table.schema.field("step").type),
        **dict.fromkeys(COVARIATES[1:], nothing),  # no final state is stored there
    }
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _place(folder: RunFolder) -> Path:
    return folder.path / Supports.name / "earlier"


# ---- what is known of an event ----


def _described(table: pa.Table, run: Run, classes: TokenClasses) -> pa.Table:
    """Contrasts with all that the audits ask of an event."""
    table = table.select(["event_id", "prompt_id", "kind", "pair", "step", "readout", *_MEANS])
    return _with_tokens(_with_certainty(table, run), run.store.events, classes)


def _with_certainty(table: pa.Table, run: Run) -> pa.Table:
    """How sure the two checkpoints of each event are of their choices, on average: ``entropy`` in nats, ``confidence``,
    a probability, and ``gap`` in logits; NaN of what the store has no final state of."""
    store = run.store
    at = pc.index_in(table["event_id"], value_set=store.events["event_id"].combine_chunks())
    known = at.is_valid().to_numpy(zero_copy_only=False)
    rows = at.drop_null().to_numpy().astype(np.int64)
    events = store.events.take(pa.array(rows))
    pairs = [tuple(pair.split(",")) for pair in events["pair"].to_pylist()]
    found = {name: np.zeros((len(ROLES), len(rows))) for name in COVARIATES[1:]}
    for label in dict.fromkeys(label for pair in pairs for label in pair):
        readout = run.load_readout(label)
        for at_role in range(len(ROLES)):
            own = np.array([pair[at_role] == label for pair in pairs], bool)
            if own.any():
                entropy, confidence = certainty(readout, store.final(label, rows[own]))
                found["entropy"][at_role, own], found["confidence"][at_role, own] = entropy, confidence
    for at_role, role in enumerate(ROLES):
        has_gaps = f"gap_{role}" in events.column_names
        found["gap"][at_role] = events[f"gap_{role}"].to_numpy() if has_gaps else np.nan
    for name, values in found.items():
        column = np.full(len(table), np.nan)
        column[known] = values.mean(axis=0)
        table = table.append_column(name, pa.array(column))
    return table


def certainty(readout: Readout, final: torch.Tensor) -> tuple[Floats, Floats]:
    """Of final states ``[n, D]``: the entropy of the next token in nats, and the probability of the best one, ``[n]``
    each, from float32 logits, summed in float64."""
    entropy, confidence = [np.zeros(0)], [np.zeros(0)]
    for some in final.split(max(1, _LOGITS_AT_ONCE // readout.vocab_size)):
        p = readout.logits(some).double().softmax(dim=-1)
        entropy.append(torch.special.entr(p).sum(dim=-1).numpy())
        confidence.append(p.max(dim=-1).values.numpy())
    return np.concatenate(entropy), np.concatenate(confidence)


def _with_tokens(table: pa.Table, events: pa.Table, classes: TokenClasses) -> pa.Table:
    """The classes of both tokens; ``unknown`` where the store has no texts of them."""
    at = pc.index_in(table["event_id"], value_set=events["event_id"].combine_chunks())
    events = events.take(at)
    for role in ROLES:
        texts, special = (
            events[name].to_pylist() if name in events.column_names else [None] * len(table)
            for name in (f"token_{role}", f"special_{role}")
        )
        kinds = [
            "unknown" if text is None else classes.of(text, special=bool(is_special))
            for text, is_special in zip(texts, special, strict=True)
        ]
        table = table.append_column(f"class_{role}", pa.array(kinds, pa.string()))
    return table


def _classes(options: SupportsOptions) -> TokenClasses:
    return read_token_classes(options.classes) if options.classes else TokenClasses()


def _settings(store: Store, options: SupportsOptions) -> GridSettings:
    boundary = one_boundary(store, options.boundary)
    settings = GridSettings((boundary,), (options.scope,), (options.readout,))
    return settings.of_pair(store.checkpoints, store.fingerprint.event_pairs)


def _largest(group: Mapping[str, Any]) -> float | str:
    """The standardised difference that is farthest from 0."""
    found = [group[f"smd_{name}"]["mean"] for name in COVARIATES if f"smd_{name}" in group]
    known = [one for one in found if one is not None]
    return max(known, key=abs) if known else ""


ANALYSIS = Supports()
