"""Chooses what the page shows and fills the template; the numbers are those of the effects, none is recomputed.

Knows the tables of a run and the effects; draws nothing and holds no HTML.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actcache.errors import InputError
from actcache.report import figures, sections, variants, visible
from actcache.report.sections import OPEN_ROWS
from actcache.report.template import render, shown_settings
from actcache.schema import CONTRASTS, GRID_MARGINS, IT, NATIVE, PT, ROLES, common_readout, names
from actcache.study.analysis import Answered
from actcache.study.contrasts import GROUP_COLUMNS, contrasts
from actcache.study.statistics import CAUTION_PROMPTS, FEWEST_PROMPTS, Sample
from actcache.study.subsets import ALL

EXAMPLES_PER_PART = 8
"""Examples from each of the two ends and the middle of the interactions."""
CONTEXT_CHARACTERS = 180
TOKEN_CHARACTERS = 32
MAX_GROUPS = 300
"""Rows of the table of groups; more than these are in effects.json only."""
MAX_REASONS = 30
_LOGIT_QUANTITIES = names(CONTRASTS)
_CELLS_COLUMNS = (*GROUP_COLUMNS, "noop_delta")
_EVENTS_COLUMNS = ("event_id", "prompt_id", "kind", "gap_pt", "gap_it", "context", "token_pt", "token_it")
_EXCLUDED_COLUMNS = ("prompt_id", "reason")

Group = dict[str, Any]


def build_report(
    cells: pa.Table,
    effects: dict[str, Any],
    events: pa.Table,
    excluded: pa.Table,
    settings: dict[str, str],
    *,
    checkpoints: Sequence[str] = (),
    default_boundary: int | None = None,
    answers: Mapping[str, Answered] = MappingProxyType({}),
) -> str:
    """Render a run as one HTML page that needs nothing else: no fonts, images, network or scripts, but for one in the
    page that sorts its tables.

    The page leads with the main group: kind ``first_divergence``, scope ``prefix``, the readout of the checkpoint in
    the role it (else ``native``), variant ``none`` where the run has them, and the boundary nearest to
    ``default_boundary``.

    Args:
        cells: the scored cells, columns as in ``cells.parquet``.
        effects: what :func:`actcache.analyses.averages.effects` returned for these cells, with what
            :mod:`actcache.study.left_out` noted of the events that it left out.
        events: one row per event: event_id, prompt_id, kind, gap_pt, gap_it (top-1 minus top-2, logits), context
            (the text before the divergence), token_pt, token_it (decoded; any text); special_pt, special_it (whether
            the token is a special one) where the store has them; more columns are ignored.
        excluded: one row per prompt without an event: prompt_id, reason.
        settings: label -> text, shown in this order as how the run was made.
        checkpoints: labels in the order of the lineup; the order of the map where there are more than two.
        default_boundary: the boundary to lead with; the nearest one that was run is taken. Without it: 0.6 of the
            largest boundary plus one, which is the default boundary where all boundaries were run.
        answers: what analyses show, by their names.

    Returns:
        The page. The same arguments give the same text, for any order of the rows of ``cells`` and ``events``; it can
        be encoded as UTF-8 whatever the tokens are, and its size does not grow with the number of events.

    Raises:
        InputError: a column is missing; the effects are not those of the cells; an event of the cells is not among
            ``events``.
    """
    if "pair" not in cells.column_names:  # of an earlier version, or another tool's
        pairs = [group["pair"] for group in effects["groups"]][:1] * cells.num_rows
        cells = cells.append_column("pair", pa.array(pairs or [""] * cells.num_rows, pa.string()))
    for name, table, columns in (
        ("cells", cells, _CELLS_COLUMNS),
        ("events", events, _EVENTS_COLUMNS),
        ("excluded", excluded, _EXCLUDED_COLUMNS),
    ):
        missing = [column for column in columns if column not in table.column_names]
        if missing:
            raise InputError(f"the table of {name} has no column {', '.join(missing)}; found {table.column_names}")
    effects = effects | {"groups": [group for group in effects["groups"] if group["subset"] == ALL]}
    groups = _folded([_shown(group) for group in effects["groups"]])
    if cells.num_rows and not groups:
        raise InputError(f"{cells.num_rows} cells but effects without groups: compute the effects of these cells first")

    with_event, without = ({*table["prompt_id"].to_pylist()} for table in (events, excluded))
    n_prompts = len(with_event | without)
    page: dict[str, Any] = {
        "settings": shown_settings(settings),
        "level": effects["level"],
        "draws": effects["draws"],
        "seed": effects["seed"],
        "n_prompts_read": n_prompts,
        "n_excluded": len(without - with_event),
        "reasons": _reasons(excluded),
        "left_out": _left_out(effects),
        "main": None,
        # One of the answers may be the effects', and then carries them.
        "effects_files": [] if "effects" in answers else sections.downloads("effects", effects["groups"]),
        "sections": [sections.shown(name, answered) for name, answered in answers.items()],
    }
    if groups:
        page |= _findings(cells, effects, groups, events, checkpoints, default_boundary)
    return render("page.html.jinja", page)


def _findings(
    cells: pa.Table,
    effects: dict[str, Any],
    groups: list[Group],
    events: pa.Table,
    checkpoints: Sequence[str],
    default_boundary: int | None,
) -> dict[str, Any]:
    """Everything on the page that needs at least one event."""
    raw = effects["groups"][_main_index(effects["groups"], default_boundary)]
    main = _fold_of(groups, _shown(raw))
    labels = main[PT], main[IT]
    per_event = _main_contrasts(cells, raw)
    of_kind = _matching(events, per_event, str(raw["kind"]))
    places = visible.decimals(main[name]["mean"] for name in _LOGIT_QUANTITIES)
    interaction = per_event["interaction"].to_numpy()
    gap_pt, gap_it = (of_kind[name].drop_null().to_numpy() for name in ("gap_pt", "gap_it"))
    near = [int((gap < figures.NEAR_TIE).sum()) for gap in (gap_pt, gap_it)]
    return {
        "main": main,
        "n_pairs": len({group["pair"] for group in groups}),
        **dict(zip(ROLES, labels, strict=True)),
        "places": places,
        "verdict": _verdict(main),
        "caution": FEWEST_PROMPTS <= main["n_prompts"] < CAUTION_PROMPTS,
        "unpatched": _unpatched(effects["groups"], raw),
        "whose_readout": None if raw["readout"] == NATIVE else main["readout"].partition(" = ")[0],
        "grid_figure": figures.grid(main["cells"], main, labels, places),
        "lineup_figure": _lineup_figure(raw, checkpoints, places),
        "effects_figure": figures.late_effects(_other_readouts(groups, main), labels[1], places),
        "boundary_figure": _boundary_figure(groups, main, places),
        "variant_figures": _variant_figures(effects["groups"], raw, places),
        "steps_figure": figures.steps(per_event["step"].to_numpy()),
        "step_median": float(np.median(per_event["step"].to_numpy())),
        "gaps_figure": figures.gaps(gap_pt, gap_it, labels) if gap_pt.size and gap_it.size else None,
        "near_tie": figures.NEAR_TIE,
        "near_tie_counts": near,
        "interactions_figure": figures.interactions(interaction, places),
        "n_positive": int((interaction > 0).sum()),
        "table": _group_table(groups, main),
        "examples": _examples(per_event, of_kind),
        "special": _special(of_kind),
        "noop": _noop(cells),
    }


def _shown(group: Group) -> Group:
    """The group with its labels made fit to show; the boundary stays a number."""
    texts = [name for name in (*GROUP_COLUMNS, *ROLES) if name != "boundary"]
    return (
        {"choices": None, "kl": None, "flags": ()}
        | group
        | {name: visible.head(visible.plain(str(group[name])), 60) for name in texts}
    )


def _folded(groups: list[Group]) -> list[Group]:
    """The groups with readouts that agree in every number told once, by all their names: ``common_it = native``."""
    leading = {NATIVE, *(common_readout(group[IT]) for group in groups)}
    alike = [name for name in GROUP_COLUMNS if name != "readout"]
    by_readout: dict[str, dict[Any, Group]] = {}
    for group in groups:
        numbers = {name: value for name, value in group.items() if name != "readout"}
        by_readout.setdefault(group["readout"], {})[tuple(group[name] for name in alike)] = numbers
    folds: list[list[str]] = []
    for readout in sorted(by_readout, key=lambda name: (name not in leading, name)):
        same = next((fold for fold in folds if by_readout[fold[0]] == by_readout[readout]), None)
        if same is None:
            folds.append([readout])
        else:
            same.append(readout)
    name_of = {fold[0]: " = ".join(fold) for fold in folds}
    return [group | {"readout": name_of[group["readout"]]} for group in groups if group["readout"] in name_of]


def _fold_of(groups: list[Group], shown: Group) -> Group:
    """The group that tells the numbers of this one."""
    alike = [group for group in groups if _same(group, shown, *(name for name in GROUP_COLUMNS if name != "readout"))]
    return next(group for group in alike if shown["readout"] in group["readout"].split(" = "))


def _main_index(groups: list[Group], default_boundary: int | None) -> int:
    """Which group the page leads with."""
    if default_boundary is None:
        default_boundary = round(0.6 * (1 + max(group["boundary"] for group in groups)))
    wishes = {"kind": ["first_divergence"], "scope": ["prefix"], "readout": [], "variant": ["none"]}

    def rank(index: int) -> tuple[int, ...]:
        group = groups[index]
        wishes["readout"] = [common_readout(group[IT]), NATIVE]
        wished = [wish.index(group[name]) if group[name] in wish else len(wish) for name, wish in wishes.items()]
        return (*wished, abs(group["boundary"] - default_boundary), index)

    return min(range(len(groups)), key=rank)


def _main_contrasts(cells: pa.Table, group: Group) -> pa.Table:
    """The contrasts of one group, after checking that the group was computed from these cells."""
    wanted = np.ones(cells.num_rows, bool)
    for name in GROUP_COLUMNS:
        wanted &= pc.equal(cells[name], pa.scalar(group[name])).to_numpy()
    table = contrasts(cells.filter(pa.array(wanted)), (group[PT], group[IT]))
    values = {"interaction": table["interaction"].to_numpy()}
    found = Sample.of(table["prompt_id"], values, weights=group["weights"]).mean("interaction")["mean"]
    mean = math.nan if found is None else found
    expected = group["interaction"]["mean"]
    if table.num_rows != group["n_events"] or not math.isclose(mean, expected, rel_tol=1e-9, abs_tol=1e-9):
        raise InputError(
            f"the effects are not those of these cells: boundary {group['boundary']}, readout {group['readout']} has "
            f"{group['n_events']} events with interaction {expected}, the cells give {table.num_rows} with {mean}; "
            f"compute the effects again"
        )
    return table


def _matching(events: pa.Table, per_event: pa.Table, kind: str) -> pa.Table:
    """The scored events of one kind, after checking that each of them is among the events; ids in the cells' type."""
    events = events.filter(pc.equal(events["kind"].cast(pa.string()), kind))
    at = events.column_names.index("event_id")
    events = events.set_column(at, "event_id", events["event_id"].cast(per_event["event_id"].type))
    unknown = pc.invert(pc.is_in(per_event["event_id"], value_set=events["event_id"].combine_chunks()))
    if pc.any(unknown).as_py():
        first = per_event["event_id"].filter(unknown)[0].as_py()
        raise InputError(
            f"event {first!r} of the cells is not among the {events.num_rows} events of kind {kind}; pass the events "
            f"of the same run"
        )
    return events.filter(pc.is_in(events["event_id"], value_set=per_event["event_id"].combine_chunks()))


