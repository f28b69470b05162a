"""Variants: what edits change of the interaction, as curves over what the names of variants sweep, else as rows.

``interpolate[weight=0.25]`` is one of a curve over ``weight``. Knows names and numbers; draws nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from actcache.report.visible import MINUS, head, plain, signed
from actcache.study.section import Figure, Forest, Interval, Lines

MOST_ROWS = 24
"""Of variants that are on no curve; more of them are one curve over their rank."""
FEWEST_POINTS = 3
_SWEPT = re.compile(r"(?P<base>.+?)\[(?P<swept>[^\[\]]+=.+)\]")
_PARAMETER = re.compile(r"([^=,\[\]]+)=(\[[^\]]*\]|[^,]*)(?:,|$)")
_UNORDERED = {"seed"}  # numbers that name a draw: a curve over them would say nothing
_PLAIN = "no edit"
_Y = f"interaction B {MINUS} A, logits"


def parameters(name: str) -> tuple[str, dict[str, str]]:
    """A variant's own name, and the value of each key that its sweep gave it; none where it is of no sweep."""
    found = _SWEPT.fullmatch(name)
    return (found["base"], dict(_PARAMETER.findall(found["swept"]))) if found else (name, {})


def figures_of(interactions: Mapping[str, Interval], unedited: Interval | None, places: int) -> list[Figure]:
    """What the variants of one group of effects leave of the interaction.

    Args:
        interactions: by the name of the variant.
        unedited: that of the cells as they are, where they were scored.
        places: decimals of the words.

    Returns:
        A figure of curves for each key that is swept over at least ``FEWEST_POINTS`` numbers; one more figure of the
        rest, as rows or, where they are many, as one curve over their rank.
    """
    axes = _axes(interactions)
    lines: dict[str, dict[str, list[tuple[float, Interval]]]] = {}
    rest = dict(interactions)
    for name, number in interactions.items():
        base, given = parameters(name)
        if (axis := axes.get(base)) is None or (x := _number(given.get(axis, ""))) is None:
            continue
        others = [f"{key}={value}" for key, value in given.items() if key != axis]
        label = head(plain(", ".join([base, *others])), 60)
        lines.setdefault(axis, {}).setdefault(label, []).append((x, number))
        del rest[name]
    figures: list[Figure] = []
    for axis, of in lines.items():
        ordered = {label: sorted(points, key=lambda point: point[0]) for label, points in of.items()}
        figures.append(_curves(head(plain(axis), 60), ordered, unedited, places))
    if len(rest) > MOST_ROWS:
        ranked = sorted(rest.items(), key=lambda item: (item[1]["mean"] is None, -(item[1]["mean"] or 0.0), item[0]))
        points = [(float(rank), number) for rank, (_, number) in enumerate(ranked, 1)]
        figures.append(_curves("variants, the largest first", {"variants": points}, unedited, places))
    elif rest:
        rows = [(head(plain(name), 60), number) for name, number in rest.items()]
        totals = [] if unedited is None else [(_PLAIN, unedited)]
        said = "; ".join(f"{name} {signed(number['mean'], places)}" for name, number in [*rows, *totals])
        figures.append(Forest(_Y, rows, totals, f"Interaction under each edit: {said}."))
    return figures


def _axes(names: Mapping[str, Any]) -> dict[str, str]:
    """For each variant's own name, the key that has the most numbers, where these are enough for a curve."""
    values: dict[str, dict[str, set[float]]] = {}
    for base, given in map(parameters, names):
        for key, text in given.items():
            value = _number(text)
            if value is not None and key not in _UNORDERED:
                values.setdefault(base, {}).setdefault(key, set()).add(value)
    most = {base: max(of, key=lambda key: len(of[key])) for base, of in values.items()}
    return {base: key for base, key in most.items() if len(values[base][key]) >= FEWEST_POINTS}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < float("inf") else None


def _curves(
    axis: str, lines: Mapping[str, Sequence[tuple[float, Interval]]], unedited: Interval | None, places: int
) -> Lines:
    every = [x for points in lines.values() for x, _ in points]
    said = []
    for label, points in lines.items():
        known = [(number["mean"], x) for x, number in points if number["mean"] is not None]
        if known:
            (low, at_low), (high, at_high) = min(known), max(known)
            ends = f"from {signed(low, places)} at {at_low:g} to {signed(high, places)} at {at_high:g}"
            said.append(f"{label}: {ends}")
    beside = {} if unedited is None else {_PLAIN: [(min(every), unedited), (max(every), unedited)]}
    return Lines(axis, _Y, {**lines, **beside}, None, f"Interaction over {axis}. {'; '.join(said)}.")
