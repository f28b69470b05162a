"""Section: what the report shows of an analysis, as plain data: figures, a table, and what they show and do not show.

Nothing is drawn here (report/figures.py), and no number is computed. A terminal shows the same table as lines of text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

_ENDS = ("mean", "low", "high")

Interval: TypeAlias = Mapping[str, float | None]
"""A number of the groups: ``{"mean", "low", "high"}``."""

Cell: TypeAlias = str | int | float | Interval
"""What a table of a section shows: a text, a count, a number without a sign of its own (a p-value), or an interval."""


@dataclass(frozen=True)
class Lines:
    """A figure: numbers with intervals over numbers, a line for each name. A long one is a curve without marks.

    Attributes:
        x_label: of the axis below.
        y_label: of the axis beside, with the unit.
        lines: name -> (x, number), in the order of x; whole numbers, such as boundaries, or real ones, such as weights.
        marked: the x to mark, or None.
        alt: the figure in words.
        shares: whether the numbers are shares, to be shown as percentages.
    """

    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, Interval]]]
    marked: float | None
    alt: str
    shares: bool = False


@dataclass(frozen=True)
class Bars:
    """A figure: named bars with intervals, those of several series side by side.

    Attributes:
        label: of the axis of the values, with the unit.
        bars: name of a series -> (name of a bar, number), in order. A single series needs no name: ``""``.
        marked: the value to mark, such as that of the whole, or None.
        alt: the figure in words.
        shares: whether the numbers are shares, to be shown as percentages.
    """

    label: str
    bars: Mapping[str, Sequence[tuple[str, Interval]]]
    marked: float | None
    alt: str
    shares: bool = False


@dataclass(frozen=True)
class Forest:
    """A figure: a row with its interval for each name, and the rows that sum them up, set apart below.

    Attributes:
        label: of the axis, with the unit.
        rows: (name, number), from the top.
        totals: the same of what sums them up; may be empty.
        alt: the figure in words.
        shares: whether the numbers are shares, to be shown as percentages.
    """

    label: str
    rows: Sequence[tuple[str, Interval]]
    totals: Sequence[tuple[str, Interval]]
    alt: str
    shares: bool = False


@dataclass(frozen=True)
class Heat:
    """A figure: numbers as a map, in colours that part at 0.

    Attributes:
        title: of the map, where several stand side by side; may be empty.
        row_label: what a row is, such as ``upstream``.
        column_label: what a column is, such as ``late``.
        rows: names, from the top.
        columns: names, from the left.
        numbers: of each row, one per column.
        alt: the figure in words; the numbers are added to it.
        shares: whether the numbers are shares, to be shown as percentages.
    """

    title: str
    row_label: str
    column_label: str
    rows: Sequence[str]
    columns: Sequence[str]
    numbers: Sequence[Sequence[Interval]]
    alt: str
    shares: bool = False


Figure: TypeAlias = Lines | Bars | Forest | Heat


@dataclass(frozen=True)
class Section:
    """What the report shows of an analysis.

    Attributes:
        title: of the section.
        figures: drawn one after another.
        columns: heads of the table, the first of them names the row.
        rows: of the table: texts, counts, and numbers with their intervals.
        shows: what a reader may conclude, in one sentence or two.
        does_not_show: what a reader may not conclude.
        shares: those of the columns whose numbers are shares, to be shown as percentages.
    """

    title: str
    figures: Sequence[Figure]
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    shows: str
    does_not_show: str
    shares: Collection[str] = ()


def lines_of(section: Section) -> list[str]:
    """The table of a section as a terminal shows it, and what it shows."""
    rows: list[Sequence[str]] = [list(section.columns)]
    shares = [name in section.shares for name in section.columns]
    rows += [[in_words(*cell) for cell in zip(row, shares, strict=True)] for row in section.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return [*lines, "", section.shows]


def in_words(cell: Cell, share: bool = False) -> str:
    """A cell of a table, a number with its interval; as percentages where it is a share."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int | float):
        return f"{cell:,}" if isinstance(cell, int) else f"{cell:.3g}"
    if cell["mean"] is None:
        return "none"
    mean, low, high = (None if cell[end] is None else f"{cell[end]:{'.1%' if share else '+.3f'}}" for end in _ENDS)
    return f"{mean}" if low is None else f"{mean} [{low}, {high}]"