def _same(group: Group, main: Group, *names: str) -> bool:
    return all(group[name] == main[name] for name in names)


def _other_readouts(groups: list[Group], main: Group) -> list[Group]:
    """The main group and those that differ from it in their readout only, the main one first."""
    alike = [group for group in groups if _same(group, main, "kind", "pair", "boundary", "scope", "variant")]
    return sorted(alike, key=lambda group: group["readout"] != main["readout"])


def _lineup_figure(main: Group, checkpoints: Sequence[str], places: int) -> Any:
    """The margin of every upstream and late checkpoint, or None where there are two checkpoints."""
    margins = main.get("margins")
    if margins is None:
        return None
    labels = sorted(margins, key=lambda label: (checkpoints.index(label) if label in checkpoints else -1, label))
    shown = [visible.plain(label) for label in labels]
    return figures.lineup([[margins[upstream][late] for late in labels] for upstream in labels], shown, places)


def _boundary_figure(groups: list[Group], main: Group, places: int) -> Any:
    """The interaction over the boundaries, or None where one boundary was run."""
    alike = [group for group in groups if _same(group, main, "kind", "pair", "variant")]
    if len({group["boundary"] for group in alike}) < 2:
        return None
    panels = []
    for scope in sorted({group["scope"] for group in alike}, key=lambda scope: scope != main["scope"]):
        of_scope = [group for group in alike if group["scope"] == scope]
        readouts = sorted({group["readout"] for group in of_scope}, key=lambda name: (name != main["readout"], name))
        lines = [(readout, [group for group in of_scope if group["readout"] == readout]) for readout in readouts]
        panels.append((scope, [(name, sorted(line, key=lambda group: group["boundary"])) for name, line in lines]))
    return figures.over_boundaries(panels, main["boundary"], places)


