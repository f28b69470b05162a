"""Recipes: how does what a descendant adds differ between descendants of one base?

Each descendant has events of its own: where it and the base first diverge, with the tokens of these two. Of the 2x2 of
base and descendant, *portable* P is the late effect from the state of the base (A), *matched* M the one from the state
of the descendant itself (B), and *conditional* C = M - P the interaction. P/M and C/M are told only where the interval
of M lies above 0.

Two descendants, or two sets of them, are compared on the prompts on which all of them have events. These are other
events of the same prompts. So the difference in C is also taken with controls of a regression: the subset of the
prompt, how far the continuation had come (0, 1-2, 3-5, 6 or more tokens), and the class of the descendant's token. A
null of random signs per prompt stands beside each C, and beside that of all descendants together, each weighing the
same.

It needs the events of base and each descendant: `--pair base,a --pair base,b` in one capture of all checkpoints, or
runs of one pair each, the others given by `--further`.

In arXiv 2605.07284 (on Llama-3.1-8B) four instruction recipes have C +0.96, and a fine-tune for mathematics -0.36.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache.analyses.grid import GridSettings, check_settings, jobs_left, one_boundary
from actcache.capture.token_class import TokenClasses
from actcache.errors import InputError
from actcache.replay.edits import PLAIN
from actcache.schema import SEGMENT
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, option
from actcache.study.cells import Finished
from actcache.study.contrasts import contrasts, read_by
from actcache.study.further import with_further
from actcache.study.regression import regress
from actcache.study.replay_job import ReplayJob
from actcache.study.section import Bars, Forest, Section
from actcache.study.statistics import (
    DRAWS,
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
from actcache.study.subsets import ALL, MOST_VALUES

if TYPE_CHECKING:
    from actcache.study.run import Run

_SCORES = ("late_from_pt", "late_from_it", "interaction")
_BINS = ((0, "0"), (1, "1-2"), (3, "3-5"), (6, "6+"))
"""The least step of each bin of positions, and its name."""


@dataclass(frozen=True)
class RecipesOptions:
    """Which descendants, and which cells."""

    base: str = option("", "label of the checkpoint that the descendants come from (default: the first of the pair)")
    descendants: str = option("", "labels of the descendants, in order (default: all that have events with the base)")
    further: str = option("", "folders of further runs, whose pairs are the same base and other descendants")
    by: str = option(
        "", "column of the prompts to take subsets by, and to control for (default: category, of at most 50 values)"
    )
    contrast: str = option(
        "", "descendants to compare, as sft+dpo:math, a list (default: each with every other)",
    )  # fmt: skip
    kind: str = option("first_divergence", "kind of the events (default %(default)s)")
    boundary: str = option("", "boundary of the cells: 18, a fraction, or -3 (of L) (default: the main one)")
    scope: str = option("prefix", "scope of the cells: prefix or position (default %(default)s)")
    readout: str = option(
        "common_it",
        "readout of the cells: native, common_LABEL, or common_pt and common_it of each pair (default common_it)",
    )
    weights: str = option("prompt", "what weighs the same: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


class _Asked(NamedTuple):
    """Options as labels and numbers."""

    base: str
    own: tuple[str, ...]  # the descendants that this run has events of
    by: str | None
    boundary: int
    scope: str
    kind: str
    readout: str


class Recipes(CellAnalysis[RecipesOptions]):
    """P, M and C of each descendant, by subsets, and what they differ by on the same prompts."""

    name = "recipes"
    options = RecipesOptions
    fewest: ClassVar[int] = 2  # descendants of a run that is answered by itself
    ratios: ClassVar[Mapping[str, tuple[str, str] | None]] = {
        "portable_share": ("late_from_pt", "late_from_it"),
        "conditional_share": ("interaction", "late_from_it"),
    }

    def check(self, store: Store, options: RecipesOptions) -> None:
        """Labels, cells, draws, the column of subsets, and whether there are events of the base and a descendant."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        _sides(options.contrast)
        check_settings(store, _settings(store, _asked(store, options, self.fewest)))

    def jobs(
        self, store: Store, finished: Finished, options: RecipesOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """The plain cells of all checkpoints."""
        return jobs_left(store, finished, replace(_settings(store, _asked(store, options)), **exactness))

    def numbers(self, cells: pa.Table, run: Run, options: RecipesOptions) -> Numbers:
        """One row per event. Groups of three parts: ``recipe`` for each descendant and subset, ``pooled`` for all
        descendants, and ``contrast`` for each two sides and subset."""
        asked = _asked(run.store, options)
        table = _scored(cells, run.store, asked)
        given = replace(options, base=asked.base, descendants="", contrast="", boundary=str(asked.boundary), further="")
        table = with_further(_OfFurther(), given, run, table, options.further, (asked.base,))
        with_events = pc.unique(table["descendant"]).to_pylist()
        found = [label for label in dict.fromkeys([*asked.own, *with_events]) if label in with_events]
        descendants = _labels(options.descendants) or found
        sides = _sides(options.contrast) or [((a,), (b,)) for a, b in combinations(descendants, 2)]
        if len(set(descendants)) < len(descendants):
            raise InputError(f"--descendants {options.descendants} names a descendant twice; name each once")
        for label in (*descendants, *(label for side in sides for of in side for label in of)):
            if found and label not in found:
                raise InputError(f"there are no events of {asked.base} and {label!r}; there are of {', '.join(found)}")
        of = {label: table.filter(pc.equal(table["descendant"], label)) for label in descendants}
        groups = [*_recipe_groups(of, options), *_contrast_groups(table, sides, options)]
        names = {"base": asked.base, "kind": asked.kind, "boundary": asked.boundary, "scope": asked.scope}
        return Numbers(table, [names | {"readout": asked.readout} | group for group in groups])

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """P, M and C of each descendant, C by subset, and the contrasts."""
        recipes = [one for one in groups if one["part"] == "recipe"]
        whole = [one for one in recipes if one["subset"] == ALL]
        differences = [one for one in groups if one["part"] == "contrast"]
        subsets = [one for one in dict.fromkeys(one["subset"] for one in recipes) if one != ALL]
        bars = {
            name: [(one["descendant"], one[column]) for one in whole]
            for name, column in zip(("P: portable", "M: matched", "C: conditional"), _SCORES, strict=True)
        }
        said = ", ".join(f"C of {one['descendant']} {one['interaction']['mean']:+.2f}" for one in whole)
        figures: list[Bars | Forest] = [Bars("logits", bars, None, f"P, M and C by descendant: {said}.")]
        if subsets:
            by_subset = {
                one["descendant"]: [(of["subset"], of["interaction"]) for of in recipes
                                    if of["descendant"] == one["descendant"] and of["subset"] != ALL]
                for one in whole
            }  # fmt: skip
            figures.append(Bars("C, logits", by_subset, None, "C by descendant and subset."))
        if differences:
            of_all = [(_name(one), one["interaction_adjusted"]) for one in differences if one["subset"] == ALL]
            figures.append(
                Forest("difference in C with controls, logits", of_all, [], "Contrasts between descendants.")
            )
        return Section(
            title="Recipes of one base",
            figures=figures,
            columns=[
                *("descendant, subset", "events", "prompts", "P", "M", "C", "P/M", "C/M"),
                *("C with controls", "null's 99.9%", "p"),
            ],
            rows=[
                [
                    f"{_name(one)}, {one['subset']}",
                    one["n_events"],
                    one["n_prompts"],
                    *(one.get(name, "") for name in (*_SCORES, "portable_share", "conditional_share")),
                    *(one.get(name, "") for name in ("interaction_adjusted", "null_q99.9", "p")),
                ]
                for one in groups
            ],
            shows=(
                "C is what the late blocks of a descendant add to its own state beyond what they add to the state of "
                "the base, at its own first divergences. Rows of two names are differences on the prompts of both."
            ),
            does_not_show=(
                "Descendants are compared at other events of the same prompts, never at the same events. The controls "
                "take out what category, position and class of token explain linearly, and nothing else."
            ),
            shares=("P/M", "C/M"),
        )


class _OfFurther(Recipes):
    """The same of a further run, which may have one descendant."""

    fewest = 1


def _asked(store: Store, options: RecipesOptions, fewest: int = 1) -> _Asked:
    """Options with their defaults filled in; InputError for what the store has not."""
    base = options.base or store.fingerprint.pair[0]
    if base not in store.checkpoints:
        raise InputError(f"there is no checkpoint {base!r} in {store.path}; it has {', '.join(store.checkpoints)}")
    pairs = {*map(",".join, store.fingerprint.event_pairs), *pc.unique(store.events["pair"]).to_pylist()}
    own = tuple(label for label in store.checkpoints if f"{base},{label}" in pairs and label != base)
    if len(own) < (1 if options.further else fewest):
        raise InputError(
            f"{store.path} has events of {'; '.join(sorted(pairs))}, and recipes are of {base} and two descendants or "
            f"more: capture with --pair {base},A --pair {base},B, or name further runs by --further"
        )
    kinds = pc.unique(store.events["kind"]).to_pylist()
    if kinds and options.kind not in kinds:
        raise InputError(f"{store.path} has no events of kind {options.kind!r}; it has {', '.join(sorted(kinds))}")
    columns = store.events.column_names
    carried = columns[columns.index(SEGMENT.name) + 1 :]
    by = options.by or ("category" if "category" in carried else None)
    if options.by and len(store) and by not in carried:
        raise InputError(
            f"the prompts of {store.path} carry no column {by!r}; they carry {', '.join(carried) or 'none'}"
        )
    if by in carried and (n_values := len(pc.unique(store.events[by]))) > MOST_VALUES:
        if options.by:
            raise InputError(f"column {by!r} has {n_values} values; subsets are of at most {MOST_VALUES}")
        by = None
    boundary = one_boundary(store, options.boundary)
    return _Asked(base, own, by, boundary, options.scope, options.kind, options.readout)


def _settings(store: Store, asked: _Asked) -> GridSettings:
    settings = GridSettings((asked.boundary,), (asked.scope,), (asked.readout,))
    return settings.of_pair(store.checkpoints, [(asked.base, label) for label in asked.own])


def _labels(text: str, mark: str = ",") -> list[str]:
    return [label.strip() for label in text.split(mark) if label.strip()]


def _sides(text: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Contrasts, as ``sft+dpo:math,dpo:sft`` names them."""
    found = []
    for one in _labels(text):
        sides = [tuple(_labels(side, "+")) for side in one.split(":")]
        if len(sides) != 2 or not all(sides) or set(sides[0]) & set(sides[1]):
            raise InputError(f"the contrast {one!r} is none; give two sides of different labels, as sft+dpo:math")
        found.append((sides[0], sides[1]))
    return found


def _scored(cells: pa.Table, store: Store, asked: _Asked) -> pa.Table:
    """One row per event of the run's own descendants."""
    chosen = pc.and_(pc.equal(cells["boundary"], asked.boundary), pc.equal(cells["variant"], PLAIN.name))
    for name, value in (("scope", asked.scope), ("kind", asked.kind)):
        chosen = pc.and_(chosen, pc.equal(cells[name], value))
    pairs = pa.array([f"{asked.base},{label}" for label in asked.own])
    chosen = pc.and_(chosen, pc.is_in(cells["pair"], value_set=pairs))
    found = contrasts(cells.filter(pc.and_(chosen, read_by(cells, asked.readout, store.checkpoints))))
    table = found.select(["event_id", "prompt_id", "kind", "pair", "step"])
    table = table.append_column(
        "descendant", pc.replace_substring(found["pair"], f"{asked.base},", "", max_replacements=1)
    )
    table = _with_controls(table, store.events, asked.by)
    for name in _SCORES:
        table = table.append_column(name, found[name])
    return table


def _with_controls(table: pa.Table, events: pa.Table, by: str | None) -> pa.Table:
    """The subset of each event, the bin of its position, and the class of the descendant's token."""
    at = pc.index_in(table["event_id"], value_set=events["event_id"].combine_chunks())
    events = events.take(at)
    step = table["step"].to_numpy()
    subsets = [None] * len(table) if by is None else [_subset(by, value) for value in events[by].to_pylist()]
    bins = [[name for least, name in _BINS if least <= one][-1] for one in step.tolist()]
    classes = TokenClasses()
    texts, special = (
        events[name].to_pylist() if name in events.column_names else [None] * len(table)
        for name in ("token_it", "special_it")
    )
    kinds = [
        classes.of(text, special=bool(is_special)) if text is not None else "unknown"
        for text, is_special in zip(texts, special, strict=True)
    ]
    for name, values in (("subset", subsets), ("position_bin", bins), ("token_class", kinds)):
        table = table.append_column(name, pa.array(values, pa.string()))
    return table


def _subset(by: str, value: Any) -> str | None:
    return None if value is None else f"{by}={value}"


def _subsets(table: pa.Table) -> list[str]:
    """All events, then those of each value of the column."""
    return [ALL, *sorted(pc.unique(table["subset"]).drop_null().to_pylist())]


def _of_subset(table: pa.Table, name: str) -> pa.Table:
    return table if name == ALL else table.filter(pc.fill_null(pc.equal(table["subset"], name), False))


def _sample_of(table: pa.Table, options: RecipesOptions, names: Sequence[str] = _SCORES) -> Sample:
    values = {name: table[name].to_numpy() for name in names}
    return Sample.of(table["prompt_id"], values, weights=options.weights, draws=options.draws, seed=options.seed)


def _recipe_groups(of: Mapping[str, pa.Table], options: RecipesOptions) -> Iterator[dict[str, Any]]:
    """Each descendant by subsets, then all of them, each weighing the same."""
    nulls = []
    for label, table in of.items():
        for name in _subsets(table):
            events = _of_subset(table, name)
            if not len(events):
                continue
            sample = _sample_of(events, options)
            if name == ALL:
                nulls.append(sample.of_prompts("interaction"))
            yield {
                **{"part": "recipe", "descendant": label, "subset": name},
                **{"n_events": sample.n_events, "n_prompts": sample.n_prompts},
                **{score: sample.mean(score) for score in _SCORES},
                **{"portable_share": _of_matched(sample, "late_from_pt")},
                **{"conditional_share": _of_matched(sample, "interaction")},
                **_null(sample.of_prompts("interaction")),
            }
    if len(nulls) > 1:
        yield {
            **{"part": "pooled", "descendant": "+".join(of), "subset": ALL},
            **_balanced(list(of.values()), options),
            **_null(np.concatenate(nulls)),
        }


def _of_matched(sample: Sample, name: str) -> Number:
    """A share of M, where the interval of M lies above 0."""
    least = sample.mean("late_from_it")["low"]
    return sample.ratio(name, "late_from_it") if least is not None and least > 0 else number(None, None)


def _null(of_prompts: Floats) -> dict[str, float]:
    null = sign_flip_null(of_prompts)
    return {name: null[name] for name in ("p", "null_sd", "null_q99.9")}


def _balanced(tables: Sequence[pa.Table], options: RecipesOptions) -> dict[str, Any]:
    """Means over descendants, each of the same weight, of their means over their own events."""
    n = [len(table) for table in tables]
    prompts = pa.concat_tables([table.select(["prompt_id"]) for table in tables])["prompt_id"]
    values: dict[str, Floats] = {}
    for index, table in enumerate(tables):
        codes = table["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
        weight = 1 / np.bincount(codes)[codes] if options.weights == "prompt" else np.ones(len(table))
        for name, of_events in [("", weight), *((name, weight * table[name].to_numpy()) for name in _SCORES)]:
            values[f"{name} {index}"] = np.concatenate(
                [of_events if at == index else np.zeros(n[at]) for at in range(len(n))]
            )
    sample = Sample.of(prompts, values, weights="event", draws=options.draws, seed=options.seed)
    found: dict[str, Any] = {"n_events": sample.n_events, "n_prompts": sample.n_prompts}
    return found | {name: sample.number(_balanced_mean(name, len(tables))) for name in _SCORES}


def _balanced_mean(name: str, n: int) -> Quantity:
    def of(means: Mapping[str, Floats]) -> Floats:
        mean: Floats = np.mean([means[f"{name} {at}"] / means[f" {at}"] for at in range(n)], axis=0)
        return mean

    return of


def _contrast_groups(
    table: pa.Table, contrasted: Sequence[tuple[Sequence[str], Sequence[str]]], options: RecipesOptions
) -> Iterator[dict[str, Any]]:
    """The differences of the first side less the second, on the prompts that all descendants of both have."""
    for left, right in contrasted:
        of = {label: table.filter(pc.equal(table["descendant"], label)) for label in (*left, *right)}
        for name in _subsets(table):
            parts = {label: _of_subset(events, name) for label, events in of.items()}
            sides = {
                label: (events["prompt_id"], {score: events[score].to_numpy() for score in _SCORES})
                for label, events in parts.items()
            }
            sample = Sample.paired(sides, weights=options.weights, draws=options.draws, seed=options.seed)
            if not sample.n_events:
                continue

            yield {
                **{"part": "contrast", "left": "+".join(left), "right": "+".join(right), "subset": name},
                **{"n_events": sample.n_events, "n_prompts": sample.n_prompts},
                **{score: sample.number(_difference(left, right, score)) for score in _SCORES},
                **{"interaction_adjusted": _adjusted(parts, left, options)},
            }


def _difference(left: Sequence[str], right: Sequence[str], score: str) -> Quantity:
    def of(means: Mapping[str, Floats]) -> Floats:
        first, second = (np.mean([means[f"{label}.{score}"] for label in side], axis=0) for side in (left, right))
        return first - second

    return of


def _adjusted(parts: Mapping[str, pa.Table], left: Sequence[str], options: RecipesOptions) -> Number:
    """The difference in C of the first side, with subset, position and class of token as controls."""
    events = pa.concat_tables(list(parts.values()))
    counts = events.group_by("prompt_id").aggregate([("descendant", "count_distinct")])
    matched = counts.filter(pc.equal(counts["descendant_count_distinct"], len(parts)))["prompt_id"]
    events = events.filter(pc.is_in(events["prompt_id"], value_set=matched.combine_chunks()))
    controls = {
        "side": pc.is_in(events["descendant"], value_set=pa.array(list(left))).to_numpy(),
        **{name: pc.fill_null(events[name], "").to_pylist() for name in ("subset", "position_bin", "token_class")},
    }
    found = regress(
        events["prompt_id"], events["interaction"].to_numpy(), controls,
        weights=options.weights, draws=options.draws, seed=options.seed,
    )  # fmt: skip
    return found["side"]


def _name(group: Mapping[str, Any]) -> str:
    """What a group is of."""
    return f"{group['left']} - {group['right']}" if group["part"] == "contrast" else str(group["descendant"])


ANALYSIS = Recipes()
