"""The page of several families together: forests, the position curve, maps, and the analyses that they share.

Knows what :func:`actcache.analyses.across.across` returned; holds no HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actcache.report import sections, visible
from actcache.report.template import render, shown_settings
from actcache.schema import GRID, ROLES
from actcache.study.analysis import Answered
from actcache.study.section import Cell, Figure, Forest, Heat, Lines, Section
from actcache.study.subsets import ALL, LEAST_STEPS

BALANCED = "balanced"

Group = Mapping[str, Any]
_EFFECTS = {"late_from_pt": "A", "late_from_it": "B", "interaction": "B - A"}
_SHARES = {"portable_share": "A / B", "interaction_share": "(B - A) / shift"}
_NO_INTERVAL = {"low": None, "high": None}
_CONDITIONAL = "Every interval is conditional on these prompts and these checkpoints."


def build_families_report(
    found: Mapping[str, Any], command: str, cautions: Sequence[str], settings: Mapping[str, str]
) -> str:
    """Render several families as one HTML page that needs nothing else.

    Args:
        found: what :func:`actcache.analyses.across.across` returned, of at least one group.
        command: that makes it again.
        cautions: what a reader should know, a sentence each.
        settings: label -> text, shown in this order as how the page was made.
    """
    answered = {name: Answered(section, groups, command) for name, (section, groups) in sections_of(found).items()}
    page = {
        "n_families": len(found["families"]),
        "weights": found["options"]["weights"],
        "lead": visible.plain(lead(found)),
        "cautions": [visible.plain(line) for line in cautions],
        "sections": [sections.shown(name, one) for name, one in answered.items()],
        "settings": shown_settings(settings),
    }
    return render("families.html.jinja", page)


def lead(found: Mapping[str, Any]) -> str:
    """The answer in words: of the first kind, over all events."""
    group = next(group for group in found["groups"] if group["subset"] == ALL)
    interaction, share = group["interaction"], group["portable_share"]["mean"]
    low, high = interaction["low"], interaction["high"]
    interval = "" if low is None else f" ({low:+.3f} to {high:+.3f})"
    spread = group["spread"]["interaction"]
    said = (
        f"The balanced interaction of {len(group['families'])} families is {interaction['mean']:+.3f} logits"
        f"{interval}. Single families lie between {spread['min']:+.3f} and {spread['max']:+.3f}."
    )
    if share is not None and "portable_share" not in group["flags"]:
        said += f" The portable share of the late effect is {share:.1%}."
    if "label_swap" in group:
        said += f" Label swaps reach the interaction with p = {group['label_swap']['p']:.2g}."
    return said


def sections_of(found: Mapping[str, Any]) -> dict[str, tuple[Section, Sequence[Group]]]:
    """The sections by name, each with the groups of its numbers."""
    of_families = [group for family in found["families"] for group in family["groups"]]
    together = [{"family": BALANCED, **group} for group in found["groups"]]
    whole = [group for group in [*of_families, *together] if group["subset"] == ALL]
    shown: dict[str, tuple[Section, Sequence[Group]]] = {
        "families": (_families(whole, found["options"]["rule"]), whole)
    }
    if len(together) > len({group["kind"] for group in together}):
        shown["positions"] = _positions(of_families, together), [*of_families, *together]
    shown["maps"] = _maps(found["families"], whole), whole
    shown |= {name: (_shared(name, groups), groups) for name, groups in found["analyses"].items()}
    return shown


def _families(whole: Sequence[Group], rule: str) -> Section:
    kinds = list(dict.fromkeys(group["kind"] for group in whole))
    forests: list[Figure] = []
    for kind in kinds:
        of = [group for group in whole if group["kind"] == kind]
        for name in ("interaction", "late_from_pt", "late_from_it")[: 3 if kind == kinds[0] else 1]:
            single = [(group["family"], group[name]) for group in of if group["family"] != BALANCED]
            totals = [(BALANCED, group[name]) for group in of if group["family"] == BALANCED]
            label = f"{_called(name)}, logits" + (f", {kind}" if len(kinds) > 1 else "")
            said = ", ".join(f"{family} {number['mean']:+.3f}" for family, number in [*single, *totals])
            forests.append(Forest(label, single, totals, f"{label}: {said}."))
    rows: list[list[Cell]] = []
    for group in whole:
        rows.append(
            [
                group["family"] + (f", {group['kind']}" if len(kinds) > 1 else ""),
                group["n_events"],
                group["n_prompts"],
                *(group[name] for name in _EFFECTS),
                *(_flagged(group, name) for name in _SHARES),
            ]
        )
        if group["family"] == BALANCED:
            rows += _spread_rows(group, group["kind"] if len(kinds) > 1 else "")
    means = "the families' own intervals" if rule == "reported" else "draws of all families"
    return Section(
        title="Families",
        figures=forests,
        columns=["family", "events", "prompts", *_EFFECTS.values(), *_SHARES.values()],
        rows=rows,
        shows=(
            "The balanced mean weighs every family the same. A balanced share is the ratio of two balanced means, and "
            f"no mean of shares. Intervals of balanced means follow from {means}."
        ),
        does_not_show=(
            f"Few families are no sample of all families: the interval is of these ones alone. {_CONDITIONAL}"
        ),
        shares=tuple(_SHARES.values()),
    )


def _spread_rows(group: Group, kind: str) -> list[list[Cell]]:
    """Rows of what single families show."""
    names, spread = [*_EFFECTS, *_SHARES], group["spread"]
    of: dict[str, dict[str, float | None]] = {
        "lowest": {name: spread[name]["min"] for name in names},
        "highest": {name: spread[name]["max"] for name in names},
        "median": {name: spread[name]["median"] for name in names},
        "mean without lowest and highest": {name: spread[name]["trimmed_mean"] for name in names},
    }
    for family in group["families"]:
        of[f"balanced without {family}"] = {name: spread[name]["leave_one_out"].get(family) for name in names}
    suffix = f", {kind}" if kind else ""
    return [
        [label + suffix, "", "", *("" if of_label[name] is None else _bare(of_label[name]) for name in names)]
        for label, of_label in of.items()
    ]


def _bare(value: float | None) -> Mapping[str, float | None]:
    return {"mean": value, **_NO_INTERVAL}


def _positions(of_families: Sequence[Group], together: Sequence[Group]) -> Section:
    steps = {ALL: 0} | {f"step>={least}": least for least in LEAST_STEPS}
    kinds = list(dict.fromkeys(group["kind"] for group in together))
    figures: list[Figure] = []
    for kind in kinds:
        lines: dict[str, list[tuple[float, Any]]] = {}
        for group in [*together, *of_families]:
            if group["kind"] == kind and group["subset"] in steps:
                lines.setdefault(group["family"], []).append((steps[group["subset"]], group["interaction"]))
        said = ", ".join(f"from step {step:g} {number['mean']:+.3f}" for step, number in lines[BALANCED])
        figures.append(
            Lines("events from this step on", f"interaction B - A of {kind}, logits", lines, None, f"Balanced: {said}.")
        )
    return Section(
        title="Position",
        figures=figures,
        columns=["events of", "families", "events", *_EFFECTS.values(), *_SHARES.values()],
        rows=[
            [
                group["subset"] + (f", {group['kind']}" if len(kinds) > 1 else ""),
                len(group["families"]),
                group["n_events"],
                *(group[name] for name in _EFFECTS),
                *(_flagged(group, name) for name in _SHARES),
            ]
            for group in together
        ],
        shows="What is left of the balanced effects where the first tokens after the prompt are left out.",
        does_not_show=(
            "Later events are other events of fewer prompts, so a line that falls need not be an effect of the "
            f"position. A family without such an event is not in the mean. {_CONDITIONAL}"
        ),
        shares=tuple(_SHARES.values()),
    )


def _maps(families: Sequence[Mapping[str, Any]], whole: Sequence[Group]) -> Section:
    kind = whole[0]["kind"]
    figures: list[Figure] = []
    rows: list[list[Cell]] = []
    labels = {family["name"]: [family[role] for role in ROLES] for family in families} | {BALANCED: list(ROLES)}
    for group in (one for one in whole if one["kind"] == kind):
        of = labels[group["family"]]
        numbers = [[group["cells"][f"{upstream}_{late}"] for late in ROLES] for upstream in ROLES]
        said = f"Mean margins of {group['family']}, {kind}."
        figures.append(Heat(group["family"], "upstream", "late", of, of, numbers, said))
        rows.append([group["family"], *(group["cells"][cell] for cell in GRID)])
    return Section(
        title="The four cells of each family",
        figures=figures,
        columns=["family", *(cell.replace("_", " state, ") + " late" for cell in GRID)],
        rows=rows,
        shows="Mean margins logit(y_it) - logit(y_pt) of each state behind each late stack.",
        does_not_show=f"Logits of different families need not be of one scale. {_CONDITIONAL}",
    )


def _shared(name: str, groups: Sequence[Group]) -> Section:
    """What at least two families share of another analysis: a row per number."""
    told = dict.fromkeys(key for group in groups for key, value in group.items() if isinstance(value, str | int))
    named = [key for key in told if key not in ("n_events", "n_prompts")]
    varying = [key for key in named if len({group.get(key) for group in groups}) > 1] or named[:1]
    labels = [", ".join(str(group[key]) for key in varying if key in group) for group in groups]
    of_interaction = [
        (label, group["interaction"])
        for label, group in zip(labels, groups, strict=True)
        if _value(group, "interaction")["mean"] is not None
    ]
    said = ", ".join(f"{label} {number['mean']:+.3f}" for label, number in of_interaction)
    forest = Forest("balanced interaction B - A, logits", of_interaction, [], f"Balanced interactions: {said}.")
    return Section(
        title=f"{name.capitalize()}, over families",
        figures=[forest] if of_interaction else [],
        columns=["group", "number", "families", "events", "balanced", "lowest", "highest"],
        rows=[
            [
                label,
                number.replace("_", " "),
                ", ".join(group["families"]),
                group["n_events"],
                _value(group, number),
                *(_bare(group["spread"][number][end]) for end in ("min", "max")),
            ]
            for label, group in zip(labels, groups, strict=True)
            for number in group["spread"]
        ],
        shows=(
            "Balanced means of the numbers that at least two families have, and the lowest and the highest family. "
            f"Groups are told by {', '.join(varying)}; boundaries by their depth, as a fraction or from the end. A "
            "ratio is one of balanced means, or none where its parts are not there."
        ),
        does_not_show=f"Groups that only one family has are in its own report. {_CONDITIONAL}",
    )


def _value(group: Group, name: str) -> Mapping[str, float | None]:
    found: Mapping[str, float | None] = group.get(name, _bare(None))
    return found


def _flagged(group: Group, name: str) -> Cell:
    """A share, with a word where its two means differ in sign."""
    number: Mapping[str, float | None] = group[name]
    if name in group["flags"] and number["mean"] is not None:
        return f"{number['mean']:.1%}, signs differ"
    return number


def _called(name: str) -> str:
    words = {"late_from_pt": "late effect A, from pt", "late_from_it": "late effect B, from it"}
    return words.get(name, "interaction B - A")