def _variant_figures(groups: list[Group], main: Group, places: int) -> list[Any]:
    """What edits change of the interaction; none where nothing was edited."""
    alike = [group for group in groups if _same(group, main, *(name for name in GROUP_COLUMNS if name != "variant"))]
    interactions = {group["variant"]: group["interaction"] for group in alike}
    unedited = interactions.pop("none", None)
    found = variants.figures_of(interactions, unedited, places)
    return [figures.draw(figure, f"variants{number}", places) for number, figure in enumerate(found)]


def _verdict(main: Group) -> str:
    """What the interval of the interaction says, as a key of the template's sentences."""
    low, high = main["interaction"]["low"], main["interaction"]["high"]
    if low is None:
        return "few prompts"
    if low > 0:
        return "more"
    return "less" if high < 0 else "open"


def _unpatched(groups: list[Group], main: Group) -> dict[str, float | None] | None:
    """How far apart the two checkpoints are as they are, read by their own heads, at the events of the main group."""
    native = main | {"readout": NATIVE, "variant": "none"}
    return next((group["native_shift"] for group in groups if _same(group, native, *GROUP_COLUMNS)), None)


def _special(events: pa.Table) -> dict[str, int] | None:
    """How many choices of each checkpoint are special tokens; None where the store does not say or none is."""
    if not {f"special_{role}" for role in ROLES} <= set(events.column_names):
        return None
    counts = {role: int(events[f"special_{role}"].to_numpy().sum()) for role in ROLES}
    return counts if any(counts.values()) else None


def _group_table(groups: list[Group], main: Group) -> dict[str, Any]:
    """The groups as rows; a kind, scope or variant that all of them share is named once, above the table."""
    varying = [name for name in ("kind", "pair", "scope", "variant") if len({group[name] for group in groups}) > 1]
    order = sorted(
        range(len(groups)), key=lambda i: (not _same(groups[i], main, "kind", "pair", "scope", "variant"), i)
    )
    rows = [groups[i] for i in order][:MAX_GROUPS]
    ends = [group["interaction"][end] for group in rows for end in ("mean", "low", "high")]
    known = [0.0, *(value for value in ends if value is not None)]
    low, high = min(known), max(known)
    room = 0.04 * (high - low) or 1.0

    def x(value: float | None) -> float | None:
        """Position on the little axis, 0..100, that all rows share."""
        return None if value is None else round(100 * (value - low + room) / (high - low + 2 * room), 2)

    n_alike = sum(_same(group, main, "kind", "pair", "scope", "variant") for group in rows)
    n_open = len(rows) if len(rows) <= OPEN_ROWS else min(n_alike, OPEN_ROWS)
    shown = [
        group | {"is_main": group is main, "x": {end: x(group["interaction"][end]) for end in ("mean", "low", "high")}}
        for group in rows
    ]
    return {
        "varying": varying,
        "constant": [(name, main[name]) for name in ("kind", "scope", "variant") if name not in varying],
        "places": visible.decimals(group[name]["mean"] for group in rows for name in _LOGIT_QUANTITIES),
        "zero": x(0.0),
        "rows": shown[:n_open],
        "more": shown[n_open:],
        "n_hidden": len(groups) - len(rows),
    }


def _examples(per_event: pa.Table, events: pa.Table) -> dict[str, Any]:
    """Events from the two ends and the middle of the interactions, with their text."""
    order = np.lexsort((np.arange(per_event.num_rows), -per_event["interaction"].to_numpy()))
    parts = _parts(order)
    chosen = per_event.take(pa.array(np.concatenate([rows for _, rows in parts])))
    wanted = pc.is_in(events["event_id"], value_set=chosen["event_id"].combine_chunks())
    text_of = {event["event_id"]: event for event in events.filter(wanted).to_pylist()}
    rows = []
    for event in chosen.to_pylist():
        text = text_of[event["event_id"]]
        rows.append(
            {
                "event_id": visible.head(visible.plain(str(event["event_id"])), 40),
                "prompt_id": visible.head(visible.plain(str(event["prompt_id"])), 40),
                "step": event["step"],
                "context": visible.pieces(visible.tail(text["context"] or "", CONTEXT_CHARACTERS), spaces=False),
                "token_pt": _chip(text["token_pt"]),
                "token_it": _chip(text["token_it"]),
                "special_pt": bool(text.get("special_pt")),
                "special_it": bool(text.get("special_it")),
                "margins": [event[name] for name in names(GRID_MARGINS)],
                "interaction": event["interaction"],
            }
        )
    shown: list[dict[str, Any]] = []
    for title, members in parts:
        shown.append({"title": title, "rows": rows[: len(members)]})
        rows = rows[len(members) :]
    margins = [value for part in shown for row in part["rows"] for value in (*row["margins"], row["interaction"])]
    return {"parts": shown, "reach": max(map(abs, margins)) or 1.0, "places": visible.decimals(margins)}


def _parts(order: npt.NDArray[np.int64]) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """(title, rows) of the examples, from the row numbers in falling order of interaction; no row twice."""
    n, each = order.size, EXAMPLES_PER_PART
    if n <= 3 * each:
        return [("All events, largest interaction first", order)]
    middle = (n - each) // 2
    return [
        ("Largest interaction", order[:each]),
        ("Around the median", order[middle : middle + each]),
        ("Smallest interaction", order[-each:]),
    ]


def _chip(token: str | None) -> Sequence[visible.Piece]:
    """A token with its white space visible; one that decodes to nothing is said to be empty."""
    text = visible.head(token or "", TOKEN_CHARACTERS)
    return visible.pieces(text, spaces=True) or [visible.Piece("empty", mark=True)]


def _left_out(effects: dict[str, Any]) -> dict[str, Any] | None:
    """How many events the effects leave out and why, or None where they are over all."""
    if "n_left_out" not in effects:
        return None
    reasons = []
    if not effects.get("keep_ties") and (n := effects.get("n_ties", 0) + effects.get("n_wrong_sign", 0)):
        reasons.append((n, "whose own checkpoints contradict them by a tie or the wrong sign"))
    if effects.get("stable_only"):
        reasons.append((effects["n_unstable"], "not decided the same under strict and packed numerics"))
    if "min_gap" in effects:
        reasons.append((effects["n_below_min_gap"], f"with a gap below {effects['min_gap']:g} logits"))
    return {"n": effects["n_left_out"], "reasons": reasons}


def _reasons(excluded: pa.Table) -> list[tuple[str, int]]:
    """(reason, prompts), most frequent first; the rare ones beyond MAX_REASONS in one line."""
    counted = Counter(visible.head(visible.plain(str(reason)), 200) for reason in excluded["reason"].to_pylist())
    ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    rest = ordered[MAX_REASONS:]
    return ordered[:MAX_REASONS] + ([(f"{len(rest)} other reasons", sum(n for _, n in rest))] if rest else [])


def _noop(cells: pa.Table) -> dict[str, Any] | None:
    """The largest replayed-minus-native margin over the cells that have one, or None where none has."""
    delta = np.abs(pc.fill_null(cells["noop_delta"].cast(pa.float64()), math.nan).to_numpy())
    measured = int((~np.isnan(delta)).sum())
    return {"max": float(np.nanmax(delta)), "n": measured} if measured else None
